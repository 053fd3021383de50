"""What a folder is taken for: metadata, captions beside images, splits, classes; guesses are named or refused."""

from pathlib import Path

import pytest

from data.test_sources import an_image, write_metadata, write_tar
from pixelgrow.data import open_mixture, open_source
from pixelgrow.data.sources.folders import ClassFolder, PairedFolder
from pixelgrow.data.sources.index import CAPTIONS, FileSource
from pixelgrow.data.sources.kinds import split_of
from pixelgrow.data.sources.metadata import MetadataFolder
from pixelgrow.data.sources.tars import TarShards
from pixelgrow.errors import UserError


def fill(root: Path, *names: str) -> Path:
    """Write images, captions ("a.txt") and tables ("metadata.csv" of the images beside it)."""
    for name in sorted(names, key=lambda name: name.endswith("metadata.csv")):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "metadata.csv":
            rows = [f"{p.relative_to(path.parent)},caption" for p in sorted(path.parent.rglob("*.png"))]
            path.write_text("\n".join(["file_name,text", *rows]))
        elif path.suffix == ".tar":
            write_tar(path, [("a.png", an_image()), ("a.txt", b"a")])
        else:
            path.write_bytes(an_image() if path.suffix == ".png" else b"a caption")
    return root


READ: list[tuple[tuple[str, ...], str, type[FileSource], str]] = [
    (("a.png", "metadata.csv"), "", MetadataFolder, ""),
    (("train/a.png", "metadata.csv"), "", MetadataFolder, ""),
    (("a.png", "a.txt"), "", PairedFolder, ""),
    (("x/a.png", "x/a.txt"), "", PairedFolder, ""),
    (("cat/a.png", "dog/b.png"), "", ClassFolder, "its 2 folders are taken for classes; write kind: classes to say so"),
    (
        ("cat/a.png", "dog/b.png", "notes.txt", "labels.txt", "cover.png"),
        "",
        ClassFolder,
        "its 2 folders are taken for classes",
    ),
    (("train/a.png", "car/b.png"), "", ClassFolder, "its 2 folders are taken for classes"),
    (("x.tar",), "", TarShards, ""),
    (
        ("train/a.png", "train/metadata.csv"),
        "train",
        MetadataFolder,
        "its folder train/ is taken for the training split",
    ),
    (
        ("train/a.png", "train/metadata.csv", "test/b.png", "test/metadata.csv"),
        "train",
        MetadataFolder,
        "its folder train/ is taken for the training split; "
        "test/ stays unused (heldout: {source: ROOT/test} holds it out)",
    ),
    (
        ("train/cat/a.png", "train/dog/b.png", "test/cat/a.png", "validation/dog/a.png"),
        "train",
        ClassFolder,
        "its folder train/ is taken for the training split; test/, validation/ stays unused",
    ),
    (("Training/a.png", "Training/a.txt", "val/a.png"), "Training", PairedFolder, "its folder Training/ is taken for"),
    (("train/x.tar", "val/x.tar"), "train", TarShards, "its folder train/ is taken for the training split; val/"),
    (("train2017/a.png", "train2017/a.txt", "val2017/a.png"), "train2017", PairedFolder, "its folder train2017/"),
    (("train/a.png", "train/a.txt", "docs/x.txt"), "train", PairedFolder, "its folder train/ is taken for"),
]


@pytest.mark.parametrize(("names", "where", "kind", "guess"), READ, ids=[" ".join(case[0]) for case in READ])
def test_what_is_read_and_what_is_said_of_a_guess(
    names: tuple[str, ...],
    where: str,
    kind: type[FileSource],
    guess: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = fill(tmp_path / "set", *names)
    with caplog.at_level("INFO", "pixelgrow"):
        (source,), _ = open_mixture(str(root))
    assert type(source) is kind
    assert source.name == str(root / where).rstrip("/")
    assert source.guess.startswith(guess.replace("ROOT", str(root)))
    assert bool(source.guess) == bool(guess)
    assert [record.getMessage() for record in caplog.records] == ([f"{source.name}: {source.guess}"] if guess else [])


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("photos/a.png", "photos/b.png"), "all in one folder, photos, .* write kind: classes if photos is the one class"),
    (("test/a.png",), r"its folders are splits \(test/\); expected one to train on: write source: ROOT/test"),
    (
        ("test/c/a.png", "validation/c/a.png"),
        r"its folders are splits \(test/, validation/\); expected one to train on",
    ),
    (("train/a.png", "training/a.png"), r"are splits \(train/, training/\); expected one to train on"),
    (("train/a.png", "test/a.png", "extra/a.png"), r"are splits \(test/, train/\), beside extra/; expected one"),
    (("train/a.png", "test/a.png"), r"ROOT/train: 1 images without captions; expected a metadata\.jsonl"),
    (("train/c/a.png", "test/c/a.png"), r"ROOT/train: its images are all in one folder, c,"),
    (("images/a.png", "x/metadata.csv"), r"its captions are in ROOT/x/metadata\.csv; name ROOT/x as the source"),
    (("cat/a.png", "dog/b.png", "captions.csv"), r"2 images, and a file captions\.csv that is not read; expected"),
    (("cat/a.png", "dog/b.png", "all captions.txt"), r"a file all captions\.txt that is not read"),
    (("cat/a.png", "cat/a.caption.txt", "dog/b.png"), r"files like cat/a\.caption\.txt beside cat/a\.png"),
    (("cat/a.png", "cat/a.png.cap", "dog/b.png"), r"files like cat/a\.png\.cap beside cat/a\.png"),
    (("cat/a.png", "dog/b.png", "data.parquet"), r"a file data\.parquet that is not read"),
    (
        ("10_cat/a.png", "10_cat/a.caption", "5_dog/b.png"),
        r"files like 10_cat/a\.caption beside 10_cat/a\.png; captions",
    ),
    (
        ("2023/01/a.png", "2023/02/a.png", "2024/01/a.png"),
        r"folders of folders \(2023/01/a\.png\).* if they are 2023, 2024",
    ),
    (("imagenet/cat/a.png", "imagenet/dog/a.png"), r"all in one folder, imagenet, .* name ROOT/imagenet as the source"),
    (("a.png", "b.png"), r"2 images without captions; expected a metadata\.jsonl"),
    (("a.png", "cat/b.png"), r"2 images without captions; expected"),
    (("sub/x.tar",), r"no images in it \(found files: 1 \.tar\)"),
    (("a.bin", "b.bin", "c"), r"no images in it \(found files: 2 \.bin, 1 without a suffix\)"),
]


