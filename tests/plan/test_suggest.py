"""Which model, stages and lengths are suggested for images and a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixelgrow.plan import machine as machines
from pixelgrow.plan import suggest as suggesting
from pixelgrow.plan.machine import Machine, this_machine
from pixelgrow.plan.network import Cost, Memory
from pixelgrow.plan.recipe import SHARE, measured_rate, plan_recipe
from pixelgrow.plan.suggest import PATIENCE, SHORTEST, Wanted, sides_of, suggest
from pixelgrow.recipe.read import read_recipe

LAPTOP = Machine(cores=2, memory=8 << 30, rate=100e9)
GPU = Machine(cores=16, memory=80 << 30, rate=2e14, gpu="a GPU", bf16=True)
TEXT = {"encoder": "minilm", "max_tokens": 32}
FLOPS = {"tiny": 1e9, "small": 1e10, "base": 1e11, "large": 1e12}


class Sized:
    """A source of images with these smaller sides."""

    def __init__(self, *sides: int) -> None:
        self.short = sides

    def __len__(self) -> int:
        return len(self.short)

    def size(self, i: int) -> tuple[int, int]:
        return self.short[i], self.short[i] + 7


@pytest.mark.parametrize(
    ("train", "held", "sides"),
    [
        ([300] * 10, [300], (32, 64, 128, 256)),
        ([300] * 10, [100], (32, 64)),  # none larger is held out
        ([300, 300, *[64] * 6], [300], (32, 64, 128, 256)),  # a quarter
        ([300, *[64] * 6], [300], (32, 64)),
        ([300] * 2000 + [70] * 9000, [300], (32, 64, 128, 256)),  # many
        ([300] * 1999 + [70] * 9000, [300], (32, 64)),
        ([28] * 10, [28], (28,)),
        ([31] * 8 + [20] * 2, [31], (28,)),
        ([16] * 10, [16], (16,)),
        ([15] * 10, [15], ()),
        ([5000] * 10, [5000], (32, 64, 128, 256, 512, 1024)),
        ([300], [300], (32, 64, 128, 256)),
    ],
)
def test_stages_have_resolutions_that_enough_images_have(train: list[int], held: list[int], sides: Any) -> None:
    assert sides_of(Sized(*train), Sized(*held)) == sides  # type: ignore[arg-type]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Costs by size alone, and four times as much for each doubling; the sizes that were planned."""
    sizes: list[str] = []

    def costs(stages: list[dict[str, Any]], wanted: Wanted, machine: Machine) -> dict[str, Cost]:
        bodies = [body for stage in stages for body in stage.values() if "images" in body]
        size = bodies[0]["size"]
        sizes.append(size)
        found = {}
        for number, body in enumerate(bodies):
            flops = FLOPS[size] * 4**number
            activations = int(flops * body["batch"] / 16)
            peak, state = activations + int(FLOPS[size] / 10), int(FLOPS[size] / 20)
            memory = Memory(0, 0, 0, 0, activations=activations, peak=peak, state=state)
            found[body["name"]] = Cost({}, {"forward": flops}, memory)
        return found

    monkeypatch.setattr(suggesting, "_costs", costs)
    return sizes


def of(made: suggesting.Suggestion, name: str) -> dict[str, Any]:
    return next(body for stage in made.stages for body in stage.values() if body["name"] == name)


def test_the_model_grows_with_the_number_of_images_and_with_the_machine(planned: list[str]) -> None:
    sides = (32, 64, 128)
    for images, machine, size, low in (
        (1_999, GPU, "tiny", 32),
        (2_000, GPU, "small", 64),
        (100_000, GPU, "base", 64),
        (2_000, LAPTOP, "tiny", 32),  # small takes longer than a night
        (100_000, Machine(2, 6 << 30, 2e14, "a GPU"), "small", 64),  # base does not fit into its memory
    ):
        made = suggest(Wanted(images, sides, 16, TEXT), machine)
        assert (of(made, "core")["size"], of(made, "core")["resolution"]) == (size, low)
        assert sum(made.seconds.values()) <= PATIENCE
        assert len(made.stages) == len(sides) - (low > 32) + 1  # with the evaluation
    assert suggest(Wanted(2_000, (32,), 16, TEXT), GPU).stages[0]["train"]["resolution"] == 32


def test_lengths_follow_the_number_of_images(planned: list[str]) -> None:
    made = suggest(Wanted(1_600, (32, 64, 128), 5, TEXT), Machine(2, 8 << 30, 1e15))
    assert [of(made, name)["images"] for name in ("core", "grown64", "grown128")] == [400_000, 50_000, 25_000]
    assert made.seconds == {"core": 0.4, "grown64": 0.2, "grown128": 0.4}
    assert (made.beyond, of(made, "eval")["prompts"], of(made, "core")["batch"]) == ((), 5, 16)
    few = suggest(Wanted(2, (32, 64), 1, TEXT), LAPTOP)
    assert [of(few, name)["images"] for name in ("core", "grown64")] == [SHORTEST, 4000]


