"""`parallel: {shard: S}` in a recipe: what is written is whole and right, the layout may change, faults end all."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

import processes
from distributed.test_faults import go, message, recipe
from distributed.test_stages import log
from runs import WEIGHTS, class_images, record
from training.test_state import flip

LOOKS = {"accumulate": 4, "ema": [0.2, 0.1], "snapshot_every": 16, "validate_every": 16, "sample_every": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The stage's folder after a run of one process."""
    root = tmp_path_factory.mktemp("one")
    (ended,) = go(root, recipe(root, data, **LOOKS), size=1)
    assert ended.code == 0, ended.err
    return root / "c" / "core"


def check(one: Path, stage: Path) -> None:
    """The stage ended as one process ends."""
    expected, found = load_file(one / WEIGHTS), load_file(stage / WEIGHTS)
    assert expected.keys() == found.keys()
    for name, t in expected.items():
        assert (found[name] - t).abs().max() < 1e-5, name
    snapshot = load_file(stage / "snapshots" / "denoiser" / f"{32:012d}.safetensors")  # of averages
    first, second = (
        {name.removeprefix(of): t for name, t in snapshot.items() if name.startswith(of)}
        for of in ("0.2/net.", "0.1/net.")
    )
    assert first and all(found[name].half().equal(t) for name, t in first.items())
    assert not all(second[name].equal(t) for name, t in first.items())
    expected_log, found_log = log(one), log(stage)
    assert [line.keys() for line in found_log] == [line.keys() for line in expected_log]
    for was, now in zip(expected_log, found_log, strict=True):
        assert now == pytest.approx(was, rel=1e-5), was
    names = {str(p.relative_to(one)) for p in one.rglob("*") if "tensorboard" not in p.parts}
    assert names == {str(p.relative_to(stage)) for p in stage.rglob("*") if "tensorboard" not in p.parts}
    assert record(stage)["result"]["parameters"] == record(one)["result"]["parameters"]


def sharded(path: Path, shard: int) -> Path:
    """The recipe with another layout."""
    text = path.read_text(encoding="utf-8").replace('"text"', f'"parallel": {{"shard": {shard}}}, "text"')
    made = path.with_name(f"shard{shard}.yaml")
    made.write_text(text, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The stage's folder after a run of two processes with one copy."""
    root = tmp_path_factory.mktemp("two")
    ended = go(root, sharded(recipe(root, data, **LOOKS), 2))
    assert [r.code for r in ended] == [0, 0], ended
    return root / "c" / "core"


def saved(folder: Path) -> list[int]:
    """At how many images states were saved that are kept; nothing else is in their folder but the configuration."""
    names = {p.name for p in (folder / "c" / "core" / "state").iterdir()} - {"config.json"}
    return sorted(map(int, names))


def test_two_processes_with_one_copy_write_what_one_process_writes(one: Path, two: Path) -> None:
    check(one, two)


def test_four_processes_then_two_then_one_then_two_go_on(tmp_path: Path, data: Path, one: Path) -> None:
    path = recipe(tmp_path, data, **LOOKS)
    for size, shard, images in ((4, 2, 0), (2, 2, 8), (1, 1, 16)):
        stop = partial(processes.at_step, processes.terminated, images, size - 1)
        ended = go(tmp_path, sharded(path, shard), size, prepare=stop)
        assert [r.code for r in ended] == [128 + signal.SIGTERM] * size, ended
        assert f"saved at {images + 8} images" in message(ended)
        files = list((tmp_path / "c" / "core" / "state" / f"{images + 8:012d}").glob("*.safetensors"))
        assert len(files) == size  # each process writes its part
        assert max(f.stat().st_size for f in files) < 1.1 * sum(f.stat().st_size for f in files) / size
    ended = go(tmp_path, sharded(path, 2))
    assert [r.code for r in ended] == [0, 0], ended
    check(one, tmp_path / "c" / "core")


def test_a_kill_in_a_save_loses_that_save_alone(tmp_path: Path, data: Path, two: Path) -> None:
    path = sharded(recipe(tmp_path, data, save_every=8, **LOOKS), 2)
    ended = go(tmp_path, path, prepare=partial(processes.in_save, processes.killed, 24, 1))
    assert [r.code for r in ended] == [2, -signal.SIGKILL], ended
    assert max(p.name for p in (tmp_path / "c" / "core" / "state").glob("0*")) == f"{16:012d}"
    assert [r.code for r in go(tmp_path, path)] == [0, 0]
    assert (tmp_path / "c" / "core" / WEIGHTS).read_bytes() == (two / WEIGHTS).read_bytes()


def test_a_disk_that_is_full_for_one_process_ends_all_and_so_does_a_damaged_part(tmp_path: Path, data: Path) -> None:
    path = sharded(recipe(tmp_path, data, save_every=8), 2)
    ended = go(tmp_path, path, prepare=partial(processes.in_save, processes.disk_full, 16, 1))
    assert [r.code for r in ended] == [2, 2]
    assert f"state/{16:012d}: No space left on device; make room there" in message(ended)
    assert saved(tmp_path) == [8]
    part = tmp_path / "c" / "core" / "state" / f"{8:012d}" / "00001.safetensors"
    flip(part)
    ended = go(tmp_path, path)
    assert [r.code for r in ended] == [2, 2]
    assert f"{part} is damaged" in message(ended)


def test_memory_that_runs_out_in_one_process_ends_those_that_wait_for_its_weights(tmp_path: Path, data: Path) -> None:
    path = sharded(recipe(tmp_path, data, save_every=8), 2)
    ended = go(tmp_path, path, prepare=partial(processes.at_step, processes.without_memory, 24, 1))
    assert [r.code for r in ended] == [2, 2]
    assert "out of memory" in message(ended)
    assert max(int(p.name) for p in (tmp_path / "c" / "core" / "state").glob("0*")) == 16  # the next was not whole


def test_a_number_of_processes_that_cannot_share_a_copy_is_one_line(tmp_path: Path, data: Path) -> None:
    ended = go(tmp_path, sharded(recipe(tmp_path, data), 4))
    assert [r.code for r in ended] == [2, 2]
    assert message(ended) == (
        "pixelgrow: parallel: 4 processes share a network, and 2 are not a multiple of 4: start 4 or a multiple, or "
        "add --set parallel.shard=2"
    )
