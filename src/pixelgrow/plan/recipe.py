"""What the stages of a recipe will need, before anything is allocated: parameters, FLOPs, memory, time."""

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
from pixelgrow.plan.onestep import distill_cost, pairs_cost
from pixelgrow.plan.shapes import diffusion_of, networks, parent_network
from pixelgrow.precision import has_bf16
from pixelgrow.recipe.read import Recipe, read_recipe
from pixelgrow.recipe.stages import (
    DistillStage,
    GrowStage,
    ModelStage,
    PairsStage,
    Stage,
    TrainStage,
    makes_generator,
)

REFERENCE = "the size's reference"  # a text encoder that is nowhere: the width of the size's table row stands in
SHARE = 0.5  # of the matrix-product rate that training is taken to achieve, where a time is told


@dataclass(frozen=True)
class StagePlan:
    """One phase of one stage: what it does, at `resolution`, with `images` in micro-batches of `batch`."""

    name: str
    what: str
    resolution: int
    images: int
    batch: int
    cost: Cost

    def seconds(self, rate: float) -> float:
        """Time at `rate` FLOP/s achieved."""
        return self.images * self.cost.flops / rate


def plan_recipe(recipe: Recipe, *, gpu: bool | None = None) -> list[StagePlan]:
    """Every phase of training and every making of pairs in a recipe, in order. `gpu`: plan for one that has bfloat16,
    by default where there is one.

    Left out are pictures and measurements on the way, the sixteen images that a stage of pairs checks its solver by,
    and `estimate` stages, whose network is a few small layers on one look of the teacher at each pair.
    """
    gpu = has_bf16() if gpu is None else gpu
    nets = networks(recipe)
    return [plan for stage in recipe.stages for plan in _phases(stage, recipe, nets, gpu)]


def _phases(stage: Stage, recipe: Recipe, nets: dict[str, NetConfig], gpu: bool) -> Iterator[StagePlan]:
    """The phases of a stage; none of one that is not planned."""
    tokens = recipe.text.max_tokens
    if isinstance(stage, PairsStage):
        teacher = parent_network(str(stage.parent), nets)
        cost = pairs_cost(stage, teacher, diffusion_of(str(stage.parent), recipe), tokens=tokens)
        yield StagePlan(stage.name, f"{stage.direction} pairs", teacher.resolution, stage.n, stage.batch, cost)
    if not isinstance(stage, ModelStage):
        return
    config = nets[stage.name]
    for what, images, frozen in _regimes(stage, nets):
        settings = stage.training()
        bf16 = settings.precision == "bf16" or (settings.precision == "auto" and gpu)
        if makes_generator(stage):
            assert isinstance(stage, DistillStage | GrowStage)
            pairs = recipe.stage(str(stage.pairs))
            assert isinstance(pairs, PairsStage)
            losses, teacher = stage.losses or LossSettings(), parent_network(str(pairs.parent), nets)
            what += "".join(f", without {name}" for name in dict.fromkeys(networks_named(losses).values()))
            free = stage.base_blocks if isinstance(stage, GrowStage) else 0
            cost = distill_cost(
                config,
                teacher,
                settings,
                losses,
                distribution=pairs.distribution,
                frozen=frozen,
                free=free,
                tokens=tokens,
                bf16=bf16,
            )
        else:
            cost = network_cost(config, settings, frozen=frozen, tokens=tokens, bf16=bf16)
        yield StagePlan(stage.name, what, config.resolution, images, settings.micro_batch, cost)


def _regimes(stage: ModelStage, nets: dict[str, NetConfig]) -> Sequence[tuple[str, int, NetConfig | None]]:
    """What a stage does, on how many images, and the network whose tensors do not train: of each of its phases."""
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
    """A recipe in memory for a size of the ladder: a core, grown to `resolution` if that is more than the core's.

    `core`: pixels of the core's training; by default 64, or `resolution` if that is less.
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
    """Parameters of a network by part: the core, and each resolution's levels with what goes with them."""
    with torch.device("meta"):
        net = UViT(config)
    parts: dict[str, int] = {}
    for name, p in net.named_parameters():
        head, _, rest = name.partition(".")
        key = head if head in ("core", "guidance") else f"{rest.partition('.')[0]} px"
        parts[key] = parts.get(key, 0) + p.numel()
    return parts


def measured_rate() -> float:
    """FLOP/s that training may achieve here: `SHARE` of the rate of matrix products, measured now."""
    from pixelgrow.training.monitor import matmul_rate

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return SHARE * matmul_rate(device, torch.bfloat16 if has_bf16() else torch.float32)
