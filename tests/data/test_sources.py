"""Sources of files: what each kind finds, what it says when it finds nothing, and how little memory a million take."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image

from pixelgrow.data import heldout_split, open_mixture, open_source, take
from pixelgrow.data.buckets import square
from pixelgrow.data.images import Header
from pixelgrow.data.inspect import inspect_source
from pixelgrow.data.sources import metadata
from pixelgrow.data.sources.base import Subset, bad_of, files_of, large_enough, sizes_of
from pixelgrow.data.sources.folders import ClassFolder, PairedFolder
from pixelgrow.data.sources.index import NEITHER, FileSource
from pixelgrow.data.sources.metadata import MetadataFolder
from pixelgrow.errors import UserError


def an_image(w: int = 40, h: int = 40, shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (w, h), (shade % 256, 90, 200)).save(file, "PNG")
    return file.getvalue()


def write_metadata(folder: Path, rows: list[object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def captioned(folder: Path, count: int = 4) -> Path:
    write_metadata(folder, [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(count)])
    for i in range(count):
        (folder / f"{i}.png").write_bytes(an_image(40 + i, 30, i))
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def as_files(path: Path | str) -> FileSource:
    source = open_source(str(path))
    assert isinstance(source, FileSource)
    return source


def passed(source: FileSource) -> dict[str, tuple[int, str]]:
    return {over.reason: (over.count, over.example) for over in source.passed}


def reasons(source: FileSource) -> dict[str, str]:
    return {bad.key: bad.reason for bad in (*source.bad, *source.strays)}


def test_metadata_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/ü b.png").write_bytes(an_image(50, 40))
    (tmp_path / "c.png").write_bytes(an_image(60, 70))
    write_metadata(
        tmp_path,
        [
            {"file_name": "a/ü b.png", "text": "  zwei\n Wörter ", "width": 999, "height": 999},
            {"file_name": "./c.png", "text": "first"},
            {"file_name": "c.png", "text": "second"},
        ],
    )
    source = as_files(tmp_path)
    assert isinstance(source, MetadataFolder)
    assert [source.key(i) for i in range(3)] == ["a/ü b.png", "c.png", "c.png"]
    assert [source.text(i) for i in range(3)] == ["zwei Wörter", "first", "second"]
    assert [source.size(i) for i in range(3)] == [(40, 50), (70, 60), (70, 60)]
    assert source.image(0, (16, 24)).shape == (16, 24, 3)
    assert source.files == 2
    assert not source.bad


def test_metadata_with_a_byte_order_mark_blank_lines_and_no_final_newline(tmp_path: Path) -> None:
    captioned(tmp_path, 2)
    rows = (tmp_path / "metadata.jsonl").read_bytes().splitlines()
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + rows[0] + b"\r\n\n   \n" + rows[1])
    source = as_files(tmp_path)
    assert [source.text(i) for i in range(2)] == ["caption 0", "caption 1"]
    assert not source.bad


def test_txt_beside_the_image(tmp_path: Path) -> None:
    (tmp_path / "sub/deep").mkdir(parents=True)
    for name, text in {"b": "bee", "a": "ay", "a.b": "dotted", "sub/deep/z": "zed", "a b": "spaced"}.items():
        (tmp_path / f"{name}.JPG").write_bytes(an_image())
        (tmp_path / f"{name}.txt").write_text("\ufeff" + text, encoding="utf-8")
    (tmp_path / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "notes.md").write_text("not ours")
    source = as_files(tmp_path)
    assert isinstance(source, PairedFolder)
    assert {source.key(i): source.text(i) for i in range(5)} == {
        "a b.JPG": "spaced",
        "a.JPG": "ay",
        "a.b.JPG": "dotted",
        "b.JPG": "bee",
        "sub/deep/z.JPG": "zed",
    }
    assert len(source) == 5
    assert (source.files, source.bad) == (5, ())
    assert passed(source) == {NEITHER: (1, "notes.md")}


def test_class_folders(tmp_path: Path) -> None:
    for name in ("dog/x.png", "cat/1.png", "cat/more/2.png", "emu/3.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(an_image())
    (tmp_path / "bare").mkdir()
    source = open_source({"source": str(tmp_path), "kind": "classes"})
    assert isinstance(source, ClassFolder)
    assert source.classes == ("cat", "dog", "emu")
    assert [(source.key(i), source.text(i)) for i in range(4)] == [
        ("cat/1.png", "0"),
        ("cat/more/2.png", "0"),
        ("dog/x.png", "1"),
        ("emu/3.webp", "2"),
    ]
    assert Subset(source, np.array([2]), "view").classes == source.classes


def test_a_class_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    """Its name would be written into a checkpoint, after training."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/1.png", "wb") as file:
        file.write(an_image())
    with pytest.raises(UserError, match=r"the class folder b'caf\\xe9' has a name that is not UTF-8.*rename"):
        open_source({"source": str(tmp_path), "kind": "classes"})


