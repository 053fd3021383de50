"""One copy of a network on several processes ends where one process ends, up to rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from sharded import together, trainings

PARTS = ("core", "frozen", "unfrozen", "onestep", "other")
LAYOUTS = {"one": (1, 1, PARTS), "fsdp": (2, 2, PARTS), "hsdp": (4, 2, ("core",))}  # processes, of which share a copy
# What an exact rung adds has no mean: the gradient of this tensor is rounding, which AdamW makes steps of.
NOISE = "net.exit.16.conv.bias"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of finished trainings, by layout and part."""
    root = tmp_path_factory.mktemp("runs")
    for name, (size, shard, parts) in LAYOUTS.items():
        assert together(trainings, size, shard, root / name, parts) == [0] * size
    return root


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("layout", "part"), [*(("fsdp", part) for part in PARTS), ("hsdp", "core")])
def test_losses_and_weights_are_those_of_one_process(runs: Path, layout: str, part: str) -> None:
    one, *many = (_read(p) for p in (runs / "one" / part / "steps0.json", *(runs / layout / part).glob("steps*.json")))
    assert len(many) == LAYOUTS[layout][0] and len(one) > 3
    for steps in many:
        assert [s.keys() for s in steps] == [s.keys() for s in one]
        assert [list(s.values()) for s in steps] == [pytest.approx(list(s.values()), rel=1e-6) for s in one]
    logs = [log(runs / name / part) for name in ("one", layout)]  # with the held-out error, rounded to six digits
    for name in logs[0][0].keys() | logs[0][-1].keys():
        if name.startswith("validation") or name == "grad_norm":
            expected, found = ([line[name] for line in lines if name in line] for lines in logs)
            assert found == pytest.approx(expected, rel=1e-5), name
    for kind in ("weights", "averages"):
        expected, found = (_tensors(runs / name / part / kind) for name in ("one", layout))
        assert expected.keys() == found.keys()
        for name, t in expected.items():
            if name != NOISE:
                assert (found[name] - t).abs().max() < 1e-5, name
    weights, averages = (_tensors(runs / layout / part / kind) for kind in ("weights", "averages"))
    assert bool(averages) == (part != "other")
    if averages:  # what is written is no copy of the weights
        assert max(float((t - weights[name]).abs().max()) for name, t in averages.items()) > 2e-5


def _tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.exists() else {}
