"""Which caption belongs to which image: one rule for folders and shards, whatever the case or Unicode form of names."""

import shutil
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from data.test_sources import an_image, as_files, passed, reasons, write_tar
from pixelgrow.data import open_source
from pixelgrow.data.sources.index import FURTHER, NEITHER, FileSource
from pixelgrow.data.sources.names import match

CASES: dict[str, tuple[list[str], dict[str, str], dict[str, str]]] = {
    # files; image -> caption file; what is bad
    "plain": (["a.jpg", "a.txt", "b.png", "b.txt"], {"a.jpg": "a.txt", "b.png": "b.txt"}, {}),
    "dots": (
        ["trip.p001.jpg", "trip.p001.txt", "trip.jpg", "trip.txt", "v1.0_x.png", "v1.0_x.txt", "v1.png", "v1.txt"],
        {
            "trip.p001.jpg": "trip.p001.txt",
            "trip.jpg": "trip.txt",
            "v1.0_x.png": "v1.0_x.txt",
            "v1.png": "v1.txt",
        },
        {},
    ),
    "only dots": (["t.1.jpg", "t.1.txt", "t.2.jpg", "t.2.txt"], {"t.1.jpg": "t.1.txt", "t.2.jpg": "t.2.txt"}, {}),
    "the image's whole name": (["a.jpg", "a.jpg.txt"], {"a.jpg": "a.jpg.txt"}, {}),
    "a mask beside it": (["1.jpg", "1.seg.png", "1.txt"], {"1.jpg": "1.txt"}, {}),
    "webdataset's key": (["1.seg.png", "1.txt"], {"1.seg.png": "1.txt"}, {}),
    "two of one key": (
        ["1.a.png", "1.b.png", "1.txt"],
        {},
        dict.fromkeys(["1.a.png", "1.b.png"], "one caption file for several images, none of which has its name"),
    ),
    "two suffixes": (["a.jpg", "a.png", "a.txt"], {"a.jpg": "a.txt", "a.png": "a.txt"}, {}),
    "text before JSON": (["a.jpg", "a.json", "a.txt", "b.jpg", "b.json"], {"a.jpg": "a.txt", "b.jpg": "b.json"}, {}),
    "upper case": (["A.JPG", "A.TXT", "b.Jpeg", "b.Json"], {"A.JPG": "A.TXT", "b.Jpeg": "b.Json"}, {}),
    "another case of its name": (["A.jpg", "a.txt"], {}, {"A.jpg": "no caption", "a.txt": "caption without an image"}),
    "folders": (["x/a.jpg", "y/a.txt"], {}, {"x/a.jpg": "no caption", "y/a.txt": "caption without an image"}),
    "dotted folders": (["d.e/a.jpg", "d.e/a.txt"], {"d.e/a.jpg": "d.e/a.txt"}, {}),
    "no suffix": (["a", "a.txt", "b.v2", "b.v2.txt"], {"a": "a.txt", "b.v2": "b.v2.txt"}, {}),
    "other suffixes": (["a.jfif", "a.txt", "b.jpe", "b.txt", "c.jpg_large", "c.txt"], {
        "a.jfif": "a.txt", "b.jpe": "b.txt", "c.jpg_large": "c.txt",
    }, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("door", ["match", "folder", "tar"])
def test_a_caption_finds_its_image_through_every_door(name: str, door: str, tmp_path: Path) -> None:
    files, pairs, bad = CASES[name]
    if door == "match":
        found = match(files, lambda i: True)
        assert {files[i]: files[j] for i, j in found.pairs} == pairs
        assert {files[i]: reason for i, reason in (found.faults | found.strays).items()} == bad
        return
    ok = ["ok.png", "ok.txt"]  # a source needs one sample
    data = {file: f'{{"caption": "{file}"}}' if file.lower().endswith("json") else file for file in files + ok}
    for file, text in data.items():
        (tmp_path / "set" / file).parent.mkdir(parents=True, exist_ok=True)
        is_text = file.lower().endswith((".txt", ".json"))
        (tmp_path / "set" / file).write_bytes(text.encode() if is_text else an_image())
    if door == "tar":
        order = sorted(data, reverse=True)  # captions before and far from their images
        write_tar(tmp_path / "x.tar", [(file, (tmp_path / "set" / file).read_bytes()) for file in order])
    source = as_files(tmp_path / ("x.tar" if door == "tar" else "set"))
    assert {source.key(i): source.text(i) for i in range(len(source))} == pairs | {"ok.png": "ok.txt"}
    assert reasons(source) == bad


def test_further_images_and_other_files_are_counted(tmp_path: Path) -> None:
    files = {"1.jpg": an_image(), "1.txt": b"one", "1.seg.png": an_image(), "1.depth.png": an_image(), "1.npy": b"?"}
    for name, data in files.items():
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    write_tar(tmp_path / "x.tar", list(files.items()))
    for door in ("set", "x.tar"):
        source = as_files(tmp_path / door)
        assert (len(source), source.bad) == (1, ())
        assert {reason: count for reason, (count, _) in passed(source).items()} == {FURTHER: 2, NEITHER: 1}


def test_what_a_file_is_its_bytes_say(tmp_path: Path) -> None:
    """In a folder, in class folders, in a shard and in metadata: the same files are images."""
    (tmp_path / "a").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "jpeg", "JPEG")
    jpeg = (tmp_path / "jpeg").read_bytes()
    files = {"gif.gif": jpeg, "bare": jpeg, "odd.bin": an_image(), "png.jpg": an_image(), "note.bin": b"text"}
    gif = b"GIF89a" + bytes(20)
    for name, data in {**files, "real.gif": gif}.items():
        (tmp_path / "a" / name).write_bytes(data)
        (tmp_path / "a" / f"{name}.txt").write_text(name)
    shutil.copytree(tmp_path / "a", tmp_path / "c" / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "c" / "b")
    for text in (tmp_path / "c").rglob("*.txt"):
        text.unlink()
    shutil.copytree(tmp_path / "a", tmp_path / "m")
    rows = [f'{{"file_name": "{name}", "text": "{name}"}}\n' for name in [*files, "real.gif"]]
    (tmp_path / "m" / "metadata.jsonl").write_text("".join(rows))
    write_tar(tmp_path / "x.tar", [(p.name, p.read_bytes()) for p in (tmp_path / "a").iterdir()])
    images = {"gif.gif", "bare", "odd.bin", "png.jpg"}
    for door in ("a", "m", "x.tar"):
        source = as_files(tmp_path / door)
        assert {source.key(i) for i in range(len(source))} == images, door
        assert reasons(source)["real.gif"] == "a GIF file, not a JPEG, PNG or WebP image"
    classes = as_files(tmp_path / "c")
    assert {classes.key(i) for i in range(len(classes))} == {f"{c}/{name}" for c in "ab" for name in images}
    assert reasons(classes)["a/real.gif"] == "a GIF file, not a JPEG, PNG or WebP image"


def test_pairs_are_in_the_order_of_their_images() -> None:
    """A sample that webdataset's key finds stands where its image does: the order of a source is that of its names."""
    assert match(["a.seg.png", "a.txt", "b.png", "b.txt"], lambda i: True).pairs == [(0, 1), (2, 3)]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_the_unicode_form_of_a_name_makes_no_difference(forms: tuple[str, str], tmp_path: Path) -> None:
    image, caption = (unicodedata.normalize(form, "été.jpg") for form in forms)
    caption = caption.removesuffix(".jpg") + ".txt"
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / image).write_bytes(an_image())
    (tmp_path / "p" / caption).write_text("summer", encoding="utf-8")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / image).write_bytes(an_image())
    row = f'{{"file_name": "{caption.removesuffix(".txt")}.jpg", "text": "summer"}}\n'
    (tmp_path / "m" / "metadata.jsonl").write_text(row, encoding="utf-8")
    write_tar(tmp_path / "x.tar", [(caption, b"summer"), (image, an_image())])
    prints = set()
    for door in ("p", "m", "x.tar"):
        source = as_files(tmp_path / door)
        assert (source.key(0), source.text(0)) == (unicodedata.normalize("NFC", "été.jpg"), "summer")
        assert source.image(0, (8, 8)).shape == (8, 8, 3)
        assert not passed(source)
        prints.add(source.fingerprint)
    assert len(prints) == 1


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_labels_do_not_depend_on_the_unicode_form_of_folders(form: str, tmp_path: Path) -> None:
    names = ["zebra", "éclair", "eagle", "f"]
    for name in names:
        folder = tmp_path / unicodedata.normalize(form, name)
        folder.mkdir()
        (folder / "1.png").write_bytes(an_image())
    source = as_files(tmp_path)
    assert source.classes == ("eagle", "f", "zebra", "éclair")
    assert [source.text(i) for i in range(4)] == ["0", "1", "2", "3"]