def test_one_line_for_each_mistake(tmp_path: Path) -> None:
    empty, loose = tmp_path / "empty", tmp_path / "loose"
    empty.mkdir()
    loose.mkdir()
    (loose / "a.png").write_bytes(an_image())
    write_metadata(tmp_path / "norows", [])
    write_metadata(tmp_path / "otherkeys", [{"image": "a.png", "prompt": "x"}] * 3)
    write_metadata(tmp_path / "absent", [{"file_name": f"{i}.png", "text": "x"} for i in range(3)])
    (tmp_path / "nometa").mkdir()
    (tmp_path / "nometa/metadata.jsonl").mkdir()
    (tmp_path / "file.png").write_bytes(an_image())
    specs: list[tuple[object, str]] = [
        (str(tmp_path / "nowhere"), "no such folder or file"),
        (str(empty), "no images in it"),
        (str(loose), "1 images without captions; expected a metadata.jsonl"),
        (str(tmp_path / "norows"), "empty; expected one {"),
        (str(tmp_path / "otherkeys"), "the first: metadata.jsonl:1: no file_name"),
        (str(tmp_path / "absent"), "the first: 0.png: no such file"),
        (str(tmp_path / "nometa"), "is a directory"),
        ({"source": str(loose), "kind": "tar"}, "no .tar files in it"),
        ({"source": str(loose), "kind": "folder"}, "no samples in it (no caption: 1, such as a.png)"),
        ({"source": str(loose), "kind": "classes"}, "(not in the folder of a class: 1, such as a.png)"),
        ({"source": str(tmp_path / "norows/metadata.jsonl"), "kind": "folder"}, "expected the folder of this file"),
        ({"source": __file__, "kind": "folder"}, "expects a folder"),
        (str(tmp_path / "file.png"), "a single image is no source"),
        ({"source": "scenes", "n": 10**12}, "expected n from 1 to 100000000"),
        ({"source": str(loose), "kind": "zip"}, "kind is 'zip'"),
        ({"source": str(loose), "kidn": "tar"}, "unknown setting 'kidn'"),
        ({"source": "scenes", "m": 3}, "unknown setting 'm'"),
        ({"kind": "tar"}, "without source:"),
    ]
    for spec, message in specs:
        with pytest.raises(UserError) as caught:
            open_source(spec)  # type: ignore[arg-type]
        assert message in str(caught.value), str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_example_makes_a_folder_once(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "photographs.py"
    command = [sys.executable, str(script), "photographs", "-n", "1", "--side", "40"]
    for expected, words in ((0, ""), (2, "photographs.py: cannot write photographs: File exists; name another place")):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.startswith(words), len(done.stderr.splitlines())) == (
            expected,
            True,
            int(bool(expected)),
        )
    assert len(as_files(tmp_path / "photographs")) == 12


