"""The ablation: equal compute, the cascade's model, intervals of its summary, a whole run at toy scale."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pixelgrow.models import sizes
from pixelgrow.models.cond import Cond
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.rng import normal
from pixelgrow.stages import looks
from text_models import save_t5

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def bench_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def conditions(n: int) -> Cond:
    from bench.sampling_overhead import conditions

    return conditions(shallow_uvit("tiny", 16).core, n, torch.device("cpu"), 8)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_growth_regimes_and_the_cascade_have_equal_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import ablation_plan as plan

    settings = plan.Settings(tmp_path, scale=0.05)
    monkeypatch.setattr(plan, "OWN", {"core": (plan.CORE, plan.LOW, plan.STRIDE)})
    works = {w.name: w for w in plan.plan_part("growth", settings)}
    assert set(works) == {*plan.GROWN, plan.CASCADE} and "frozen-exact" in works
    for name, work in works.items():
        budget = plan.GROWTH + (plan.CORE if name == "scratch" else 0)
        slack = sum(plan.BATCH * f for f in work.flops)
        assert abs(work.cost - settings.scale * budget * plan.TERA) <= slack, name
    assert len(works["unfreeze-random"].images) == 2
    assert works["frozen-random"].flops[0] < works["scratch"].flops[0] < 1.1 * works[plan.CASCADE].flops[0]
    recipe = plan.recipe("growth", 1, list(works.values()), settings)
    assert recipe.stage("scratch").parent == f"{tmp_path}/cores-seed1/core/checkpoint{os.sep}"
    unfreeze: Any = recipe.stage("unfreeze-random")
    assert (unfreeze.unfreeze_after, unfreeze.images) == (
        works["unfreeze-random"].images[0],
        sum(works["unfreeze-random"].images),
    )


def test_cores_are_compared_on_equal_images_and_on_equal_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import ablation_plan as plan

    for name, row in plan.CORES.items():
        monkeypatch.setitem(sizes.SIZES, name, row)
    works = {w.name: w for w in plan.plan_part("scaling", plan.Settings(tmp_path, scale=0.1))}
    middle = works["core-m"]
    for name in ("core-s", "core-l"):
        assert works[f"{name}-images"].images == middle.images
        assert works[name].cost == pytest.approx(middle.cost, rel=0.1)
    assert works["core-s"].flops[0] < middle.flops[0] < works["core-l"].flops[0]


# --- the cascade ------------------------------------------------------------------------------------------------------


def enlarger() -> Any:
    from bench.cascade import Enlarger, config_above

    torch.manual_seed(0)
    return Enlarger(config_above(shallow_uvit("tiny", 16), 32, 4))


def test_an_enlarger_learns_and_uses_the_small_image_and_its_level() -> None:
    from bench.cascade import EnlargerObjective

    from pixelgrow.data.loader import Batch
    from pixelgrow.models.layers import box_down, up_nearest
    from pixelgrow.training.settings import TrainSettings

    class Text:
        def cond(self, texts: Any) -> Cond:
            return conditions(len(texts))

    model, n = enlarger(), 16
    images = 0.5 * up_nearest(normal((3, 8, 8), 0, "images", range(n)), 4)  # all that a small image tells
    objective = EnlargerObjective(model, Text(), TrainSettings(images=n, batch=n), 0)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for step in range(20):
        found = objective.loss(Batch(images, ("",) * n, torch.arange(step * n, (step + 1) * n)))
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        losses.append(float(found.loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    model.eval()
    with torch.no_grad():
        x, sigma, level = 20 * normal((3, 32, 32), 1, "x", range(n)), torch.full((n,), 20.0), torch.full((n,), 0.1)
        small, cond = box_down(images, 2), conditions(n)
        made = model(x, sigma, cond, small, level)
        assert made.shape == (n, 3, 32, 32)
        error, swapped = ((made - to).square().mean() for to in (images, images.roll(1, 0)))
        assert error < 0.8 * swapped  # x is noise alone: what it knows, it knows from the small image
        assert not torch.equal(made, model(x, sigma, cond, small, 4 * level))


def test_an_enlarged_image_is_a_function_of_its_number() -> None:
    from bench.cascade import enlarged

    model = enlarger().eval()
    small = normal((3, 16, 16), 0, "small", range(3))
    whole = enlarged(model, small, conditions(3), range(3), 0, 2)
    assert whole.shape == (3, 3, 32, 32) and whole.abs().max() <= 1
    one = enlarged(model, small[1:2], conditions(3)[1:2], [1], 0, 2)
    torch.testing.assert_close(one, whole[1:2])
    assert not torch.equal(one, enlarged(model, small[1:2], conditions(3)[1:2], [1], 1, 2))


# --- the summary ------------------------------------------------------------------------------------------------------


def test_differences_are_paired_by_seed() -> None:
    from bench.ablation_summary import Contrast, contrast, shown

    runs = {
        "a": {0: {"FD": 10.0}, 1: {"FD": 20.0}, 2: {"FD": 30.0}, 3: {"FD": 0.0}},
        "b": {0: {"FD": 9.0}, 1: {"FD": 18.9}, 2: {"FD": 29.1}},
    }
    found = contrast(Contrast("growth", "a - b", "FD", ("a",), ("b",)), runs)
    assert found is not None and found["seeds"] == 3
    assert found["mean"] == pytest.approx(1.0)
    half = 4.302653 * 0.1 / 3**0.5  # t quantile of two degrees of freedom; differences 1, 1.1, 0.9
    assert (found["low"], found["high"]) == pytest.approx((1 - half, 1 + half), rel=1e-5)
    assert shown(found, "FD", signed=True) == "+1.0 [+0.8, +1.2]"
    assert contrast(Contrast("growth", "a - c", "FD", ("a",), ("c",)), runs) is None


def test_spikes_and_divergence_are_told_from_noise() -> None:
    from bench.ablation_summary import diverged, spikes

    calm = [1.0 + 0.5 * (i % 3) for i in range(100)]
    assert spikes(calm) == 0
    assert spikes([*calm, 20.0, *calm, float("nan")]) == 2
    assert not diverged([3.0 / (1 + i) + 1 for i in range(50)])
    assert diverged([1.0] * 50 + [5.0] * 10) and diverged([1.0] * 50 + [float("nan")])


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_the_growth_part_runs_goes_on_and_is_summarized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import ablation, ablation_plan

    monkeypatch.setattr(looks, "GRID_STEPS", 1)
    monkeypatch.setattr(looks, "GRID", 1)
    monkeypatch.setattr(ablation_plan, "OWN", {"core": (1.0, 16, 2)})
    monkeypatch.setattr(ablation_plan, "GROWN", ("scratch", "frozen-exact"))
    monkeypatch.setattr(ablation_plan, "DISTANCES", ())  # a distance takes seconds
    monkeypatch.setattr(ablation_plan.Settings, "steps", 2)
    for name in ablation_plan.CORES:
        monkeypatch.setitem(sizes.SIZES, name, ablation_plan.CORES[name])
    save_t5(tmp_path / "t5")
    argv = ["--root", str(tmp_path / "runs"), "--encoder", str(tmp_path / "t5"), "--scale", "0.0001"]
    argv += ["--prompts", "4", "--captions", "8", "--seeds", "0", "--only", "cores", "growth"]
    ablation.main(argv)
    out = capsys.readouterr().out
    assert "### growth" in out and "| cascade |" in out and "ablation.png" in out
    found = json.loads((tmp_path / "runs" / "ablation.json").read_text(encoding="utf-8"))
    assert {"scratch", "frozen-exact", "cascade"} <= found["runs"]["growth"].keys()
    assert {"questions", "all"} <= found["runs"]["growth"]["cascade"]["0"].keys()
    weights = tmp_path / "runs" / "growth-seed0" / "cascade" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    ablation.main([*argv, "--figures", str(tmp_path / "figures")])
    assert weights.stat().st_mtime_ns == written and (tmp_path / "figures" / "ablation.png").exists()
    with pytest.raises(SystemExit, match="was begun with --prompts 4, got 5"):
        ablation.main([*argv, "--prompts", "5"])
