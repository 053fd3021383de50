"""The index on the disk: the same as a scan, read in place, kept up to date, and never silently wrong."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data.test_sources import an_image, as_files, captioned, passed, reasons, write_tar
from pixelgrow.data import Loader, heldout_split
from pixelgrow.data.sources import keeping, shards
from pixelgrow.data.sources.base import least_hashes, least_of
from pixelgrow.data.sources.index import FileSource
from pixelgrow.data.sources.keeping import FOLDER
from pixelgrow.data.sources.selection import CHUNK, Selection, chunks
from pixelgrow.data.sources.shards import Shard, scan_shard
from pixelgrow.data.sources.stored import Damaged, Journal, Stored
from pixelgrow.errors import UserError

ROOT = Path(__file__).parents[2]
OLD = 1_600_000_000  # a time of change that a scan relies on


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are scanned, as they are."""
    names: list[str] = []

    def noted(shard: Shard) -> shards.Part:
        names.append(shard.label)
        return scan_shard(shard)

    monkeypatch.setattr(keeping, "scan_shard", noted)
    return names


def write(path: Path, count: int = 3, first: int = 0, changed: int = OLD, words: str = "number") -> Path:
    members = []
    for i in range(first, first + count):
        members += [(f"{i:03}.png", an_image(40 + i, 30, i)), (f"{i:03}.txt", f"{words} {i}".encode())]
    write_tar(path, members)
    os.utime(path, (changed, changed))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of three samples, one with a bad one, and something beside them."""
    for number in range(3):
        write(tmp_path / "set" / f"{number}.tar", first=3 * number)
    bad = [("x.png", b"no image"), ("x.txt", b"x"), ("two.png", an_image()), ("two.txt", b"one\ntwo"), ("c.npy", b"")]
    write_tar(tmp_path / "set" / "3.tar", [*bad, ("left.png", an_image())])
    os.utime(tmp_path / "set" / "3.tar", (OLD, OLD))
    return tmp_path / "set"


def all_of(source: FileSource) -> dict[str, object]:
    numbers = range(len(source))
    return {
        "samples": [(source.key(i), source.wordings(i), source.size(i), source.read(i)) for i in numbers],
        "columns": [source.sizes.tolist(), source.prints.tolist(), source.clears(slice(0, len(source))).tolist()],
        "bad": [source.bad, source.strays, source.passed, source.notes, source.files, source.several],
        "fingerprint": source.fingerprint,
        "keys": list(source.keys()),
    }


def test_a_kept_index_is_what_the_scan_found(folder: Path, scanned: list[str]) -> None:
    first = as_files(folder)
    assert scanned == ["0.tar", "1.tar", "2.tar", "3.tar"]
    found = all_of(first)
    assert all_of(as_files(folder)) == found and len(scanned) == 4
    assert reasons(first).keys() == {"3.tar/x.png", "3.tar/left.png"}
    assert passed(first)["neither image nor caption"] == (1, "3.tar/c.npy")
    assert dict(first.notes) == {"caption files of several lines, each a caption": 1} and first.several
    assert sorted(path.name for path in (folder / FOLDER).iterdir()) == ["shards.index", "shards.index.lock"]
    other = folder.rename(folder.with_name("moved"))
    assert all_of(as_files(other)) == found and len(scanned) == 4


def test_an_index_is_plain_arrays(folder: Path) -> None:
    source = as_files(folder)
    from safetensors import safe_open

    with safe_open(folder / FOLDER / "shards.index", framework="numpy") as file:
        assert file.get_tensor("sizes").tolist() == source.sizes.tolist()
        assert file.get_tensor("prints").tolist() == source.prints.tolist()


@pytest.mark.parametrize("how", ["content", "added", "removed", "time", "first"])
def test_only_shards_that_changed_are_scanned_again(folder: Path, how: str, scanned: list[str]) -> None:
    before = as_files(folder).fingerprint
    scanned.clear()
    if how == "content":
        write(folder / "1.tar", 40, 3)
    elif how == "added":
        write(folder / "15.tar", 2, 50)  # between two others
    elif how == "removed":
        (folder / "1.tar").unlink()
    elif how == "time":
        write(folder / "1.tar", 3, 3, OLD + 1, words="letter")  # of the same size
    else:
        write(folder / "!.tar", 1, 60)
    again = as_files(folder)
    expected = {"content": ["1.tar"], "added": ["15.tar"], "removed": [], "time": ["1.tar"], "first": ["!.tar"]}
    assert scanned == expected[how]
    found = all_of(again)
    assert again.fingerprint != before
    (folder / FOLDER / "shards.index").unlink()
    assert all_of(as_files(folder)) == found  # as a scan of all has it
    assert all_of(as_files(folder)) == found


def test_a_shard_that_was_written_just_before_its_scan_is_scanned_once_more(folder: Path, scanned: list[str]) -> None:
    now = int((folder / "0.tar").stat().st_ctime)
    os.utime(folder / "1.tar", (now, now))
    written = []
    for _ in range(2):
        as_files(folder)
        written.append((folder / FOLDER / "shards.index").stat().st_ino)
    assert scanned == ["0.tar", "1.tar", "2.tar", "3.tar", "1.tar"]
    assert written[0] == written[1]  # it was the same


def test_a_scan_that_was_interrupted_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def breaks(shard: Shard) -> shards.Part:
        if len(names) == 2:
            raise KeyboardInterrupt
        names.append(shard.label)
        return scan_shard(shard)

    monkeypatch.setattr(keeping, "scan_shard", breaks)
    with pytest.raises(KeyboardInterrupt):
        as_files(folder)
    journal = folder / FOLDER / "shards.index.journal"
    with journal.open("ab") as file:  # a part that was not written whole, as a kill leaves it
        file.write(journal.read_bytes()[:100])
    monkeypatch.setattr(keeping, "scan_shard", lambda shard: names.append(shard.label) or scan_shard(shard))
    found = all_of(as_files(folder))
    assert names == ["0.tar", "1.tar", "2.tar", "3.tar"] and not journal.exists()
    (folder / FOLDER / "shards.index").unlink()
    assert all_of(as_files(folder)) == found


def test_a_damaged_journal_is_used_as_far_as_it_is_whole(folder: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    for number in range(3):
        journal.add(scan_shard(Shard(os.fsencode(folder / f"{number}.tar"), b"%d.tar" % number)))
    second = journal.found[b"1.tar"].spans[-1][0]
    journal.close()
    raw = bytearray((tmp_path / "journal").read_bytes())
    raw[second] ^= 1
    (tmp_path / "journal").write_bytes(raw)
    again = Journal(tmp_path / "journal")
    assert list(again.found) == [b"0.tar"]
    again.close()


def test_shards_are_scanned_by_several_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = all_of(as_files(folder))
    (folder / FOLDER / "shards.index").unlink()
    monkeypatch.setattr(keeping, "_ALONE", 0)
    monkeypatch.setattr(keeping.os, "sched_getaffinity", lambda pid: {0, 1})
    assert all_of(as_files(folder)) == found
    (folder / "2.tar").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"2\.tar: a zip archive; expected a plain \.tar"):
        as_files(folder)


def test_who_starts_while_another_scans_waits_and_takes_its_index(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names, begun, go_on = list[str](), threading.Event(), threading.Event()

    def slow(shard: Shard) -> shards.Part:
        names.append(shard.label)
        begun.set()
        assert go_on.wait(20)
        return scan_shard(shard)

    monkeypatch.setattr(keeping, "scan_shard", slow)
    found: list[FileSource] = []
    first, second = (threading.Thread(target=lambda: found.append(as_files(folder))) for _ in range(2))
    with caplog.at_level(logging.INFO):
        first.start()
        assert begun.wait(20)
        second.start()
        while "waiting for another process" not in caplog.text:
            assert second.is_alive()
            time.sleep(0.01)
        go_on.set()
        first.join()
        second.join()
    assert names == ["0.tar", "1.tar", "2.tar", "3.tar"]
    assert all_of(found[0]) == all_of(found[1])


def forbid(monkeypatch: pytest.MonkeyPatch, *places: Path, number: int = errno.EROFS) -> None:
    """Nothing can be made in some folders, as on a disk that is read-only: also for root."""
    mkdir = Path.mkdir

    def refused(self: Path, *args: object, **kwargs: object) -> None:
        if any(self.is_relative_to(place) for place in places):
            raise OSError(number, os.strerror(number), str(self))
        mkdir(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refused)


def test_where_the_folder_is_read_only_the_index_is_in_the_cache(
    folder: Path, tmp_path: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forbid(monkeypatch, folder)
    with caplog.at_level(logging.INFO):
        found = all_of(as_files(folder))
    assert "its index goes elsewhere: cannot write" in caplog.text and "Read-only file system" in caplog.text
    assert len(list((tmp_path / "cache").rglob("shards.index"))) == 1 and not (folder / FOLDER).exists()
    assert all_of(as_files(folder)) == found and len(scanned) == 4


def test_where_nothing_can_be_kept_every_start_scans(
    folder: Path, tmp_path: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forbid(monkeypatch, folder, tmp_path / "cache")
    monkeypatch.setattr(keeping.tempfile, "tempdir", str(tmp_path))
    caplog.set_level(logging.INFO)
    for _ in range(2):
        source = as_files(folder)
        assert source.text(0) == "number 0"
        assert "can be written nowhere" in caplog.text
    assert len(scanned) == 8
    del source
    gc.collect()
    assert not list(tmp_path.glob("pixelgrow-*"))


def test_a_disk_that_fills_up_loses_nothing(
    folder: Path, tmp_path: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add, left = Journal.add, iter([True, True, False])

    def fills(self: Journal, part: shards.Part) -> object:
        if self.path.is_relative_to(folder) and not next(left):
            with keeping.writing(self.path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return add(self, part)

    monkeypatch.setattr(Journal, "add", fills)
    found = all_of(as_files(folder))
    assert scanned == ["0.tar", "1.tar", "2.tar", "2.tar", "3.tar"]  # the third could not be kept there
    assert all_of(as_files(folder)) == found and len(scanned) == 5
    assert not (folder / FOLDER / "shards.index").exists()


def test_a_damaged_index_is_written_anew_or_one_line(folder: Path, scanned: list[str]) -> None:
    """Each byte of it, one after the other: what a scan found, or one line, or no index at all."""
    found, place = all_of(as_files(folder)), folder / FOLDER / "shards.index"
    whole, told, lines = place.read_bytes(), dict[str, int](), list[str]()
    for at in range(0, len(whole), 7):
        place.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            index = Stored(place)
        except Damaged:
            told["not opened"] = told.get("not opened", 0) + 1
            continue
        try:
            rows = [index.row(i) for i in range(len(index))]
            prints = index.prints
        except UserError as error:
            lines.append(str(error))
            continue
        assert [row.key for row in rows] == found["keys"] and len(prints) == len(rows)
        told["padding"] = told.get("padding", 0) + 1
    assert told["not opened"] > 100 and len(lines) > 50 and told.get("padding", 0) < 20
    assert all("the index is damaged" in line and "\n" not in line for line in lines)
    for cut in (0, 8, 100, len(whole) // 2, len(whole) - 1):
        place.write_bytes(whole[:cut])
        scanned.clear()
        assert all_of(as_files(folder)) == found and len(scanned) == 4


def test_an_index_of_another_version_is_written_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = all_of(as_files(folder))
    monkeypatch.setattr("pixelgrow.data.sources.stored.FORM", "pixelgrow index 0")
    with pytest.raises(Damaged, match="another version"):
        Stored(folder / FOLDER / "shards.index")
    assert all_of(as_files(folder)) == found


def test_what_changes_in_the_midst_of_a_run(folder: Path) -> None:
    source = as_files(folder)
    os.utime(folder / "1.tar")  # touched: the same images
    assert source.read(3) == an_image(43, 30, 3)
    write(folder / "1.tar", 3, 3, OLD + 1, "letters")  # other captions: those of the index count
    assert source.text(3) == "number 3"
    write(folder / "1.tar", 3, 4, OLD + 2)
    with pytest.raises(
        UserError, match=r"1\.tar: changed since the run began \(another image in the place of 1\.tar/0"
    ):
        source.read(3)
    assert source.read(0) == an_image(40, 30, 0)


def test_an_index_travels_to_another_process(folder: Path) -> None:
    source = as_files(folder)
    sent = pickle.dumps(source)
    assert all_of(pickle.loads(sent)) == all_of(source)  # noqa: S301
    write(folder / "9.tar", 1)
    as_files(folder)
    with pytest.raises(UserError, match="another index"):
        pickle.loads(sent)  # noqa: S301
    assert source.key(0) == "0.tar/000.png"  # what is open stays


def test_kept_hashes_make_the_same_split(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, other = as_files(folder), as_files(captioned(folder.with_name("plain"), 9))
    expected = heldout_split(source, 0.4, seed=3, at_least=1)[1].indices
    monkeypatch.setattr(keeping, "_KEPT", 4)
    with caplog.at_level(logging.INFO):
        for count, hashed in ((4, 1), (4, 0), (5, 0), (9, 1)):
            caplog.clear()
            hashes, numbers = least_of(source, 3, count)
            assert caplog.text.count("hashing 10 keys") == hashed
            full = least_hashes(source.keys(), 3, 10)
            assert (hashes == full[0][: len(hashes)]).all() and (numbers == full[1][: len(numbers)]).all()
    assert (heldout_split(source, 0.4, seed=3, at_least=1)[1].indices == expected).all()
    (kept,) = (folder / FOLDER).glob("*.keys")
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    assert (heldout_split(source, 0.4, seed=3, at_least=1)[1].indices == expected).all()
    write(folder / "9.tar", 1)
    as_files(folder)
    assert not list((folder / FOLDER).glob("*.keys"))
    assert len(least_of(other, 0, 2)[0]) == 2


def test_the_least_hashes_are_those_of_a_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"{i // 2}.png" for i in range(400)]
    monkeypatch.setattr("pixelgrow.data.sources.base.CHUNK", 64)
    all_hashes, all_numbers = least_hashes(iter(keys), 7, 1000)
    assert len(all_hashes) == 400 and (np.diff(all_hashes.astype(object)) >= 0).all()
    for count in (1, 2, 33, 399):
        hashes, numbers = least_hashes(iter(keys), 7, count)
        assert len(hashes) == count + count % 2  # both captions of an image
        assert (hashes == all_hashes[: len(hashes)]).all() and (numbers == all_numbers[: len(numbers)]).all()


@pytest.mark.parametrize("total", [1, 511, 512, 513, 100_000, CHUNK + 5])
def test_a_selection_is_an_array(total: int) -> None:
    random = np.random.default_rng(total)
    mask = random.random(total) < 0.3
    mask[0] = True
    chosen, expected = Selection(total, (mask[part] for part in chunks(total))), np.flatnonzero(mask)
    assert len(chosen) == len(expected) and np.array_equal(np.asarray(chosen), expected)
    assert list(itertools.islice(chosen, 50)) == expected[:50].tolist()
    for place in [0, -1, len(expected) // 2, *random.integers(0, len(expected), 30).tolist()]:
        assert chosen[place] == expected[place]
    for _ in range(30):
        a, b = sorted(random.integers(0, len(expected) + 1, 2).tolist())
        assert np.array_equal(chosen[a:b], expected[a:b])
    assert all((number in chosen) == mask[number] for number in random.integers(0, total, 50).tolist())
    assert total not in chosen and -1 not in chosen
    assert all(np.array_equal(chosen.mask(part), mask[part]) for part in chunks(total))
    rest = Selection.but(total, expected)
    assert np.array_equal(np.asarray(rest), np.flatnonzero(~mask))
    with pytest.raises(IndexError):
        chosen[len(expected)]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of a million samples in 250 shards."""
    folder = tmp_path_factory.mktemp("many") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from bench.index import write_index

        write_index(folder, 250_000, 250)
    return folder


def test_many_samples_open_at_once_in_little_memory(many: Path) -> None:
    command = [sys.executable, "-m", "bench.index", "--workers", "1", "--measure", str(many)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    found = json.loads(done.stdout)
    assert found["samples"] == 250_000 and found["held out"] == 5_000
    # 8 bytes a sample, of sizes or numbers, would be 100 MB of 12.4 million; what does not grow with them is left out.
    assert found["grown at most, MB"] < 40
    assert found["largest worker for itself, MB"] < 40


def test_a_loader_keeps_no_number_a_sample(many: Path) -> None:
    source = as_files(many)
    train, held = heldout_split(source)
    loader = Loader(train, size=(64, 64), batch=2)
    assert len(train) + len(held) == len(source) == 250_000 and len(loader) == len(train)
    held_out = set(held.indices.tolist())
    assert not any(train.indices[place] in held_out for place in range(0, len(train), 997))
    first = loader.load(123_456)
    assert np.array_equal(loader.load(123_456).image, first.image)
    kept = sum(part.nbytes for part in (train.indices._bits, loader.usable[0]._bits))  # type: ignore[union-attr]
    assert kept < 2 * 250_000 / 8 + 200