def test_mixtures(tmp_path: Path) -> None:
    spec = {"source": str(captioned(tmp_path))}
    sources, weights = open_mixture([{**spec, "weight": 1}, {**spec, "weight": 2.5}])
    assert (len(sources), weights) == (2, [1.0, 2.5])
    assert open_mixture(spec)[1] is None
    assert open_mixture([spec, str(tmp_path)])[1] is None
    for specs, message in (
        ([], "empty list"),
        ([{**spec, "weight": 1}, spec], "1 of 2 sources"),
        ([{**spec, "weight": "much"}], "weight is 'much'"),
    ):
        with pytest.raises(UserError, match=message):
            open_mixture(specs)  # type: ignore[arg-type]


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first = as_files(captioned(tmp_path)).fingerprint
    assert as_files(tmp_path).fingerprint == first
    (tmp_path / "0.png").write_bytes(an_image(40, 40, 7))
    second = as_files(tmp_path).fingerprint
    write_metadata(tmp_path, [{"file_name": f"{i}.png", "text": f"other {i}"} for i in range(4)])
    assert len({first, second, as_files(tmp_path).fingerprint}) == 3


def test_links_are_followed_and_loops_are_bad(tmp_path: Path) -> None:
    (tmp_path / "real/cat").mkdir(parents=True)
    (tmp_path / "real/cat/1.png").write_bytes(an_image())
    (tmp_path / "set").mkdir()
    (tmp_path / "set/cats").symlink_to(tmp_path / "real/cat")
    (tmp_path / "real/cat/again").symlink_to(tmp_path / "real/cat")
    source = open_source({"source": str(tmp_path / "set"), "kind": "classes"})
    assert isinstance(source, ClassFolder)
    assert [source.key(i) for i in range(len(source))] == ["cats/1.png"]
    assert reasons(source) == {"cats/again": "loop of links"}


