"""Every stage on two processes ends with the bytes of one process that takes the same micro-batches."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from processes import made, noted, start

RECIPE = """
name: all
text: {encoder: minilm, max_tokens: 16}
data: {source: scenes, n: 200, captions: 8}
heldout: {source: scenes, split: heldout, n: 4, captions: 4}
stages:
  - train: {name: core, size: tiny, resolution: 16, images: 24, batch: 8, accumulate: 2, lr: 1e-3, log_every: 8,
            save_every: 8, validate_every: 16, sample_every: 24, snapshot_every: 16}
  - grow: {name: grown, from: core, to: 32, core: {unfreeze_after: 8}, images: 16, batch: 8, accumulate: 2,
           log_every: 8, validate_every: 16, sample_every: 16, snapshot_every: 0}
  - pairs: {name: pairs, from: core, n: 12, guidance: captions, direction: sample, batch: 4, shard: 4, steps: 2}
  - estimate: {name: omega, pairs: pairs, images: 16, batch: 8, accumulate: 2, log_every: 8}
  - distill: {name: onestep, pairs: pairs, estimator: omega, images: 16, batch: 8, accumulate: 2, log_every: 8,
              save_every: 8, validate_every: 16, sample_every: 16, snapshot_every: 0}
  - evaluate: {name: eval, prompts: 4, batch: 2, guidance: 4}
"""
MEASURED = {"time", "images_per_second", "waited", "matmul_share", "memory_mib"}  # of a log: the machine's
PARTS = ("core", "grown/frozen", "grown", "omega", "onestep")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The finished run's folder by the number of processes."""
    root = tmp_path_factory.mktemp("runs")
    (root / "all.yaml").write_text(RECIPE)
    running = {}
    for n in (1, 2):
        words = ("run", root / "all.yaml", "--runs", root / str(n))
        running[n] = start(root / f"said{n}", *words, size=n, prepare=partial(noted, root / f"said{n}"))
    for n, processes in running.items():
        first, *others = processes.end()
        assert first.code == 0, first.err
        assert first.out == f"report: {root / str(n) / 'all' / 'report.html'}\n"
        assert all((r.code, r.out, r.err) == (0, "", "") for r in others)
    return {n: root / str(n) / "all" for n in running}


def files(folder: Path, *kinds: str) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for kind in kinds for p in folder.rglob(kind)}
    assert found
    return found


def test_weights_and_averages_are_equal_to_the_bit(runs: dict[int, Path]) -> None:
    one, two = (files(runs[n], "*.safetensors", "records.f16") for n in (1, 2))
    assert len([name for name in one if "snapshots" in name]) == 2
    assert {f"{part}/checkpoint/model.safetensors" for part in PARTS if part != "omega"} < set(one)
    assert one == two


def test_a_checkpoint_is_the_average(runs: dict[int, Path]) -> None:
    core = runs[2] / "core"
    average = load_file(core / "snapshots" / "denoiser" / f"{24:012d}.safetensors")  # in half precision
    made = load_file(core / "checkpoint" / "model.safetensors")
    first, second = (
        {name.removeprefix(of): t for name, t in average.items() if name.startswith(of)}
        for of in ("0.05/net.", "0.1/net.")
    )
    assert first
    assert all(made[name].half().equal(t) for name, t in first.items())
    assert not all(second[name].equal(t) for name, t in first.items())


def test_pictures_are_equal_to_the_bit(runs: dict[int, Path]) -> None:
    one, two = (files(runs[n], "*.png") for n in (1, 2))
    assert len(one) == 7
    assert one == two


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


@pytest.mark.parametrize("part", PARTS)
def test_logs_are_equal(runs: dict[int, Path], part: str) -> None:
    one, two = (log(runs[n] / part) for n in (1, 2))
    assert any("loss" in name for line in one for name in line)
    assert one == two


def test_what_an_evaluation_measures_is_equal(runs: dict[int, Path]) -> None:
    one, two = (json.loads((runs[n] / "eval" / "metrics.json").read_text()) for n in (1, 2))
    for name in ("accuracy", "seams", "details"):
        assert one[name] == two[name]


def test_processes_share_pairs_and_images(runs: dict[int, Path]) -> None:
    root = runs[2].parents[1]
    assert made(root / "said2", 2) == [["pairs/0", "pairs/2", "seed-0/0"], ["pairs/1", "seed-0/2"]]


def test_files_are_those_of_one_process(runs: dict[int, Path]) -> None:
    one, two = (
        {str(p.relative_to(runs[n])) for p in runs[n].rglob("*") if "tensorboard" not in p.parts} for n in (1, 2)
    )
    assert one == two