@pytest.mark.parametrize(("names", "message"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_what_is_refused(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    root = fill(tmp_path / "set", *names)
    if root.joinpath("captions.csv").exists():
        root.joinpath("captions.csv").write_text("filename,caption\n")
    with pytest.raises(UserError, match=message.replace("ROOT", str(root))) as caught:
        open_source(str(root))
    assert "\n" not in str(caught.value)
    assert "classes: 1" not in str(caught.value)


def test_the_advice_to_say_the_kind_can_be_followed(tmp_path: Path) -> None:
    """Each refusal that says `write kind: classes` is silenced by it."""
    for number, (names, message) in enumerate(REFUSED):
        if "kind: classes" in message or "that is not read" in message or "captions" in message:
            root = fill(tmp_path / str(number), *names)
            if any("/" in name and name.endswith(".png") for name in names):
                source = open_source({"source": str(root), "kind": "classes"})
                assert isinstance(source, ClassFolder)
                assert not source.guess


def test_captions_of_several_folders_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_metadata(tmp_path / name, [])
    with pytest.raises(UserError, match=r"captions are in .*/a/metadata\.jsonl; name .*/a as the source"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("TRAIN", "train"),
        ("train_01", "train"),
        ("train2017", "train"),
        ("dev", "validation"),
        ("evaluation", "test"),
        ("trains", None),
        ("bullet_train", None),
        ("01", None),
        ("cat", None),
    ],
)
def test_names_of_splits(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_metadata_file_is_no_source_by_itself(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"metadata{suffix}").write_text("x")
    with pytest.raises(UserError, match=rf"expected the folder of this file; write source: {tmp_path}"):
        open_source(str(tmp_path / f"metadata{suffix}"))


@pytest.mark.parametrize(
    ("name", "text", "speaks"),
    [
        ("x.csv", "filename,class\n", True),
        ("x.csv", "a.jpg,a cat\n", True),
        ("x.csv", "epoch,loss\n", False),
        ("x.jsonl", '{"source": "x", "file": "a.jpg", "reason": "no caption"}\n', False),  # our own list of bad files
        ("x.jsonl", '{"image": "a.jpg", "words": "a cat"}\n', True),
        ("x.json", '{"images": [{"id": 3, "caption": "a cat"}]}', True),
        ("x.json", '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}', False),
        ("captions.txt", "", True),
        ("classes.txt", "cat\ndog\n", False),
    ],
)
def test_a_file_of_many_captions_speaks_against_classes(name: str, text: str, speaks: bool, tmp_path: Path) -> None:
    root = fill(tmp_path / "set", "cat/a.png", "dog/b.png")
    (root / name).write_text(text)
    if speaks:
        with pytest.raises(UserError, match=f"a file {name} that is not read"):
            open_source(str(root))
    else:
        assert type(open_source(str(root))) is ClassFolder


def test_caption_files_that_are_not_read_are_counted(tmp_path: Path) -> None:
    root = fill(tmp_path / "m", "a.png", "a.txt", "metadata.csv")
    assert [(over.reason, over.count) for over in open_source(str(root)).passed] == [(CAPTIONS, 1)]  # type: ignore[attr-defined]
    root = fill(tmp_path / "c", "cat/a.png", "cat/a.txt")
    source = open_source({"source": str(root), "kind": "classes"})
    assert [(over.reason, over.count) for over in source.passed] == [(CAPTIONS, 1)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Photos", "no such folder or file: there is photos, in other letters or another Unicode form"),
        ("E\u0301te\u0301", "no such folder or file: there is \xe9t\xe9, in other letters"),
        ("sub\\photos", "its name has backslashes, expected / between folders"),
        ("nowhere/photos", "for there is no folder "),
        ("pictures", "no such folder or file; expected a folder of images"),
    ],
)
def test_a_source_that_is_not_there(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "photos/a.png", "été/a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_source(path)
    assert str(caught.value).startswith(f"{path}: ")
