"""How images are laid out: the ground behind transparent parts, cropping and padding; vector graphics."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import RunCli
from data.test_identity import classes as class_folders
from data.test_images import corner_colours, corners, encoded
from data.test_sources import an_image, as_files, passed, reasons, write_tar
from pixelgrow.data import open_source
from pixelgrow.data.account import Account, account_of
from pixelgrow.data.buckets import square
from pixelgrow.data.images import Frame, colour_of, read_image
from pixelgrow.data.inspect import inspect_source
from pixelgrow.data.sources.base import Subset
from pixelgrow.data.sources.index import LANGUAGES, LINES, NEITHER, VECTOR, FileSource
from pixelgrow.errors import UserError
from pixelgrow.recipe.read import read_recipe
from pixelgrow.stages.data import StageData

GROUND = (255, 224, 176)
SAND = Frame("#ffe0b0")
TONGUES = "A fish.\nde.utf8=Ein Fisch.\npt_BR.utf8=Um peixe.\n"


def clear_left(mode: str = "RGBA", w: int = 32, h: int = 16) -> Image.Image:
    """Transparent on the left, dark on the right."""
    image = Image.new("RGBA", (w, h))
    image.paste((10, 20, 30, 255), (w // 2, 0, w, h))
    return image.convert(mode)


def palette(alpha: bytes | int) -> io.BytesIO:
    """Two colours of a palette side by side, the left one transparent."""
    image = Image.new("P", (32, 16), 0)
    image.putpalette([200, 0, 200, 10, 20, 30])
    image.paste(1, (16, 0, 32, 16))
    return encoded(image, transparency=alpha)


@pytest.mark.parametrize(
    "file",
    [
        encoded(clear_left()),
        encoded(clear_left("LA")),
        encoded(clear_left(), "WEBP", lossless=True),
        palette(0),
        palette(b"\0\xff"),
        encoded(
            Image.fromarray(np.full((16, 32), 1000, np.uint16) + np.arange(32, dtype=np.uint16)), transparency=1007
        ),
    ],
    ids=["rgba", "grey", "webp", "colour of a palette", "alpha of a palette", "16 bit"],
)
def test_transparent_parts_have_the_colour_of_the_ground(file: io.BytesIO) -> None:
    white, sand = (read_image(io.BytesIO(file.getvalue()), (16, 32), frame=frame) for frame in (Frame(), SAND))
    changed = (white != sand).any(axis=2)
    assert changed.any() and not changed.all()
    assert (white[changed] == 255).all() and (sand[changed] == GROUND).all()


def test_half_transparent_parts_are_mixed_with_the_ground() -> None:
    pixels = read_image(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128))), (8, 8), frame=Frame("#c80000"))
    assert np.abs(pixels[0, 0].astype(int) - (100, 0, 0)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_padded_image_is_shown_whole(kind: str) -> None:
    frame = Frame("#ffe0b0", "pad")
    wide = read_image(encoded(corners(768, 256), kind), (48, 48), frame=frame)  # a JPEG is reduced as it is decoded
    assert (wide[:16] == GROUND).all() and (wide[-16:] == GROUND).all()
    assert corner_colours(wide[16:32]) == ["red", "green", "blue", "yellow"]
    full = corners(768, 256).resize((48, 16), Image.Resampling.LANCZOS)
    assert np.abs(wide[16:32].astype(int) - np.asarray(full)).mean() < 3
    tall = read_image(encoded(corners(256, 768), kind), (48, 48), (0.0, 0.0), frame)  # no part of it to choose
    assert (tall[:, :16] == GROUND).all() and (tall[:, -16:] == GROUND).all()
    assert corner_colours(tall[:, 16:32]) == ["red", "green", "blue", "yellow"]
    line = read_image(encoded(Image.new("RGB", (500, 1))), (32, 32), frame=frame)
    assert (line[:15] == GROUND).all() and (line[15] == 0).all()


def test_a_turned_image_is_padded_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: columns become rows
    pixels = read_image(encoded(corners(96, 32), "JPEG", exif=exif), (48, 48), frame=Frame("white", "pad"))
    assert (pixels[:, :16] == 255).all() and corner_colours(pixels[:, 16:32]) == ["blue", "red", "yellow", "green"]


def test_colours_have_names() -> None:
    assert colour_of("white") == colour_of("#fff") == (255, 255, 255) and colour_of("#ffe0b0") == GROUND
    for name in ("whit", "#ffe0b080", "", "none"):
        with pytest.raises(ValueError, match=f"got '{name}', expected a colour such as white, grey or #ffe0b0"):
            colour_of(name)


def stamps(folder: Path) -> Path:
    """A folder like Tux Paint's stamps: drawings with transparency, captions in many languages, sounds, SVG."""
    for place in ("animals/fish", "symbols"):
        (folder / place).mkdir(parents=True)
        (folder / place / "a.svg").write_text("<svg/>")
        (folder / place / "a.txt").write_text(TONGUES, encoding="utf-8")
        (folder / place / "a_desc_de.ogg").write_bytes(b"OggS")
    clear_left().save(folder / "animals/fish/b.png")
    (folder / "animals/fish/b.svg").write_text("<svg/>")  # the same drawing: one caption for both
    (folder / "animals/fish/c.png").write_bytes(palette(0).getvalue())
    (folder / "symbols/d.png").write_bytes(an_image(16, 16))
    (folder / "symbols/no_caption.svg").write_text("<svg/>")
    for name in ("animals/fish/b", "animals/fish/c", "symbols/d"):
        (folder / f"{name}.txt").write_text(TONGUES, encoding="utf-8")
    return folder


