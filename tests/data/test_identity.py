"""What makes two sources the same data: what they hold, and nothing else of them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data.test_sources import an_image, as_files, captioned, write_metadata, write_tar
from pixelgrow.data.account import account_of
from pixelgrow.data.badfiles import BadFiles
from pixelgrow.data.buckets import square
from pixelgrow.data.sources import identity
from pixelgrow.data.sources.base import BadFile
from pixelgrow.data.sources.identity import END, differences, write_samples
from pixelgrow.errors import UserError


def paired(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i in range(4):
        (folder / f"{i}.png").write_bytes(an_image(40 + i, 30, i))
        (folder / f"{i}.txt").write_text(f"caption {i}\n")
    return folder


def classes(folder: Path, count: int = 4) -> Path:
    for i in range(count):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (folder / "ab"[i % 2] / f"{i}.png").write_bytes(an_image(40 + i, 30, i))
    return folder


def shards(folder: Path) -> Path:
    members = [(f"{i}.{s}", d) for i in range(4) for s, d in (("png", an_image(40 + i)), ("txt", b"caption %d" % i))]
    write_tar(folder / "0.tar", members[:4])
    write_tar(folder / "1.tar", members[4:])
    return folder


def shard(path: Path) -> Path:
    members = [(f"{i}.{s}", d) for i in range(4) for s, d in (("png", an_image(40 + i)), ("txt", b"caption %d" % i))]
    return write_tar(path, members)


KINDS = [captioned, paired, classes, shards, shard]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_path_and_times_make_no_difference(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make(tmp_path / "here")
    source = as_files(here)
    there = tmp_path / "elsewhere" / "there"
    there.parent.mkdir()
    shutil.copytree(here, there) if here.is_dir() else shutil.copy(here, there)
    for path in [there, *there.rglob("*")]:
        os.utime(path, (1e9, 1e9))
    (tmp_path / "link").symlink_to(here)
    monkeypatch.chdir(tmp_path)
    slash = "/" if here.is_dir() else ""
    for name in (str(there), str(tmp_path / "link"), "here", f"./here{slash}", f"{here}{slash}", "elsewhere/../here"):
        other = as_files(name)
        assert other.fingerprint == source.fingerprint
        assert [other.key(i) for i in range(len(other))] == [source.key(i) for i in range(len(source))]


@pytest.mark.parametrize("make", [captioned, paired, classes, shards], ids=lambda make: make.__name__)
def test_bystanders_make_no_difference(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "set")
    first = as_files(folder).fingerprint
    for name in ("contact-sheet.png", "README.md", "LICENSE", "notes.txt", ".DS_Store", "bad_files.jsonl"):
        (folder / name).write_bytes(an_image(500, 500) if name.endswith("png") else b"about")
        assert as_files(folder).fingerprint == first, name


@pytest.mark.parametrize("make", [captioned, paired, classes, shards], ids=lambda make: make.__name__)
def test_bystanders_are_no_bad_files(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "set")
    for name in ("contact-sheet.png", "stray.JPG", "README.md", "notes.txt", ".DS_Store"):
        (folder / name).write_bytes(an_image(500, 500) if name.lower().endswith(("png", "jpg")) else b"about")
    listed = tmp_path / "bad.jsonl"
    for _ in range(2):
        assert len(BadFiles([as_files(folder)], 0.0, listed)) == 0
    account = account_of([as_files(folder)], square(1))
    assert (account.seen, account.total, account.line()) == (4, 6, "sees 4 of 6 images: 2 passed over")
    files = [json.loads(line)["file"] for line in listed.read_text().splitlines()] if listed.exists() else []
    expected = {paired: ["contact-sheet.png", "notes.txt", "stray.JPG"], classes: ["contact-sheet.png", "stray.JPG"]}
    assert sorted(files) == expected.get(make, [])


def test_a_folder_in_which_most_images_have_no_caption_is_refused(tmp_path: Path) -> None:
    folder = paired(tmp_path / "set")
    for i in range(5):
        assert len(as_files(folder)) == 4
        (folder / f"x{i}.png").write_bytes(an_image())
    with pytest.raises(UserError, match=r"set: 5 images have no caption \(such as x0.png\) and 4 have one: caption"):
        as_files(folder)


@pytest.mark.parametrize("at", [0, END - 1, END, -END - 1, -END, -1])
def test_both_ends_of_an_image_count(at: int, tmp_path: Path) -> None:
    folder = paired(tmp_path / "set")
    long = an_image() + bytes(4 * END)
    (folder / "0.png").write_bytes(long)
    first = as_files(folder).fingerprint
    spot = at % len(long)
    (folder / "0.png").write_bytes(long[:spot] + bytes([long[spot] ^ 1]) + long[spot + 1 :])
    if at:  # the very first byte is the format's mark
        assert (as_files(folder).fingerprint != first) == (not END <= spot < len(long) - END)
    (folder / "0.png").write_bytes(long + b"\0")
    assert as_files(folder).fingerprint != first


def change(folder: Path, how: str) -> None:
    if how == "gone":
        (folder / "1.png").unlink()
    elif how == "new":
        shutil.copy(folder / "0.png", folder / "9.png")
        shutil.copy(folder / "0.txt", folder / "9.txt")
    elif how == "renamed":
        for suffix in ("png", "txt"):
            (folder / f"1.{suffix}").rename(folder / f"7.{suffix}")
    elif how == "caption":
        (folder / "2.txt").write_text("another")
    elif how == "image":
        (folder / "2.png").write_bytes(an_image(41, 30, 7))
    elif how == "two":
        for i in (0, 3):
            (folder / f"{i}.txt").write_text("another")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("gone", "1 file is gone (1.png)"),
        ("new", "1 file is new (9.png)"),
        ("renamed", "1 file is gone (1.png), 1 file is new (7.png)"),
        ("caption", "1 file has changed (2.png)"),
        ("image", "1 file has changed (2.png)"),
        ("two", "2 files have changed (first 0.png)"),
    ],
)
def test_what_differs_is_named(how: str, words: str, tmp_path: Path) -> None:
    folder = paired(tmp_path / "set")
    first = as_files(folder)
    write_samples(tmp_path / "kept", first)
    change(folder, how)
    second = as_files(folder)
    assert second.fingerprint != first.fingerprint
    assert differences(tmp_path / "kept", first.fingerprint, second) == words


def test_what_differs_in_lines_of_one_image_is_named(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i // 2}.png", "text": f"caption {i}"} for i in range(6)]
    folder = captioned(tmp_path / "set")
    write_metadata(folder, rows)
    first = as_files(folder)
    write_samples(tmp_path / "kept", first)
    for rows_now, words in (
        (rows[:3] + rows[4:], "1 file has changed (1.png)"),
        (rows[::-1], "the same samples stand in another order"),
        ([*rows, {"file_name": "3.png", "text": "x"}], "1 file is new (3.png)"),
        ([*rows, {"file_name": "2.png", "text": "x"}], "1 file has changed (2.png)"),
    ):
        now = as_files(write_metadata(folder, rows_now))
        assert differences(tmp_path / "kept", first.fingerprint, now) == words
        assert differences(tmp_path / "nowhere", first.fingerprint, now) == ""
    (kept,) = (tmp_path / "kept").iterdir()
    whole = kept.read_bytes()
    for damaged in (whole[:-20], b"junk", whole[:-40] + b"\xff" * 20 + whole[-20:]):
        kept.write_bytes(damaged)
        assert differences(tmp_path / "kept", first.fingerprint, now) == ""
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        file.writelines("\n" + json.dumps(dict(reversed(row.items())), indent=None) + " \n" for row in rows)
    assert as_files(folder).fingerprint == first.fingerprint  # the same captions, written otherwise


def test_of_too_many_samples_no_list_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = as_files(paired(tmp_path / "set"))
    monkeypatch.setattr(identity, "MOST_LISTED", 3)
    write_samples(tmp_path / "kept", first)
    assert not list((tmp_path / "kept").glob("*")) and differences(tmp_path / "kept", first.fingerprint, first) == ""
    monkeypatch.setattr(identity, "MOST_LISTED", 4)
    write_samples(tmp_path / "kept", first)
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_labels_count_though_their_folder_is_all_bad(tmp_path: Path) -> None:
    folder = classes(tmp_path / "set")
    (folder / "aa").mkdir()
    (folder / "aa" / "x.png").write_bytes(b"no image")
    first = as_files(folder)
    (folder / "aa" / "x.png").unlink()
    assert [first.text(3), as_files(folder).text(3)] == ["2", "1"]
    assert as_files(folder).fingerprint != first.fingerprint


def test_bad_files_that_are_removed_count_no_longer(tmp_path: Path) -> None:
    folder = paired(tmp_path / "set")
    (folder / "0.png").write_bytes(b"no image")
    listed = tmp_path / "bad.jsonl"
    bad = BadFiles([as_files(folder)], 1.0, listed)
    bad.add(0, [BadFile("3.png", "torn")])
    assert [len(bad), len(BadFiles([as_files(folder)], 1.0, listed))] == [2, 2]
    for suffix in ("png", "txt"):
        (folder / f"0.{suffix}").unlink()
    assert len(BadFiles([as_files(folder)], 0.0, listed)) == 0
    assert listed.read_text() == ""


def test_a_stray_that_is_removed_leaves_the_list(tmp_path: Path) -> None:
    folder, listed = paired(tmp_path / "set"), tmp_path / "bad.jsonl"
    (folder / "stray.png").write_bytes(an_image())
    BadFiles([as_files(folder)], 1.0, listed)
    assert json.loads(listed.read_text())["file"] == "stray.png"
    (folder / "stray.png").unlink()
    BadFiles([as_files(folder)], 1.0, listed)
    assert listed.read_text() == ""


def test_a_list_of_bad_files_is_known_again_after_a_move(tmp_path: Path) -> None:
    folder, listed = paired(tmp_path / "set"), tmp_path / "bad.jsonl"
    BadFiles([as_files(folder)], 1.0, listed).add(0, [BadFile("3.png", "torn")])
    moved = BadFiles([as_files(folder.rename(tmp_path / "moved"))], 1.0, listed)
    moved.add(0, [BadFile("3.png", "torn")])
    assert len(moved) == len(listed.read_text().splitlines()) == 1
