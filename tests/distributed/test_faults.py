"""What ends one process ends all of them within a step, with everything saved and one message; then it goes on."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import processes
from conftest import CliResult
from processes import run_team
from runs import WEIGHTS, class_images, record

IMAGES = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_images(tmp_path_factory.mktemp("data"))


def recipe(folder: Path, data: Path, **changes: Any) -> Path:
    """A recipe that trains on two classes of images, in `folder`."""
    stage = {"name": "core", "size": "tiny", "resolution": 16, "images": IMAGES, "batch": 8, "accumulate": 2}
    stage |= {"save_every": 16, "log_every": 8, "sample_every": 0, "validate_every": 0, "snapshot_every": 0}
    path = folder / "c.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    stages = [{"train": stage | changes}]
    path.write_text(json.dumps({"name": "c", "text": {"classes": 2}, "data": {"source": str(data)}, "stages": stages}))
    return path


def go(folder: Path, recipe: Path, size: int = 2, prepare: processes.Prepare | None = None) -> list[CliResult]:
    return run_team(folder / "said", "run", recipe, "--runs", folder, size=size, prepare=prepare)


def message(ended: list[CliResult]) -> str:
    """The one line that all processes together end with."""
    lines = [line for result in ended for line in result.err.splitlines() if line.startswith("pixelgrow: ")]
    assert len(lines) == 1, lines
    assert not any("Traceback" in result.err for result in ended)
    return lines[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> bytes:
    """The weights of one process that nothing disturbs."""
    root = tmp_path_factory.mktemp("whole")
    (result,) = go(root, recipe(root, data), size=1)
    assert result.code == 0, result.err
    return (root / "c" / "core" / WEIGHTS).read_bytes()


def test_sigterm_to_one_process_saves_and_stops_all_of_them(tmp_path: Path, data: Path, whole: bytes) -> None:
    path = recipe(tmp_path, data, save_every=1000)
    ended = go(tmp_path, path, prepare=partial(processes.at_step, processes.terminated, 8, 1))
    assert [r.code for r in ended] == [128 + signal.SIGTERM] * 2
    assert message(ended).endswith("stopped by SIGTERM, saved at 16 images: run the same command again to go on")
    shutil.copytree(tmp_path / "c", tmp_path / "one" / "c")
    for folder, size in ((tmp_path, 2), (tmp_path / "one", 1)):  # one process goes on where two stopped
        assert [r.code for r in go(folder, path, size)] == [0] * size
        assert (folder / "c" / "core" / WEIGHTS).read_bytes() == whole


def test_two_processes_go_on_where_one_was_stopped(tmp_path: Path, data: Path, whole: bytes) -> None:
    path = recipe(tmp_path, data)
    (ended,) = go(tmp_path, path, 1, prepare=partial(processes.at_step, processes.terminated, 8, 0))
    assert ended.code == 128 + signal.SIGTERM
    assert [r.code for r in go(tmp_path, path)] == [0, 0]
    assert (tmp_path / "c" / "core" / WEIGHTS).read_bytes() == whole


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(
    rank: int, tmp_path: Path, data: Path, whole: bytes
) -> None:
    path = recipe(tmp_path, data)
    ended = go(tmp_path, path, prepare=partial(processes.at_step, processes.killed, 24, rank))
    assert [r.code for r in ended][rank] == -signal.SIGKILL
    assert [r.code for r in ended][1 - rank] == 2
    if rank:  # the first process holds what all share; torchrun holds it elsewhere
        assert message(ended) == "pixelgrow: another process of this run has ended: run the same command again to go on"
    assert [p.name for p in (tmp_path / "c" / "core" / "state").glob("0*")] == [f"{16:012d}"]
    assert [r.code for r in go(tmp_path, path)] == [0, 0]
    assert (tmp_path / "c" / "core" / WEIGHTS).read_bytes() == whole


@pytest.mark.parametrize("fault", [processes.all_killed, processes.killed_in_save])
def test_a_run_goes_on_from_the_state_before_a_kill(
    fault: Callable[[int, int], None], tmp_path: Path, data: Path, whole: bytes
) -> None:
    path = recipe(tmp_path, data, save_every=8)
    ended = go(tmp_path, path, prepare=partial(fault, 24))
    assert ended[0].code == -signal.SIGKILL and ended[1].code in (-signal.SIGKILL, 2)
    kept = 24 if fault is processes.all_killed else 16
    assert max(p.name for p in (tmp_path / "c" / "core" / "state").glob("0*")) == f"{kept:012d}"
    assert [r.code for r in go(tmp_path, path)] == [0, 0]
    assert (tmp_path / "c" / "core" / WEIGHTS).read_bytes() == whole


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(tmp_path: Path, data: Path) -> None:
    made = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        ended = go(folder, recipe(folder, data), size, partial(processes.not_finite, 12, 13))
        assert [r.code for r in ended] == [0] * size
        assert [r.err.count("skipped step 2") for r in ended] == [1, 0][:size]
        assert "noise level" in ended[0].err and "loss nan" in ended[0].err
        assert record(folder / "c" / "core")["result"]["skipped_steps"] == 1
        made.append((folder / "c" / "core" / WEIGHTS).read_bytes())
    assert made[0] == made[1]


def test_too_many_steps_that_are_not_finite_end_all_with_a_result(tmp_path: Path, data: Path) -> None:
    path = recipe(tmp_path, data, max_bad_steps=2)
    ended = go(tmp_path, path, prepare=partial(processes.not_finite, 20, 99))
    assert [r.code for r in ended] == [2, 2]
    assert "not finite 2 times in a row" in message(ended)
    assert (tmp_path / "c" / "core" / WEIGHTS).is_file()
    assert [p.name for p in (tmp_path / "c" / "core" / "state").glob("0*")] == [f"{16:012d}"]


def test_bad_files_of_all_processes_are_listed_once_and_counted_together(tmp_path: Path) -> None:
    images = class_images(tmp_path)
    names = sorted(images.rglob("*.png"))
    for name in names[::4]:
        name.write_bytes(name.read_bytes()[:200])
    listed = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        ended = go(folder, recipe(folder, images, bad_limit=0.9), size)
        assert [r.code for r in ended] == [0] * size, ended
        rows = (folder / "c" / "core" / "bad_files.jsonl").read_text().splitlines()
        assert len(rows) == len(set(rows)) == record(folder / "c" / "core")["result"]["bad_files"]
        listed.append(sorted(rows))
    assert listed[0] == listed[1]
    limit = (len(listed[0]) - 0.5) / len(names)  # each process meets fewer
    ended = go(tmp_path / "few", recipe(tmp_path / "few", images, bad_limit=limit))
    assert [r.code for r in ended] == [2, 2]
    assert f"{len(listed[0])} of {len(names)} samples are bad" in message(ended)
    assert sorted((tmp_path / "few" / "c" / "core" / "bad_files.jsonl").read_text().splitlines()) == listed[0]


def test_a_dead_worker_ends_all_with_everything_saved(tmp_path: Path, data: Path) -> None:
    path = recipe(tmp_path, data, workers=1, images=400, save_every=1000)
    ended = go(tmp_path, path, prepare=partial(processes.at_step, processes.without_workers, 8, 1))
    assert [r.code for r in ended] == [2, 2]
    assert "a worker of the loader died with exit code -9" in message(ended)
    assert [p.name for p in (tmp_path / "c" / "core" / "state").glob("0*")] == [f"{16:012d}"]


def test_memory_that_runs_out_in_one_process_is_advice_that_can_be_followed(tmp_path: Path, data: Path) -> None:
    path = recipe(tmp_path, data, save_every=8)
    ended = go(tmp_path, path, prepare=partial(processes.at_step, processes.terminated, 8, 0))
    ended = go(tmp_path, path, prepare=partial(processes.out_of_memory, 1))
    assert [r.code for r in ended] == [2, 2]
    assert message(ended).endswith("--set stages.core.activation_checkpointing=true (slower)")
    assert "stages.core.accumulate=4 (micro-batches of 2 images)" in message(ended)
    advice = re.findall(r"--set \S+", message(ended))
    words = [word for setting in advice for word in setting.split()]
    ended = run_team(tmp_path / "said", "run", path, "--runs", tmp_path, *words)
    assert [r.code for r in ended] == [0, 0], ended
    assert record(tmp_path / "c" / "core")["settings"]["accumulate"] == 4


def test_micro_batches_that_cannot_be_shared_are_one_line(tmp_path: Path, data: Path) -> None:
    ended = go(tmp_path, recipe(tmp_path, data, accumulate=1))
    assert [r.code for r in ended] == [2, 2]
    assert message(ended) == (
        "pixelgrow: 2 processes share the micro-batches of each step, so accumulate must be a multiple of 2, and "
        "accumulate of core is 1: add --set stages.core.accumulate=2"
    )
    ended = go(tmp_path, recipe(tmp_path, data, accumulate=4), size=3)
    assert "3 processes cannot share its batch of 8 images evenly" in message(ended)
    ended = go(tmp_path, recipe(tmp_path, data, batch=24, accumulate=4), size=3)
    assert message(ended).endswith("accumulate of core is 4: add --set stages.core.accumulate=6")
    ended = go(tmp_path, recipe(tmp_path, data, batch=9, accumulate=3))
    assert "2 processes cannot share its batch of 9 images evenly" in message(ended)
    assert not (tmp_path / "c" / "core").exists()


def test_a_mistake_in_a_recipe_is_said_once(tmp_path: Path, data: Path) -> None:
    ended = go(tmp_path, recipe(tmp_path, data, imges=3))
    assert [r.code for r in ended] == [2, 2]
    assert "imges" in message(ended)
