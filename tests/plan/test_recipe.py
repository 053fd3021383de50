"""Plans: figures from fake tensors equal those of real tensors, and planning the largest model allocates nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.growth import freeze, grown_config
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.models.uvit import UViT
from pixelgrow.plan.network import Live, loss_of, measured, network_cost, spent, whole_network
from pixelgrow.plan.recipe import parts_of, plan_recipe, plan_size
from pixelgrow.recipe.read import load_recipe
from pixelgrow.training.denoise import recompute_blocks
from pixelgrow.training.optim import optimizers
from pixelgrow.training.settings import Checkpointing, TrainSettings

SETTINGS = TrainSettings(images=100, batch=3)


@pytest.mark.parametrize("frozen", [False, True])
def test_fake_figures_equal_real_ones(frozen: bool) -> None:
    core = shallow_uvit("tiny", 16)
    config = grown_config(core, 32, "preserve")
    denoiser = Denoiser(UViT(config))
    if frozen:
        freeze(denoiser.net, list(UViT(core).state_dict()))
    real = spent(loss_of(denoiser, 3, 8))
    planned = network_cost(config, SETTINGS, frozen=core if frozen else None, tokens=8)
    everything = sum(p.numel() for p in denoiser.parameters())
    training = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    assert planned.parameters["core"] + planned.parameters["levels"] == everything
    assert planned.parameters["training"] == training
    assert planned.work["forward"] * 3 == pytest.approx(real.forward, rel=1e-9)
    assert planned.work["backward"] * 3 == pytest.approx(real.backward, rel=1e-9)
    assert planned.memory.activations == real.activations
    assert planned.memory.weights == 4 * everything
    assert planned.memory.gradients == 4 * training
    assert planned.memory.state == 4 * training * (1 + 2 + len(SETTINGS.ema))
    states = planned.memory.weights + planned.memory.optimizer + planned.memory.averages
    assert planned.memory.peak - states == real.peak


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_two_depths_tell_of_any_other(checkpointing: Checkpointing) -> None:
    """Weight copies of autocast, gradients of earlier micro-batches and activations: all at once, at depth 5."""
    config = shallow_uvit("tiny", 16)
    deep = config.model_copy(update={"core": config.core.model_copy(update={"depth": 5})})
    more = {"accumulate": 3, "activation_checkpointing": checkpointing, "optimizer": "muon"}
    settings = SETTINGS.model_copy(update=more)
    planned, _ = whole_network(deep, settings, bf16=True)
    denoiser = Denoiser(UViT(deep))
    recompute_blocks(denoiser.net, checkpointing)
    real = measured(denoiser, settings, loss_of(denoiser, settings.micro_batch, 32), bf16=True)
    assert {n: v for n, v in real.peaks.items() if "between" not in n} == pytest.approx(planned.peaks, rel=1e-3)
    assert planned.activations == pytest.approx(real.activations, rel=1e-3)
    assert replace(planned, peaks={}, activations=0) == replace(real, peaks={}, activations=0)
    assert planned.peak == pytest.approx(real.peak, rel=1e-3)


@pytest.mark.parametrize(("kind", "gpu", "copies"), [("radam", True, 8), ("radam", False, 5), ("muon", False, 3)])
def test_updates_make_copies(kind: str, gpu: bool, copies: int) -> None:
    """Counted on eight matrices of one size."""
    net = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(8)))
    (opt,) = optimizers(net, SETTINGS.model_copy(update={"optimizer": kind}))
    opt.param_groups[0]["foreach"] = gpu
    for _ in range(7):  # from the sixth step on, RAdam corrects the variance
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        with Live() as live:
            opt.step()
    assert live.peak == copies * 4 * 64
    found = measured(net, SETTINGS.model_copy(update={"optimizer": kind}), lambda: net(torch.ones(1, 8)), gpu=gpu)
    assert found.peaks["update"] == (8 + copies) * 4 * 64


def test_norms_are_in_float32_on_a_gpu() -> None:
    """Where the forward pass is in bfloat16: what autocast does there, and not on a CPU."""
    config = shallow_uvit("tiny", 16)
    kept = {
        (bf16, gpu): network_cost(config, SETTINGS, bf16=bf16, gpu=gpu).memory.activations
        for bf16 in (False, True)
        for gpu in (False, True)
    }
    assert kept[False, True] == kept[False, False]
    assert kept[True, True] > 1.05 * kept[True, False]


def test_attention_is_counted() -> None:
    """FLOPs forward: 2 N C^2 for a linear layer, 4 N M C for the two products of an attention."""
    config = shallow_uvit("tiny", 16)
    two = config.model_copy(update={"core": config.core.model_copy(update={"depth": 2})})
    one = config.model_copy(update={"core": config.core.model_copy(update={"depth": 1})})
    n, tokens, c, text = 16, 8, config.core.width, config.core.text_dim
    linear = 2 * n * c * (4 * c + 2 * c + 2 * config.core.mlp_ratio * c) + 2 * tokens * text * 2 * c
    attention = 4 * n * (n + tokens) * c
    flops = [spent(loss_of(Denoiser(UViT(x)), 1, tokens)).forward for x in (one, two)]
    assert flops[1] - flops[0] == linear + attention


def test_recomputing_blocks_keeps_less() -> None:
    config = shallow_uvit("tiny", 32)
    less = network_cost(config, SETTINGS.model_copy(update={"activation_checkpointing": True}))
    more = network_cost(config, SETTINGS)
    between = network_cost(config, SETTINGS.model_copy(update={"activation_checkpointing": "selective"}))
    assert less.memory.activations < between.memory.activations / 2 < more.memory.activations / 3
    assert less.work["backward"] == pytest.approx(more.flops, rel=0.2)
    assert between.flops == pytest.approx(more.flops, rel=0.01)  # no product is computed again


def test_the_largest_recipe_is_planned() -> None:
    core, raw, tuned = plan_recipe(load_recipe("huge"), gpu=True)
    assert core.cost.parameters["core"] == pytest.approx(8e9, rel=0.03)
    assert (core.resolution, raw.resolution, tuned.resolution) == (256, 1024, 1024)
    assert raw.cost.parameters["training"] == raw.cost.parameters["levels"]
    assert raw.cost.memory.peak < core.cost.memory.peak / 3
    assert core.seconds(1e15) == pytest.approx(core.images * core.cost.flops / 1e15)


def test_a_size_alone_is_planned() -> None:
    small, grown = plan_recipe(plan_size("small", 128, core=None, stride=4, images=1000, batch=2))
    assert (small.resolution, grown.resolution, grown.what) == (64, 128, "grow preserve, frozen")
    assert len(plan_recipe(plan_size("small", 32, core=None, stride=4, images=1000, batch=2))) == 1


def test_phases_of_a_stage_are_planned_apart() -> None:
    frozen, unfrozen = plan_recipe(load_recipe("smoke"))[1:]
    assert (frozen.images, unfrozen.images) == (16, 16)
    assert frozen.cost.parameters["training"] < unfrozen.cost.parameters["training"]
    assert frozen.cost.flops < unfrozen.cost.flops


def test_parts_add_up() -> None:
    config = grown_config(shallow_uvit("tiny", 16), 32, "preserve")
    parts = parts_of(config)
    assert set(parts) == {"core", "16 px", "32 px"}
    assert sum(parts.values()) == sum(p.numel() for p in UViT(config).parameters())
