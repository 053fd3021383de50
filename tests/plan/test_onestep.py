"""Plans of one-step stages: figures from fake tensors equal those of the stages' own objects on real tensors."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from pixelgrow import checkpoint
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.generator import Generator, with_guidance
from pixelgrow.diffusion.guidance import Guided
from pixelgrow.growth import freeze, grow_network, grown_config, last_blocks
from pixelgrow.model import WEIGHTS
from pixelgrow.models.cond import Cond
from pixelgrow.models.flops import counted
from pixelgrow.onestep.distill import DISCRIMINATOR, GENERATOR, DistillBatch, DistillObjective
from pixelgrow.onestep.estimator import Estimator, Labels, described
from pixelgrow.onestep.features import TeacherFeatures
from pixelgrow.onestep.pairs import Ode
from pixelgrow.onestep.settings import LossSettings
from pixelgrow.plan.network import Cost, spent
from pixelgrow.plan.onestep import Distillation, distill_cost, pairs_cost
from pixelgrow.plan.recipe import StagePlan, plan_recipe
from pixelgrow.recipe.read import load_recipe, read_recipe
from pixelgrow.recipe.stages import PairsStage
from pixelgrow.report.tables import count, plan_tables, time_of
from pixelgrow.training.denoise import recompute_blocks
from pixelgrow.training.monitor import flops_per_image
from pixelgrow.training.optim import optimizers, trainable
from pixelgrow.training.settings import TrainSettings
from pixelgrow.writing import size_of
from test_growth import cond, shallow

N, TOKENS = 3, 6  # images of a batch; tokens of `cond`'s captions


class Conditions:
    def cond(self, texts: Any) -> Cond:
        return cond(len(texts))


def numbers(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


CASES: dict[str, dict[str, Any]] = {
    "distilled": {},
    "plain": {"losses": {"adversarial": False}},
    "guided": {"distribution": "mixed", "losses": {"balance": "fixed", "augment": ["colour", "translation", "cutout"]}},
    "grown": {"init": "preserve", "settings": {"optimizer": "muon"}},
    "blocks": {"init": "random", "free": 1, "settings": {"activation_checkpointing": True}, "bf16": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_planned_update_equals_a_real_one(case: dict[str, Any]) -> None:
    given: dict[str, Any] = {
        "distribution": None,
        "init": None,
        "free": 0,
        "losses": {},
        "settings": {},
        "bf16": False,
    } | case
    losses, distribution = LossSettings(**given["losses"]), given["distribution"]
    settings = TrainSettings(images=8, batch=N, ema=(0.05, 0.1, 0.15), **given["settings"])
    teacher, below = shallow(), None
    net = with_guidance(shallow().net, 0) if distribution else shallow().net
    if given["init"]:
        below = net.config
        net, report = grow_network(net, grown_config(below, 32, given["init"], generator=True), given["init"])
        trains = last_blocks(below, given["free"])
        freeze(net, [n for n in report.loaded if not n.startswith(trains)])
    features, labels = TeacherFeatures(teacher), None
    if distribution:
        width = described(features, torch.zeros(1, 3, 16, 16), cond(1)).shape[1]
        labels = Labels(Estimator(width, distribution), features)
    generator = Generator(net)
    real = DistillObjective(generator, features, Conditions(), losses, 0, distribution=distribution, labels=labels)
    recompute_blocks(net, settings.activation_checkpointing)
    side = generator.resolution
    weights, texts = torch.full((N,), 3.0) if distribution else None, ("a", "b", "c")
    images, latents = torch.rand(2, N, 3, side, side), torch.randn(N, 3, 16, 16)
    batch = DistillBatch(images[0], texts, torch.arange(N), latents, images[1], texts, weights, torch.arange(N))

    of = Distillation(net.config, teacher.net.config, losses, distribution, below, given["free"], TOKENS)
    planned = distill_cost(of, settings, bf16=given["bf16"])
    memory, runs, states = planned.memory, {}, 0
    assert planned.work.keys() == real.modules.keys()
    for part, module in real.modules.items():
        runs[part] = run = spent(lambda part=part: real.loss(batch, part).loss, bf16=given["bf16"])  # type: ignore[misc]
        flops = run.forward + run.backward
        if labels and part == DISCRIMINATOR:  # the estimator's few layers are left out
            seen = described(features, images[0], cond(N))
            flops -= counted(lambda seen=seen: labels.estimator(seen))
        assert planned.work[part] * N == pytest.approx(flops, rel=1e-9)
        for opt in optimizers(module, settings):
            opt.step()
            states += sum(t.nbytes for s in opt.state.values() for k, t in s.items() if k != "step")
        module.zero_grad(set_to_none=True)
    if not labels:
        assert planned.flops == pytest.approx(flops_per_image(real, batch), rel=1e-9)
    training = {part: 4 * sum(p.numel() for p in trainable(m).values()) for part, m in real.modules.items()}
    core = numbers(net.core)
    assert planned.parameters == {
        "core": core,
        "levels": numbers(net) - core,
        "training": training[GENERATOR] // 4,
    }
    assert memory.weights == 4 * numbers(*real.modules.values(), teacher)
    assert memory.gradients == max(training.values())
    assert memory.optimizer == states
    assert memory.averages == 3 * sum(training.values())
    assert memory.state == 4 * sum(training.values()) + states
    assert memory.activations == pytest.approx(max(run.activations for run in runs.values()), rel=0.01)
    always = memory.weights + memory.optimizer + memory.averages
    assert memory.peak - always == pytest.approx(max(run.peak for run in runs.values()), rel=0.01)


def test_gradients_of_several_micro_batches_wait_for_the_last() -> None:
    config = shallow().net.config
    one, two = (
        distill_cost(
            Distillation(config, config, LossSettings(adversarial=False)),
            TrainSettings(images=8, batch=N * k, accumulate=k),
        )
        for k in (1, 2)
    )
    assert (one.work, one.memory.activations) == (two.work, two.memory.activations)
    least, most = sorted((one.memory.gradients, one.memory.activations))
    assert least <= two.memory.peak - one.memory.peak <= most


@pytest.mark.parametrize(
    ("given", "evaluations"),
    [
        ({"sampler": "heun", "steps": 7}, 12),  # the step from noise level 0 costs none
        ({"sampler": "heun", "steps": 7, "direction": "sample", "guidance": 3}, 26),
        ({"sampler": "dpm++2m", "steps": 5, "direction": "sample", "guidance": "captions"}, 10),
        ({"sampler": "ddim", "steps": 2, "direction": "sample"}, 2),
        ({"sampler": "dpm++2m", "steps": 5, "flip": True}, 8),
    ],
)
def test_planned_pairs_equal_real_ones(given: dict[str, Any], evaluations: int) -> None:
    stage = PairsStage(name="pairs", n=8, batch=N, shard=N, **given)
    teacher, x, c = shallow(), torch.randn(N, 3, 16, 16), cond(N)
    ode = Ode(stage.sampler, stage.steps, teacher.sigma_min, teacher.sigma_max)
    guidance = torch.full((N,), 3.0) if stage.distribution else float(stage.guidance)

    def real() -> torch.Tensor:
        join = ode.to_image if stage.direction == "sample" else ode.to_latent
        return join(Guided(teacher, c, guidance=guidance), x)

    planned = pairs_cost(stage, teacher.net.config, tokens=TOKENS)
    with torch.no_grad():
        run = spent(real)
        once = counted(lambda: teacher(x, torch.ones(N), c))
    assert planned.flops * N == pytest.approx(run.forward * (1 + stage.flip), rel=1e-9)
    assert planned.flops * N == pytest.approx(once * evaluations, rel=1e-9)
    assert planned.memory.weights == 4 * numbers(teacher)
    assert planned.memory.peak - planned.memory.weights == pytest.approx(run.peak, rel=0.02)
    assert planned.parameters["core"] == numbers(teacher.net.core) and planned.parameters["training"] == 0


@pytest.mark.parametrize(("direction", "evaluations"), [("invert", 78), ("sample", 79)])
def test_pairs_on_the_papers_40_levels(direction: Any, evaluations: int) -> None:
    teacher = shallow()
    planned = pairs_cost(PairsStage(name="pairs", n=8, batch=N, shard=N, direction=direction), teacher.net.config)
    once = pairs_cost(PairsStage(name="pairs", n=8, batch=N, shard=N, steps=2, sampler="ddim"), teacher.net.config)
    assert planned.flops == pytest.approx(evaluations * once.flops, rel=1e-9)  # two levels of DDIM: one evaluation


@pytest.mark.parametrize("interval", [None, (0.5, 20.0)])
def test_gates_and_intervals_are_planned_for(interval: Any) -> None:
    """Pairs of a grown teacher, planned and counted: a rung is evaluated only at steps where its gate is open, and the
    null condition only within the interval."""
    low = shallow()
    net, _ = grow_network(low.net, grown_config(low.net.config, 32, "preserve", until=1.0), "preserve")
    teacher, c = Denoiser(net, low.config).eval(), cond(N)
    stage = PairsStage(name="pairs", n=8, batch=N, shard=N, direction="sample", sampler="heun", steps=8, guidance=3)
    stage = stage.model_copy(update={"interval": interval})
    ode = Ode(stage.sampler, stage.steps, teacher.sigma_min, teacher.sigma_max)
    with torch.no_grad():
        guided = Guided(teacher, c, guidance=3.0, interval=interval)
        run = counted(lambda: ode.to_image(guided, torch.randn(N, 3, 32, 32)))
    planned = pairs_cost(stage, net.config, low.config, tokens=TOKENS).flops * N
    whole = grown_config(low.net.config, 32, "preserve", until=float("inf"))
    ungated = pairs_cost(stage, whole, low.config, tokens=TOKENS).flops * N
    assert planned == pytest.approx(run, rel=1e-9) and planned < 0.9 * ungated


def test_feature_networks_from_outside_are_not_counted() -> None:
    config, settings = shallow().net.config, TrainSettings(images=8, batch=N)

    def planned(**losses: Any) -> Cost:
        return distill_cost(Distillation(config, config, LossSettings(**losses), tokens=TOKENS), settings)

    own, theirs = planned(), planned(discriminator="some/dino", distance="lpips")
    assert theirs.memory.peak < own.memory.peak
    assert all(theirs.work[part] < own.work[part] for part in (GENERATOR, DISCRIMINATOR))
    alike = planned(adversarial=False, features=0, similarity={"model": "some/clip"})
    generator, both = Generator(shallow().net), torch.randn(2 * N, 3, 16, 16)  # latents of pairs, and of the prior
    run = spent(lambda: generator(both, cond(2 * N)).sum())
    assert alike.work == {GENERATOR: pytest.approx((run.forward + run.backward) / N, rel=1e-9)}


def test_a_teacher_on_disk_is_read_and_feature_networks_from_outside_are_named() -> None:
    outside = {"discriminator": "some/dino", "distance": "lpips", "similarity": {"model": "some/dino"}}
    stages = [
        {"pairs": {"name": "pairs", "from": str(WEIGHTS / "tiny"), "n": 8, "steps": 2, "batch": 8, "shard": 8}},
        {"distill": {"name": "onestep", "pairs": "pairs", "images": 8, "batch": 2, "losses": outside}},
    ]
    pairs, distilled = plan_recipe(read_recipe({"name": "r", "data": "scenes", "stages": stages}, "r"), gpu=False)
    teacher, _ = checkpoint.load(WEIGHTS / "tiny")
    assert pairs.resolution == distilled.resolution == teacher.resolution
    assert sum(pairs.cost.parameters.values()) == distilled.cost.parameters["training"] == numbers(teacher)
    assert distilled.what.endswith("tiny, without lpips, without some/dino")


def test_the_demo_is_planned_whole() -> None:
    plans = plan_recipe(load_recipe("demo"), gpu=False)
    rows = [(p.name, p.what, p.resolution, p.images, p.batch) for p in plans[2:]]
    assert rows == [
        ("drawn", "sample pairs", 16, 2048, 64),
        ("onestep", "distil core", 16, 7000, 8),
        ("inverted", "invert pairs", 16, 384, 64),
        ("onestep64", "grow preserve, frozen", 64, 1200, 8),
    ]
    by_name: dict[str, StagePlan] = {p.name: p for p in plans}
    grown, below = by_name["onestep64"].cost, by_name["onestep"].cost
    assert below.parameters["training"] == sum(below.parameters[k] for k in ("core", "levels"))
    assert grown.parameters["training"] == grown.parameters["levels"] - below.parameters["levels"]
    once = by_name["core"].cost.work["forward"]
    assert by_name["drawn"].cost.flops == pytest.approx(24 * once) == 24 / 11 * by_name["inverted"].cost.flops
    assert by_name["drawn"].seconds(1e9) == pytest.approx(2048 * 24 * once / 1e9)
    console = Console(width=200, file=io.StringIO())
    console.print(plan_tables(plans, 1e9, "as given"))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    copy = size_of(max(p.cost.memory.state for p in plans))
    assert f"a state is written, its copy takes up to {copy} of CPU memory" in " ".join(printed.split())
    for p in plans[2:]:
        first, second = (line for line in printed.splitlines() if line.startswith(f"{p.name}: {p.what}  "))
        assert first.endswith(time_of(p.seconds(1e9))) and second.endswith(size_of(p.cost.memory.peak))
        assert " + ".join(count(v) for v in p.cost.work.values()) in first
