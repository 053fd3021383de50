"""State on disk: written whole or not at all; a damaged file is one line that names it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from pixelgrow.errors import UserError
from pixelgrow.training import state

TENSORS = {"a": torch.arange(1000.0), "b": torch.ones(3, 4, dtype=torch.bfloat16).t()}


def test_round_trip_and_what_is_kept(tmp_path: Path) -> None:
    assert state.load(tmp_path) is None
    for images in (100, 200, 300):
        state.save(tmp_path, images, TENSORS, {"images": images, "x": 0.1})
    found = state.load(tmp_path)
    assert found is not None
    assert found.counters == {"images": 300, "x": 0.1}
    assert all(torch.equal(found.read()[n], t) for n, t in TENSORS.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{200:012d}", f"{300:012d}"]
    state.save(tmp_path, 300, TENSORS, {"images": 301})
    found = state.load(tmp_path)
    assert found is not None
    assert found.counters == {"images": 301}
    state.clear(tmp_path)
    assert state.load(tmp_path) is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty, Path.unlink])
def test_damaged_tensors_are_named_in_one_line(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    state.save(tmp_path, 1, TENSORS, {"n": 1})
    state.save(tmp_path, 2, TENSORS, {"n": 2})
    file = tmp_path / f"{2:012d}" / "state.safetensors"
    damage(file)
    with pytest.raises(UserError) as error:
        state.load(tmp_path)
    text = str(error.value)
    assert str(file) in text
    assert "\n" not in text
    assert f"delete the folder {file.parent} to resume from 1 images" in text
    file.with_name("state.json").unlink(missing_ok=True)
    file.unlink(missing_ok=True)
    file.parent.rmdir()
    found = state.load(tmp_path)
    assert found is not None
    assert found.counters == {"n": 1}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 9}', b"\xff\xfe"])
def test_damaged_counters_are_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    state.save(tmp_path, 5, TENSORS, {})
    file = tmp_path / f"{5:012d}" / "state.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match="to start this stage again") as error:
        state.load(tmp_path)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_leftovers_of_a_cut_off_save_are_removed(tmp_path: Path) -> None:
    state.save(tmp_path, 5, TENSORS, {"n": 5})
    (tmp_path / ".9.part").mkdir()
    (tmp_path / ".9.part" / "state.safetensors").write_bytes(b"half")
    found = state.load(tmp_path)
    assert found is not None
    assert found.counters == {"n": 5}
    assert [p.name for p in tmp_path.iterdir()] == [f"{5:012d}"]


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize("where", ["save_file", "flush"])
def test_a_full_disk_is_one_line_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    state.save(tmp_path, 1, TENSORS, {"n": 1})

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(state, where, full)
    with pytest.raises(UserError, match=r"cannot write .*2: No space left on device; make room there"):
        state.save(tmp_path, 2, TENSORS, {"n": 2})
    assert [p.name for p in tmp_path.iterdir()] == [f"{1:012d}"]


def test_an_old_state_that_cannot_be_deleted_is_one_line_and_the_new_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(_: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(state, "_discard", busy)
    with pytest.raises(UserError, match="Device or resource busy; check the disk"):
        for images in (1, 2, 3):
            state.save(tmp_path, images, TENSORS, {"n": images})
    found = state.load(tmp_path)
    assert found is not None
    assert found.counters == {"n": 3}


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        state.save(tmp_path / "file" / "state", 1, TENSORS, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        state.save(tmp_path / "state", 1, TENSORS, {})
    tmp_path.chmod(0o700)