def test_stamps_are_read_whole(tmp_path: Path) -> None:
    source = open_source({"source": str(stamps(tmp_path)), "fit": "pad", "ground": "#ffe0b0"})
    assert isinstance(source, FileSource)
    assert not source.bad and not source.strays
    assert [source.key(i) for i in range(3)] == ["animals/fish/b.png", "animals/fish/c.png", "symbols/d.png"]
    assert {source.text(i) for i in range(3)} == {"A fish."}
    assert passed(source) == {NEITHER: (2, "animals/fish/a_desc_de.ogg"), VECTOR: (4, "animals/fish/a.svg")}
    pixels = source.image(0, (32, 32))
    assert (pixels[:8] == GROUND).all() and (pixels[10, 4] == GROUND).all() and (pixels[10, 28] == (10, 20, 30)).all()
    found = inspect_source(source, [square(32), square(16)])
    assert dict(found.notes) == {
        LINES: 3,
        LANGUAGES: 6,
        "images that are not square, padded with #ffe0b0": 2,
        "images with transparency, shown on #ffe0b0": 2,
    }
    assert [account.line() for _, account in found.stages] == [
        "sees 2 of 7 images: 1 too small, 4 passed over; transparent parts of 2 are #ffe0b0",
        "sees 3 of 7 images: 4 passed over; transparent parts of 2 are #ffe0b0",
    ]


def test_the_account_counts_the_grounds_of_what_is_seen(tmp_path: Path) -> None:
    stamps(tmp_path)
    white, grey = (open_source({"source": str(tmp_path), "ground": ground}) for ground in ("white", "grey"))
    account = account_of([white, Subset(grey, np.array([1, 2]), "part"), open_source("scenes")], square(16))
    assert account.line().endswith(
        ": 1 held out, 8 passed over; transparent parts of 2 are white; transparent parts of 1 are grey"
    )
    assert Account.from_stored(json.loads(json.dumps(account.stored()))) == account
    assert account.but("bad", 1).grounds == account.grounds
    assert account_of([white], square(32)).grounds == {}  # none is seen


def test_vector_graphics_are_passed_over(tmp_path: Path) -> None:
    members = [("a.svg", b"<svg/>"), ("a.txt", b"a"), ("b.png", an_image()), ("b.txt", b"b"), ("c.svg", b"<svg/>")]
    tar = as_files(write_tar(tmp_path / "x.tar", members))
    assert (passed(tar), reasons(tar), tar.files) == ({VECTOR: (2, "a.svg")}, {}, 1)
    for name in "ab":
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "1.png").write_bytes(an_image())
        (tmp_path / "classes" / name / "2.svg").write_text("<svg/>")
    classes = open_source({"source": str(tmp_path / "classes"), "kind": "classes"})
    assert isinstance(classes, FileSource) and (passed(classes), classes.bad) == ({VECTOR: (2, "a/2.svg")}, ())
    (tmp_path / "drawings").mkdir()
    for name in ("a.svg", "a.txt"):
        (tmp_path / "drawings" / name).write_text("<svg/>")
    with pytest.raises(
        UserError, match=r"no samples in it \(vector graphics \(SVG\), which are not drawn: 1, such as a"
    ):
        open_source({"source": str(tmp_path / "drawings"), "kind": "folder"})


def recipe(folder: Path, heldout: dict[str, str] | None = None, **data: str) -> StageData:
    train = {"name": "core", "size": "tiny", "resolution": 16, "images": 8}
    raw = {"name": "r", "text": {"classes": 2}, "stages": [{"train": train}]}
    source = {"source": str(folder), "kind": "classes"}
    head = {"data": source | data} | ({"heldout": source | heldout} if heldout is not None else {})
    return StageData(read_recipe(raw | head, "test"), folder.parent / "runs")


def test_another_frame_is_other_data(tmp_path: Path) -> None:
    folder, prints = class_folders(tmp_path / "set", 4), {}
    for data in ({}, {"ground": "#fff"}, {"ground": "black"}, {"ground": "#000"}, {"fit": "pad"}):
        found = recipe(folder, **data)
        prints[str(data)] = found.describe(found.recipe.stages[0])["data"][0]["fingerprint"]
    plain, same, dark, hexed, pad = prints.values()
    assert plain == same and dark == hexed and len({plain, dark, pad}) == 3
    for now, was in ((recipe(folder), dark), (recipe(folder, fit="pad"), plain)):
        words = now.explain(now.recipe.stages[0], "data[0].fingerprint", was)
        assert words == f"the ground, fit or buckets of {folder} changed since it was begun"
    black = recipe(folder, {"ground": "white"}, ground="black")
    with pytest.raises(UserError, match="is trained on and held out"):
        black.check_apart(black.mixture(black.recipe.stages[0]).sources)


def test_a_mistaken_frame_is_one_line(tmp_path: Path, run_cli: RunCli) -> None:
    (tmp_path / "a.png").write_bytes(an_image())
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="fit is 'stretch', expected one of crop, pad"):
        open_source({"source": str(tmp_path), "fit": "stretch"})
    result = run_cli("data", tmp_path, "--ground", "sand", cwd=tmp_path)
    assert (result.code, result.out) == (2, "")
    assert (
        result.err == f"pixelgrow: {tmp_path}: ground: got 'sand', expected a colour such as white, grey or #ffe0b0\n"
    )


def test_the_command_line_lays_out(tmp_path: Path, run_cli: RunCli) -> None:
    folder = stamps(tmp_path / "set")
    result = run_cli("data", folder, "--ground", "navy", "--fit", "pad", cwd=tmp_path)
    assert result.code == 0 and "images with transparency, shown on navy" in result.out
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert sheet.convert("RGB").getpixel((64, 4)) == (0, 0, 128)
