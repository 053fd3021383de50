"""Training goes through a folder with many kinds of bad files, and every file of it is listed or used."""

import errno
import io
import itertools
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelgrow.data import BadImage, Loader, heldout_split, open_source
from pixelgrow.data.badfiles import BadFiles
from pixelgrow.data.buckets import Shapes
from pixelgrow.data.inspect import inspect_source
from pixelgrow.data.sources.base import BadFile
from pixelgrow.data.sources.files import open_regular
from pixelgrow.data.sources.index import FileSource
from pixelgrow.errors import UserError
from pixelgrow.recipe.read import load_recipe
from pixelgrow.run import run

SIZE = (16, 16)


def noise(w: int = 48, h: int = 40, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RGB, RGBA = Image.fromarray(noise()), Image.fromarray(noise(channels=4))
JPEG, PNG, WEBP = encoded(RGB, "JPEG"), encoded(RGB, "PNG"), encoded(RGB, "WEBP")
FRAMES = {"save_all": True, "append_images": [Image.fromarray(noise(seed=1))], "duration": 40}


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(w: int, h: int, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg_of(w: int, h: int) -> bytes:
    """A JPEG whose header claims another size."""
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", h, w) + JPEG[at + 4 :]


def inserted(png: bytes, extra: bytes) -> bytes:
    return png[:33] + extra + png[33:]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


USABLE: dict[str, bytes] = {
    "plain.jpg": JPEG,
    "plain.png": PNG,
    "plain.webp": WEBP,
    "UPPER.JPEG": JPEG,
    "ünïcode 図.jpg": JPEG,
    "progressive.jpg": encoded(RGB, "JPEG", progressive=True),
    "grey.jpg": encoded(RGB.convert("L"), "JPEG"),
    "cmyk.jpg": encoded(RGB.convert("CMYK"), "JPEG"),
    "bilevel.png": encoded(RGB.convert("1"), "PNG"),
    "grey16.png": encoded(Image.fromarray(noise(channels=1)[..., 0].astype(np.uint16) * 257), "PNG"),
    "colour16.png": png_of(20, 20, 16, 2, (b"\0" + os.urandom(120)) * 20),
    "alpha16.png": png_of(20, 20, 16, 6, (b"\0" + os.urandom(160)) * 20),
    "palette.png": encoded(RGB.quantize(16), "PNG"),
    "palette_clear.png": encoded(RGB.quantize(16), "PNG", transparency=3),
    "palette_alpha.png": encoded(RGB.quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
    "grey_clear.png": encoded(RGB.convert("L"), "PNG", transparency=7),
    "grey_alpha.png": encoded(RGB.convert("LA"), "PNG"),
    "alpha.png": encoded(RGBA, "PNG"),
    "alpha.webp": encoded(RGBA, "WEBP"),
    "interlaced_name.png.jpg": PNG,  # a wrong extension
    "webp_in.png": WEBP,
    "animated.png": encoded(RGB, "PNG", **FRAMES),
    "animated.webp": encoded(RGB, "WEBP", **FRAMES),
    "two_images.jpg": encoded(RGB, "MPO", **FRAMES),
    "rotated.jpg": encoded(RGB, "JPEG", exif=exif(6)),
    "rotated.webp": encoded(RGB, "WEBP", exif=exif(8)),
    "odd_rotation.jpg": encoded(RGB, "JPEG", exif=exif(77)),
    "corrupt_exif.jpg": encoded(RGB, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "corrupt_profile.jpg": encoded(RGB, "JPEG", icc_profile=b"not a profile"),
    "corrupt_profile.png": inserted(PNG, chunk(b"iCCP", b"x\0\0junk")),
    "much_text.png": inserted(PNG, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 5_000_000))),
    "trailing_junk.jpg": JPEG + os.urandom(500),
}
SMALL = {
    "one_wide.png": encoded(Image.new("RGB", (1, 300)), "PNG"),
    "one_high.jpg": encoded(Image.new("RGB", (300, 1)), "JPEG"),
    "one_pixel.webp": encoded(Image.new("RGB", (1, 1)), "WEBP"),
    "thin_when_turned.jpg": encoded(Image.new("RGB", (300, 15)), "JPEG", exif=exif(6)),
}
BAD_HEADER = {
    "empty.jpg": (b"", "empty file"),
    "text.jpg": (b"<html>404 Not Found</html>", "not a JPEG, PNG or WebP"),
    "zeros.png": (bytes(4096), "not a JPEG, PNG or WebP"),
    "gif.jpg": (encoded(RGB, "GIF"), "not a JPEG, PNG or WebP"),
    "tiff.png": (encoded(RGB, "TIFF"), "not a JPEG, PNG or WebP"),
    "bmp.webp": (encoded(RGB, "BMP"), "not a JPEG, PNG or WebP"),
    "cut_in_header.jpg": (JPEG[:30], ""),
    "cut_in_header.png": (PNG[:20], ""),
    "cut_in_header.webp": (WEBP[:24], ""),
    "bomb.png": (png_of(9500, 9500), "limit"),
    "great_bomb.png": (png_of(60_000, 60_000), "limit"),
    "huge_header.png": (png_of(2**31 - 1, 2**31 - 1), "limit"),
    "huge_header.jpg": (jpeg_of(65_000, 65_000), "limit"),
    "no_size.png": (png_of(0, 0), ""),
    "truncated.webp": (WEBP[: len(WEBP) // 2], ""),
    "cut_in_pixels.png": (png_of(40, 40)[:-30], ""),
    "bad_header_sum.png": (flipped(PNG, 30), ""),
}
BAD_PIXELS = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "truncated.png": (PNG[: len(PNG) // 2], "truncated"),
    "bad_sum.png": (flipped(PNG, len(PNG) - 200), ""),
    "no_pixels.png": (png_of(40, 40), "truncated"),
    "claims_more.png": (png_of(400, 400, rows=bytes(3000)), "truncated"),
    "cut_at_the_scan.jpg": (JPEG[: JPEG.index(b"\xff\xda") + 14], "truncated"),
}


@dataclass
class Case:
    """The files of a folder by what is expected of them."""

    usable: set[str]
    small: set[str]
    bad: dict[str, str]  # key: a part of the expected reason
    unnamed: int = 0  # images without a row
    strays: dict[str, str] = field(default_factory=dict)  # passed over, and listed


def write_images(folder: Path, with_caption: Callable[[str], None]) -> Case:
    """Write the images that have the same outcome whatever the form of the captions."""
    for name, data in {**USABLE, **SMALL}.items():
        (folder / name).write_bytes(data)
    bad = {**BAD_HEADER, **BAD_PIXELS}
    for name, (data, _) in bad.items():
        (folder / name).write_bytes(data)
    case = Case(set(USABLE), set(SMALL), {name: reason for name, (_, reason) in bad.items()})
    (folder / "directory.jpg").mkdir()
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "linked.jpg").symlink_to(folder / "plain.jpg")
    case.usable.add("linked.jpg")
    case.bad |= {
        "directory.jpg": "is a directory",
        "loop.jpg": "too many levels of symbolic links",
        "dangling.png": "link to a file that is absent",
        "pipe.jpg": "not a regular file",
        "device.png": "not a regular file",
    }
    if os.geteuid():
        (folder / "unreadable.jpg").write_bytes(JPEG)
        (folder / "unreadable.jpg").chmod(0)
        case.bad["unreadable.jpg"] = "permission denied"
    for name in [*case.usable, *case.small, *case.bad]:
        with_caption(name)
    return case


def metadata_case(folder: Path) -> Case:
    rows: list[bytes] = []

    def row(name: object, text: object = "a caption") -> None:
        rows.append(json.dumps({"file_name": name, "text": text}).encode())

    case = write_images(folder, row)
    (folder / "deep").mkdir()
    (folder / "deep/er.jpg").write_bytes(JPEG)
    (folder.parent / "outside.jpg").write_bytes(JPEG)
    row("deep/../deep/er.jpg")
    row("plain.jpg", "another caption of the same file")
    row(str(folder / "plain.jpg"), "a caption by its absolute path")
    case.usable |= {"deep/er.jpg"}
    for name, reason in {
        "absent.jpg": "no such file",
        "plain.jpg/inside.jpg": "not a directory",
        "n" * 300 + ".jpg": "file name too long",
        "with\0nul.jpg": "null",
    }.items():
        row(name)
        case.bad[name] = reason
    anonymous: list[tuple[bytes, str]] = [
        (rows[0], "repeats an earlier line"),
        (json.dumps({"file_name": "../outside.jpg", "text": "x"}).encode(), "path leaves the folder"),
        (json.dumps({"file_name": str(folder.parent / "outside.jpg"), "text": "x"}).encode(), "path leaves the folder"),
        (json.dumps({"file_name": "deep/../../outside.jpg", "text": "x"}).encode(), "path leaves the folder"),
        (json.dumps({"file_name": "plain.png", "text": ""}).encode(), "empty caption"),
        (json.dumps({"file_name": "plain.png", "text": " \n\t"}).encode(), "empty caption"),
        (json.dumps({"file_name": "plain.png"}).encode(), "no caption"),
        (json.dumps({"file_name": "plain.png", "text": None}).encode(), "no caption"),
        (json.dumps({"file_name": "plain.png", "text": 7}).encode(), "caption is int, not text"),
        (json.dumps({"file_name": "plain.png", "text": []}).encode(), "empty list of captions"),
        (json.dumps({"file_name": "plain.png", "text": [["a"]]}).encode(), "caption is list, not text"),
        (json.dumps({"file_name": "plain.png", "text": "x" * 70_000}).encode(), "caption longer than"),
        (b'{"file_name": "plain.png", "text": "\\ud800"}', "caption is not valid Unicode"),
        (b'{"file_name": "\\ud800.png", "text": "x"}', "file name is not valid Unicode"),
        ('{"file_name": "plain.png", "text": "Grüße"}'.encode("latin-1"), "line is not UTF-8"),
        (b'{"file_name": "plain.png", "text": "cut', "line is not JSON"),
        (b"plain.png: a caption", "line is not JSON"),
        (b"[" * 100_000, "line is not JSON"),
        (b'"plain.png"', "line is not a JSON object"),
        (b'{"text": "a caption"}', "no file_name"),
        (b'{"file_name": 7, "text": "a caption"}', "no file_name"),
        (b'{"file_name": "plain.png", "text": "' + b"x" * (1 << 20) + b'"}', "line is not JSON"),
    ]
    for line, reason in anonymous:
        rows.append(line)
        case.bad[f"metadata.jsonl:{len(rows)}"] = reason
    row("plain.webp", "the line behind the longest")
    (folder / "metadata.jsonl").write_bytes(b"\n".join(rows))
    for name in ("not_named.jpg", "deep/not_named.gif"):
        (folder / name).write_bytes(JPEG)
        case.unnamed += 1
    return case


def paired_case(folder: Path) -> Case:
    def caption(name: str, text: bytes = b"a caption") -> None:
        (folder / name).with_suffix(".txt").write_bytes(text)

    case = write_images(folder, caption)
    for name, text, reason in (
        ("c_latin.jpg", "Grüße".encode("latin-1"), "caption is not UTF-8"),
        ("c_utf16.jpg", "caption".encode("utf-16"), "caption is not UTF-8"),
        ("c_empty.jpg", b"", "empty caption"),
        ("c_blank.jpg", b"\n \n", "empty caption"),
        ("c_long.jpg", b"x" * 70_000, "caption longer than 64 KiB"),
    ):
        (folder / name).write_bytes(JPEG)
        caption(name, text)
        case.bad[name] = reason
    for name in ("c_none.jpg", "c_folder.jpg"):
        (folder / name).write_bytes(JPEG)
    (folder / "c_folder.txt").mkdir()
    (folder / "c_alone.txt").write_text("a caption of nothing")
    (folder / "c_other.gif").write_bytes(encoded(RGB, "GIF"))
    caption("c_other.gif")
    (folder / ".hidden.jpg").write_bytes(b"")
    case.bad["c_other.gif"] = "a GIF file, not a JPEG, PNG or WebP image"
    case.strays = {
        "c_none.jpg": "no caption",
        "c_folder.jpg": "no caption",
        "c_alone.txt": "caption without an image",
        "directory.txt": "caption without an image",
    }
    return case


@pytest.fixture(params=[metadata_case, paired_case], ids=["metadata.jsonl", "txt"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Case]:
    folder = tmp_path / "photographs"
    folder.mkdir()
    return folder, request.param(folder)


def test_every_kind_of_file_is_accounted_for(case: tuple[Path, Case], tmp_path: Path) -> None:
    folder, expected = case
    assert len(expected.usable) + len(expected.small) + len(expected.bad) >= 60
    source = open_source(str(folder))
    assert isinstance(source, FileSource)
    listed = tmp_path / "bad_files.jsonl"
    loader = Loader(source, size=SIZE, batch=16, bad_limit=1.0, bad_path=listed)
    seen: set[str] = set()
    texts = set()
    epochs = 3 * -(-len(loader) // 16)
    for batch in itertools.islice(loader.batches(), epochs):
        assert batch.image.isfinite().all()
        texts |= set(batch.text)
    for item in loader.usable[0]:
        try:
            assert source.image(int(item), SIZE).shape == (*SIZE, 3)
            seen.add(source.key(int(item)))
        except BadImage:
            pass
    assert seen == expected.usable
    found = {row["file"]: row["reason"] for row in map(json.loads, listed.read_text().splitlines())}
    assert len(found) == len(listed.read_text().splitlines())
    assert found.keys() == expected.bad.keys() | expected.strays.keys()
    for key, reason in (expected.bad | expected.strays).items():
        assert found[key], key
        assert reason in found[key], (key, found[key])
        assert "\n" not in found[key]
    small = {source.key(i) for i in range(len(source)) if min(source.size(i)) < 16}
    assert small == expected.small
    assert source.files == len(expected.usable) + len(expected.small) + len(expected.bad)
    assert sum(p.count for p in source.passed) == expected.unnamed + len(expected.strays)
    assert loader.bad.report().startswith(f"{len(expected.bad)} bad files skipped")


def test_a_run_trains_through_them_all(case: tuple[Path, Case], tmp_path: Path) -> None:
    folder, expected = case
    (tmp_path / "recipe.yaml").write_text(f"""
name: spoilt
text: {{encoder: minilm, max_tokens: 8}}
data: {{source: {folder}}}
heldout: {{fraction: 0.2}}
stages:
  - train: {{name: core, size: tiny, resolution: 16, images: 160, batch: 16, bad_limit: 1, sample_every: 0,
            validate_every: 0, snapshot_every: 0}}
""")
    run(load_recipe(tmp_path / "recipe.yaml"), tmp_path)
    stage = tmp_path / "spoilt" / "core"
    done = json.loads((stage / "stage.json").read_text())
    assert done["done"]
    assert done["result"]["bad_report"].startswith(f"{len(expected.bad)} bad files skipped")
    found = [json.loads(line)["file"] for line in (stage / "bad_files.jsonl").read_text().splitlines()]
    assert sorted(found) == sorted(expected.bad | expected.strays)


def test_the_stream_is_the_same_with_workers_and_from_the_middle(case: tuple[Path, Case]) -> None:
    source = open_source(str(case[0]))
    here = Loader(source, size=SIZE, batch=8, bad_limit=1.0)
    whole = [batch.image for batch in itertools.islice(here.batches(), 12)]
    there = Loader(source, size=SIZE, batch=8, bad_limit=1.0, workers=2).batches(32)
    later = [batch.image for batch in itertools.islice(there, 4)]
    there.close()
    assert all((a == b).all() for a, b in zip(whole[4:8], later, strict=True))


def test_the_default_limit_stops_before_training(case: tuple[Path, Case], tmp_path: Path) -> None:
    listed = tmp_path / "bad_files.jsonl"
    with pytest.raises(UserError) as caught:
        Loader(open_source(str(case[0])), size=SIZE, bad_path=listed)
    message = str(caught.value)
    assert "samples are bad or lost, the limit is 0.01" in message
    assert str(listed) in message
    assert "\n" not in message
    assert len(listed.read_text().splitlines()) == len(case[1].bad | case[1].strays) - len(BAD_PIXELS)


def test_inspection_finds_them_all(case: tuple[Path, Case], tmp_path: Path) -> None:
    found = inspect_source(open_source(str(case[0])), [Shapes(SIZE)], decode=None, sheet=tmp_path / "sheet.png")
    assert {bad.key for bad in found.bad} == case[1].bad.keys()


def test_a_held_out_view_shares_its_parents_account(case: tuple[Path, Case]) -> None:
    for view in heldout_split(open_source(str(case[0])), 0.3):
        assert len(BadFiles([view], 1.0)) == len(case[1].bad) - len(BAD_PIXELS)
        assert len(list(itertools.islice(Loader(view, size=SIZE, batch=8, bad_limit=1.0).batches(), 6))) == 6


def test_a_list_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jpg").write_bytes(JPEG)
    (tmp_path / "data" / "x.txt").write_text("a caption")
    source, found = open_source(str(tmp_path / "data")), [BadFile("x.jpg", "torn")]
    with pytest.raises(UserError, match=r"cannot write .*is a file, not a folder"):
        BadFiles([source], 1.0, tmp_path / "data" / "x.txt" / "list").add(0, found)
    BadFiles([source], 1.0, tmp_path / "list").add(0, found)
    (tmp_path / "list").write_text("damaged\n" + (tmp_path / "list").read_text())  # so that it is written anew

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        BadFiles([source], 1.0, tmp_path / "list")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("edit", [b"other", b"", None], ids=["edited", "emptied", "deleted"])
@pytest.mark.parametrize("kind", ["metadata.jsonl", "0.txt"])
def test_captions_that_change_during_a_run_are_one_line(
    tmp_path: Path, kind: str, edit: bytes | None, workers: int
) -> None:
    """No traceback, no caption that was not encoded, and none of another image."""
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(JPEG)
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    if kind == "metadata.jsonl":
        rows = [json.dumps({"file_name": f"{i}.jpg", "text": f"caption {i}"}) for i in range(2)]
        (tmp_path / kind).write_text("\n".join(rows))
    loader = Loader(open_source(str(tmp_path)), size=SIZE, batch=2, bad_limit=1, workers=workers)
    assert sorted(loader.texts()) == ["caption 0", "caption 1"]
    before = (tmp_path / kind).read_bytes()
    if edit is None:
        (tmp_path / kind).unlink()
    else:
        (tmp_path / kind).write_bytes(edit and before.replace(b"0.jpg", b"1.jpg").replace(b"caption 0", edit))
    stream = loader.batches()
    with pytest.raises(UserError, match=rf"{kind}: changed since the run began \(.+\); put it back") as caught:
        list(itertools.islice(stream, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions as on Unix")
def test_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(JPEG)
    (tmp_path / "x.jpg").chmod(0)
    here = os.open(tmp_path, os.O_RDONLY)  # the path to it may need permissions
    before = os.getcwd()
    os.fchdir(here)
    root = os.geteuid() == 0
    try:
        if root:  # can read everything
            os.seteuid(65534)
        with pytest.raises(BadImage, match="permission denied"):
            open_regular("x.jpg")
    finally:
        if root:
            os.seteuid(0)
        os.chdir(before)
        os.close(here)