def test_heldout_split(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i // 2}.png", "text": f"caption {i}"} for i in range(120)]
    for i in range(60):
        (tmp_path / f"{i}.png").write_bytes(an_image(32 + i, 32))
    source = as_files(write_metadata(tmp_path, rows))
    train, held = heldout_split(source, 0.25, seed=3)
    assert len(train) + len(held) == 120
    assert len(held) == 30
    keys = [{view.key(i) for i in range(len(view))} for view in (train, held)]
    assert not keys[0] & keys[1]
    assert train.fingerprint != held.fingerprint
    assert held.text(0) == source.text(int(held.indices[0]))
    assert held.size(1) == tuple(sizes_of(held)[1]) == source.size(int(held.indices[1]))
    assert (held.image(0, (8, 8)) == source.image(int(held.indices[0]), (8, 8))).all()
    assert files_of(held) == 60
    assert (heldout_split(source, 0.25, seed=3)[1].indices == held.indices).all()
    assert not np.array_equal(heldout_split(source, 0.25, seed=4)[1].indices, held.indices)
    assert len(heldout_split(source, 0.001)[1]) == 16
    assert 0 < len(heldout_split(source, 0.9)[1]) <= 60
    assert len(heldout_split(source, 0.25, at_most=20)[1]) == 20
    assert len(heldout_split(open_source({"source": "scenes", "n": 600_000}))[1]) == 10_000
    batch = take(held, 5, (16, 24))
    assert batch.image.shape == (5, 3, 16, 24)
    assert batch.text == tuple(held.text(i) for i in range(5))
    assert len(take(held, 1000, (16, 24))) == 30
    for fraction in (0, 1, -0.5):
        with pytest.raises(UserError, match="held-out fraction"):
            heldout_split(source, fraction)
    with pytest.raises(UserError, match="too few"):
        heldout_split(Subset(source, np.array([0, 1]), "one file twice"), 0.5)


def test_a_held_out_split_moves_little_when_files_are_added(tmp_path: Path) -> None:
    source = as_files(captioned(tmp_path, 40))
    few = Subset(source, np.arange(38), "before")
    before = {few.key(int(i)) for i in heldout_split(few, 0.3)[1].indices}
    after = {source.key(int(i)) for i in heldout_split(source, 0.3)[1].indices}
    assert len(before - after) <= 2


def test_sizes_filter(tmp_path: Path) -> None:
    source = as_files(captioned(tmp_path, 10))  # 40..49 wide, 30 high
    assert list(large_enough(source, (30, 45))) == [5, 6, 7, 8, 9]
    assert list(large_enough(source, (45, 30))) == []


def test_scenes_are_a_source_like_any_other() -> None:
    scenes = open_source({"source": "scenes", "n": 40, "captions": 10, "seed": 1, "split": "heldout"})
    assert len(scenes) == 40
    assert sizes_of(scenes).shape == (40, 2)
    assert not bad_of(scenes)
    assert files_of(scenes) == 40
    assert take(scenes, 3, (16, 16)).image.shape == (3, 3, 16, 16)
    train, held = heldout_split(scenes)
    assert len(held) == 16
    assert len(train) == 24


def test_a_source_travels_to_another_process(tmp_path: Path) -> None:
    write_tar(tmp_path / "tar/x.tar", [("a.jpg", an_image()), ("a.txt", b"a")])
    for folder in (captioned(tmp_path / "folder"), tmp_path / "tar"):
        source = as_files(folder)
        copy = pickle.loads(pickle.dumps(source))  # noqa: S301
        assert copy.text(0) == source.text(0)
        assert (copy.image(0, (8, 8)) == source.image(0, (8, 8))).all()


def test_inspection(tmp_path: Path) -> None:
    for i, name in enumerate(("a/1", "a/2", "b/3")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(an_image(100 * (i + 1), 70))
    (tmp_path / "b/4.png").write_bytes(an_image(90, 90)[:-30])
    (tmp_path / "b/5.png").write_bytes(b"")
    (tmp_path / "b/6.gif").write_bytes(b"GIF89a")
    (tmp_path / "b/readme").write_bytes(b"")
    source = open_source(str(tmp_path))
    found = inspect_source(source, [square(64), square(80)], sheet=tmp_path / "out/sheet.png")
    assert (found.files, found.samples, found.decoded) == (6, 3, 4)
    assert [(over.reason, over.count, over.example) for over in found.passed] == [(NEITHER, 1, "b/readme")]
    assert found.guess == "its 2 folders are taken for classes; write kind: classes to say so"
    assert {bad.key for bad in found.bad} == {"b/4.png", "b/5.png", "b/6.gif"}
    assert found.sides == ((64, 4),)
    assert [(size, account.line()) for size, account in found.stages] == [
        ((64, 64), "sees 3 of 6 images: 3 bad"),
        ((80, 80), "sees 0 of 6 images: 3 too small, 3 bad"),
    ]
    for numbers, line in (
        ([0, 1, 2], "sees 3 of 6 images: 1 held out, 2 bad"),
        ([0, 3], "sees 1 of 6 images: 2 held out, 3 bad"),
    ):
        part = inspect_source(source, [square(64)], train=Subset(source, np.array(numbers), "part"))
        assert part.stages[0][1].line() == line
    assert found.classes == (("a", 2), ("b", 2))
    why = {reason.example: reason.samples for reason in found.reasons()}
    assert why == {"b/4.png": 1, "b/5.png": 1, "b/6.gif": 1}
    assert found.sheet is not None
    with Image.open(found.sheet) as sheet:
        assert sheet.size == (1024, 632)
    captions = inspect_source(open_source(str(captioned(tmp_path / "captioned", 3))), decode=0)
    assert (captions.words.median, captions.characters.most, captions.distinct, captions.decoded) == (2, 9, 3, 0)


def test_a_million_samples_index_in_200_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four thousand rows, measured, times 250; the files' headers are taken as read."""
    count = 4_000
    caption = (
        "a photograph of something with a caption of an ordinary length, as people write them below their pictures"
    )
    with open(tmp_path / "metadata.jsonl", "w") as file:
        for i in range(count):
            file.write(json.dumps({"file_name": f"folder/of/images/{i:09}.jpg", "text": f"{caption} {i}"}) + "\n")

    def no_file(path: bytes) -> BinaryIO:
        return open(tmp_path / "metadata.jsonl", "rb") if path.endswith(b".jpg") else open(path, "rb")

    monkeypatch.setattr(metadata, "open_regular", lambda path: no_file(os.fsencode(path)))
    monkeypatch.setattr("pixelgrow.data.sources.index.read_header", lambda file: Header((640, 480), False))
    MetadataFolder(str(tmp_path))  # whatever is imported or cached on first use
    tracemalloc.start()
    try:
        source = MetadataFolder(str(tmp_path))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == count
    assert source.text(count - 1).endswith(str(count - 1))
    assert held * (1_000_000 / count) < 50e6
    assert peak * (1_000_000 / count) < 200e6
