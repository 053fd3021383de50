"""The plan of a recipe: parameters, FLOPs, memory and time of its stages, with nothing allocated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pixelgrow.models.config import NetConfig
from pixelgrow.models.uvit import UViT
from pixelgrow.onestep.networks import networks_named
from pixelgrow.onestep.settings import LossSettings
from pixelgrow.plan.network import Cost, network_cost
from pixelgrow.plan.onestep import Distillation, distill_cost, pairs_cost
from pixelgrow.plan.shapes import diffusion_of, networks, parent_network
from pixelgrow.precision import has_bf16
from pixelgrow.recipe.read import Recipe, read_recipe
from pixelgrow.recipe.stages import (
    DistillStage,
    GrowStage,
    ModelStage,
    PairsStage,
    TrainStage,
    makes_generator,
)

REFERENCE = "the size's reference"  # a text encoder that does not exist: the size's reference width is used
SHARE = 0.5  # share of the matrix-product rate that training is assumed to reach


@dataclass(frozen=True)
class StagePlan:
    """One phase of a stage. `what`: in words; `images`: seen in all; `batch`: images of a micro-batch."""

    name: str
    what: str
    resolution: int
    images: int
    batch: int
    cost: Cost

    def seconds(self, rate: float) -> float:
        """Duration at `rate` FLOP/s."""
        return self.images * self.cost.flops / rate


@dataclass(frozen=True)
class Phase:
    """A phase of a stage that is planned: of a model's, with its network, and the one in it whose tensors are frozen;
    or a making of pairs, with the teacher's network."""

    stage: ModelStage | PairsStage
    what: str
    images: int
    config: NetConfig
    frozen: NetConfig | None = None

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def batch(self) -> int:
        """Images computed at a time."""
        return self.stage.batch if isinstance(self.stage, PairsStage) else self.stage.micro_batch


def plan_recipe(recipe: Recipe, *, gpu: bool | None = None) -> list[StagePlan]:
    """Plan every training and every making of pairs in a recipe, in order.

    `gpu`: plan for a GPU with bfloat16; by default if there is one. Sample grids, validation, the round trip of `pairs`
    and whole `estimate` stages, whose network is small, are left out.
    """
    gpu = has_bf16() if gpu is None else gpu
    nets = networks(recipe)
    return [
        StagePlan(p.name, p.what, p.config.resolution, p.images, p.batch, cost_of(p, recipe, nets, gpu=gpu))
        for p in phases(recipe, nets)
    ]


def phases(recipe: Recipe, nets: dict[str, NetConfig]) -> Iterator[Phase]:
    """The phases of all stages that are planned. `nets`: the networks of the recipe's stages."""
    for stage in recipe.stages:
        if isinstance(stage, PairsStage):
            yield Phase(stage, f"{stage.direction} pairs", stage.n, parent_network(str(stage.parent), nets))
        elif isinstance(stage, ModelStage):
            for what, images, frozen in _regimes(stage, nets):
                if makes_generator(stage):
                    outside = dict.fromkeys(networks_named(_losses(stage)).values())
                    what += "".join(f", without {name}" for name in outside)
                yield Phase(stage, what, images, nets[stage.name], frozen)


def _losses(stage: ModelStage) -> LossSettings:
    assert isinstance(stage, DistillStage | GrowStage)
    return stage.losses or LossSettings()


def cost_of(phase: Phase, recipe: Recipe, nets: dict[str, NetConfig], *, gpu: bool) -> Cost:
    """The cost of a phase on one device, as the recipe says. `gpu`: one with bfloat16."""
    stage, tokens = phase.stage, recipe.text.max_tokens
    if isinstance(stage, PairsStage):
        low = None if stage.upscales is None else parent_network(stage.upscales, nets)
        return pairs_cost(stage, phase.config, diffusion_of(str(stage.parent), recipe), low=low, tokens=tokens)
    settings = stage.training()
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and gpu)
    if not makes_generator(stage):
        return network_cost(phase.config, settings, frozen=phase.frozen, tokens=tokens, bf16=bf16, gpu=gpu)
    return distill_cost(distillation_of(phase, recipe, nets), settings, bf16=bf16, gpu=gpu)


def distillation_of(phase: Phase, recipe: Recipe, nets: dict[str, NetConfig]) -> Distillation:
    """What trains the generator of a phase."""
    stage = phase.stage
    assert isinstance(stage, DistillStage | GrowStage)
    pairs = recipe.stage(str(stage.pairs))
    assert isinstance(pairs, PairsStage)
    return Distillation(
        phase.config,
        parent_network(str(pairs.parent), nets),
        _losses(stage),
        distribution=pairs.distribution,
        frozen=phase.frozen,
        free=stage.base_blocks if isinstance(stage, GrowStage) else 0,
        tokens=recipe.text.max_tokens,
    )


def _regimes(stage: ModelStage, nets: dict[str, NetConfig]) -> Sequence[tuple[str, int, NetConfig | None]]:
    """For each phase of a stage: what it does, the number of images, and the network whose tensors are frozen."""
    if isinstance(stage, DistillStage):
        return [(f"distil {stage.parent}", stage.images, None)]
    if isinstance(stage, GrowStage):
        parent = parent_network(str(stage.parent), nets)
        grown = f"grow {stage.init}"
        if stage.unfreeze_after is not None:
            rest = stage.images - stage.unfreeze_after
            return [(f"{grown}, frozen", stage.unfreeze_after, parent), (f"{grown}, unfrozen", rest, None)]
        if stage.trains_core:
            return [(grown if stage.init == "scratch" else f"{grown}, finetune", stage.images, None)]
        return [(f"{grown}, frozen", stage.images, parent)]
    if isinstance(stage, TrainStage) and stage.parent is None:
        return [(f"train {stage.size}", stage.images, None)]
    return [("train on", stage.images, None)]


def plan_size(size: str, resolution: int, *, core: int | None, stride: int, images: int, batch: int) -> Recipe:
    """A recipe for a size of the ladder: a core, grown to `resolution` if that is larger than the core's.

    `core`: the core's resolution; by default 64, or `resolution` if that is less.
    """
    low = min(64, resolution) if core is None else core
    stages: list[dict[str, Any]] = [
        {"train": {"name": "core", "size": size, "resolution": low, "stride": stride, "images": images, "batch": batch}}
    ]
    if resolution != low:
        stages.append({"grow": {"name": "grown", "to": resolution, "images": images, "batch": batch}})
    text = {"encoder": REFERENCE}
    return read_recipe({"name": size, "text": text, "data": {"source": "scenes"}, "stages": stages}, "plan")


def parts_of(config: NetConfig) -> dict[str, int]:
    """Parameters of a network by part: the core, and the levels of each resolution with their entry and exit."""
    with torch.device("meta"):
        net = UViT(config)
    parts: dict[str, int] = {}
    for name, p in net.named_parameters():
        head, _, rest = name.partition(".")
        key = head if head in ("core", "guidance") else f"{rest.partition('.')[0]} px"
        parts[key] = parts.get(key, 0) + p.numel()
    return parts


def measured_rate() -> float:
    """FLOP/s that training may reach on this machine, idle: `SHARE` of the rate of matrix products, which is measured.

    On a CPU that other programs use, too, a large product is always interrupted, and small ones find a gap (two cores
    with a load of 4: 55 GFLOP/s at a side of 1536, 205 at 384).
    """
    from pixelgrow.training.monitor import matmul_rate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if has_bf16() else torch.float32
    sides = (None,) if device.type == "cuda" else (None, 384)
    return SHARE * max(matmul_rate(device, dtype, side=side) for side in sides)