def test_two_forms_of_one_class_are_refused(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        folder = tmp_path / unicodedata.normalize(form, "été")
        folder.mkdir()
        (folder / f"{form}.png").write_bytes(an_image())
    with pytest.raises(ValueError, match=r"two class folders are named été, in two Unicode forms"):
        open_source({"source": str(tmp_path), "kind": "classes"})


@pytest.mark.parametrize(
    "hidden", ["._a.png", ".a.png", "__MACOSX/._a.png", "__MACOSX/b.png", "@eaDir/b.png", ".x/b.png"]
)
def test_hidden_files_are_not_looked_at(hidden: str, tmp_path: Path) -> None:
    def sources() -> list[FileSource]:
        for folder in ("p", "c/k", "c/l"):
            (tmp_path / folder / hidden).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / hidden).write_bytes(an_image())
            (tmp_path / folder / "a.png").write_bytes(an_image())
        (tmp_path / "p" / "a.txt").write_text("a")
        write_tar(tmp_path / "x.tar", [(hidden, b"?"), ("./a.png", an_image()), ("./a.txt", b"a")])
        return [as_files(tmp_path / door) for door in ("p", "x.tar", "c")]

    for source, keys in zip(sources(), [["a.png"], ["a.png"], ["k/a.png", "l/a.png"]], strict=True):
        assert [source.key(i) for i in range(len(source))] == keys
        assert not source.bad
        assert not source.passed