def test_a_slow_machine_trains_for_fewer_images_then_in_fewer_stages(planned: list[str]) -> None:
    wanted = Wanted(1_600, (32, 64, 128, 256), 16, TEXT)
    whole = suggest(wanted, LAPTOP)
    slower = suggest(wanted, Machine(2, 8 << 30, 2e10))
    assert whole.beyond == slower.beyond == ()
    assert of(slower, "core")["images"] < of(whole, "core")["images"] == 400_000
    assert 0.9 * PATIENCE < sum(slower.seconds.values()) <= PATIENCE
    slow = suggest(wanted, Machine(2, 8 << 30, 5e9))
    assert slow.beyond == (256,)
    assert list(slow.seconds) == ["core", "grown64", "grown128"]
    slowest = suggest(wanted, Machine(2, 8 << 30, 1e8))
    assert slowest.beyond == (64, 128, 256) and list(slowest.seconds) == ["core"]
    assert of(slowest, "core")["images"] == SHORTEST
    assert len(planned) == 4  # each size was planned once


def test_what_takes_too_much_memory_has_smaller_micro_batches(planned: list[str]) -> None:
    made = suggest(Wanted(100, (32, 64, 128), 16, TEXT), Machine(2, 4 * 10**9, 1e15))
    assert [of(made, name)["batch"] for name in ("core", "grown64", "grown128")] == [16, 4, 4]
    assert [of(made, name).get("accumulate") for name in ("core", "grown64", "grown128")] == [None, None, 2]
    assert suggest(Wanted(100, (32,), 16, TEXT), Machine(2, 1, 1e15)).stages[0]["train"]["accumulate"] == 16


@pytest.mark.parametrize(
    ("machine", "parts"),
    [
        (Machine(2, 1_600_000_000, 1e15), 2),  # 1.12 GB for a step, which takes 1.1 GB, and a copy of 0.05 GB
        (Machine(2, 5_900_000_000, 1e15, "a GPU"), None),  # 4.13 GB for a step of 4.1 GB
    ],
)
def test_the_copy_of_a_state_counts_where_steps_use_the_same_memory(planned: Any, machine: Machine, parts: Any) -> None:
    assert suggest(Wanted(100, (32,), 16, TEXT), machine).stages[0]["train"].get("accumulate") == parts


def test_a_rung_meets_the_lowest_noise_of_the_whole_model(planned: list[str]) -> None:
    made = suggest(Wanted(100, (32, 64, 128, 256), 16, TEXT), LAPTOP)
    lowest = of(made, "core")["diffusion"]["sigma_min"]
    assert lowest == 0.0075
    for name in ("grown64", "grown128", "grown256"):
        noise = of(made, name)["noise"]
        assert (noise["mean"] - np.log(lowest)) / noise["std"] == pytest.approx(2.33, abs=0.02)


def test_a_suggestion_is_a_recipe_with_real_costs() -> None:
    wanted = Wanted(100, (32, 64), 16, {"classes": 3}, {"bad_limit": 0.1})
    made = suggest(wanted, LAPTOP)
    raw = {"name": "x", "text": {"classes": 3}, "data": {"source": "."}, "stages": made.stages}
    recipe = read_recipe(raw, "test")
    assert [stage.name for stage in recipe.stages] == ["core", "grown64", "eval"]
    assert made.seconds == {plan.name: plan.seconds(LAPTOP.rate) for plan in plan_recipe(recipe, gpu=False)}


def test_the_rate_is_that_of_an_idle_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large products are interrupted on a busy CPU; on a GPU small ones say nothing."""
    found = {None: 1e10, 384: 2e11}
    monkeypatch.setattr("pixelgrow.training.monitor.matmul_rate", lambda device, dtype, side: found[side])
    for gpu, rate in ((False, 2e11), (True, 1e10)):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr("pixelgrow.plan.recipe.has_bf16", lambda gpu=gpu: gpu)
        assert measured_rate() == SHARE * rate


def test_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits = [tmp_path / name for name in ("none", "unlimited", "limit")]
    limits[1].write_text("max\n", encoding="utf-8")
    monkeypatch.setattr(machines, "measured_rate", lambda: 5.0)
    monkeypatch.setattr(machines, "LIMITS", limits[:2])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    whole = this_machine()
    assert (whole.rate, whole.gpu) == (5.0, "") and whole.memory > 1 << 20 and whole.cores >= 1
    limits[2].write_text("1048576\n", encoding="utf-8")
    monkeypatch.setattr(machines, "LIMITS", limits)
    assert this_machine().memory == 1 << 20
    assert str(Machine(1, 3 << 29, 1.0)) == "1 CPU core with 1.5 GiB of memory"
    assert str(Machine(1, 3 << 29, 1.0, "H200")) == "H200 with 1.5 GiB of memory"
