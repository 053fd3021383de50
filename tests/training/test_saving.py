"""States in parts, and the thread that writes them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelgrow.distributed import Team, parts
from pixelgrow.errors import UserError
from pixelgrow.training import state
from pixelgrow.training.saving import Saver
from training.test_state import cut, flip

WHOLE = {"w": torch.arange(15.0).view(5, 3), "half": torch.ones(4, dtype=torch.bfloat16), "step": torch.tensor(7.0)}


def write_parts(folder: Path, images: int) -> None:
    """As two processes write a state: `w` is cut between them, unevenly, and each writes one of the others."""
    state.begin(folder, images)
    files: state.Files = {}
    for rank, (name, begin) in enumerate((("half", 0), ("step", 3))):
        tensors = {"w": WHOLE["w"][begin : begin + 3], name: WHOLE[name]}
        header = parts.header({"w": [begin, 0], name: [0] * WHOLE[name].dim()})
        files |= state.write(folder, images, f"{rank:05d}.safetensors", tensors, header)
    state.commit(folder, images, files, {"n": images})


def test_parts_are_read_as_the_whole(tmp_path: Path) -> None:
    for images in (1, 2, 3):
        write_parts(tmp_path, images)
    found = state.load(tmp_path)
    assert found is not None
    assert found.counters == {"n": 3}
    assert not state.odd(found.tensors, WHOLE)
    read = found.read()
    assert read.keys() == WHOLE.keys() and all(t.equal(WHOLE[n]) for n, t in read.items())
    assert found.read("w", "st").keys() == {"w", "step"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{2:012d}", f"{3:012d}"]


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_each_process_checks_its_share_and_names_a_damaged_part_in_one_line(tmp_path: Path, damage: Any) -> None:
    write_parts(tmp_path, 1)
    write_parts(tmp_path, 2)
    file = tmp_path / f"{2:012d}" / "00001.safetensors"
    damage(file)
    assert state.find(tmp_path, Team(0, 2)) is not None
    for team in (Team(), Team(1, 2)):
        with pytest.raises(UserError, match=f"delete the folder {file.parent} to resume from 1 images") as error:
            state.find(tmp_path, team)
        assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_what_all_have_is_written_once_and_by_each_as_much() -> None:
    tensors = {f"{slot}/{n}": torch.empty(n, 4) for slot in ("weights", "mean", "square") for n in (1, 2, 64)}
    shares = [parts.share(tensors, Team(rank, 3)) for rank in range(3)]
    assert sorted(n for share in shares for n in share) == sorted(tensors)
    assert {sum(tensors[n].numel() for n in share) for share in shares} == {4 * 67}


def test_a_state_is_copied_and_the_next_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, done, save = threading.Event(), [], state.save

    def slow(folder: Path, images: int, *rest: Any) -> None:
        assert go.wait(20)
        save(folder, images, *rest)
        done.append(images)

    monkeypatch.setattr(state, "save", slow)
    saver, weights = Saver(tmp_path, Team(), sharded=False), torch.zeros(3)
    saver.start(8, {"w": weights}, {})
    weights += 1
    assert saver.writing and not done
    threading.Timer(0.05, go.set).start()
    saver.start(16, {"w": weights}, {})
    assert done[0] == 8
    saver.finish()
    assert done == [8, 16] and not saver.writing
    assert [_read(tmp_path / f"{n:012d}")["w"].tolist() for n in (8, 16)] == [[0.0] * 3, [1.0] * 3]


def _read(folder: Path) -> dict[str, Tensor]:
    return state.State(folder, {}, "").read()


def test_an_error_of_the_writing_is_raised_once_and_the_state_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(tmp_path, Team(), sharded=False)
    saver.start(8, WHOLE, {})
    saver.finish()
    monkeypatch.setattr(state, "flush", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    saver.start(16, WHOLE, {})
    with pytest.raises(UserError, match="No space left on device; make room there"):
        saver.finish()
    saver.finish()
    saver.close()
    assert not caplog.records
    saver = Saver(tmp_path, Team(), sharded=False)
    saver.start(24, WHOLE, {})
    saver.close()  # as another error ends the training
    assert "No space left on device" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == [f"{8:012d}"]


class Elsewhere(Team):
    """The second of two processes, on another machine: what the first one does is not seen here."""

    def alone(self, work: Callable[[], Any]) -> Any:
        return None

    def tell(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [True, value]


class Beside(Elsewhere):
    """The second of two processes, on the machine of the first."""

    def alone(self, work: Callable[[], Any]) -> Any:
        return work()


def test_processes_without_a_common_folder_are_told_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not one folder for all processes \(not for 1\): put the run on a common"):
        state.check_common(tmp_path / "state", Elsewhere(1, 2))
    state.check_common(tmp_path / "state", Beside(1, 2))
    first = tmp_path / "first"
    state.check_common(first, Beside(0, 2))
    assert not list(first.iterdir())
