"""A recipe's stages on a cluster: the layout of each, its speed and length, what it takes of disks and of CPU cores."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import torch

from pixelgrow.errors import UserError
from pixelgrow.models.config import NetConfig
from pixelgrow.models.uvit import UViT
from pixelgrow.plan.gpus import ROOM, Cluster
from pixelgrow.plan.layout import Layout, Parts, Sizes, cheapest, generator_sizes, sizes, what_would
from pixelgrow.plan.network import Cost, freeze_below, parameters_of
from pixelgrow.plan.recipe import Phase, cost_of, distillation_of, phases
from pixelgrow.plan.shapes import networks
from pixelgrow.recipe.stages import PairsStage, Recipe, makes_generator
from pixelgrow.training.optim import trainable
from pixelgrow.training.settings import Checkpointing
from pixelgrow.training.state import KEPT

# Images/s that one core decodes and resizes (docs/benchmarks.md), by the side that is wanted.
DECODED = ((64, 390.0), (256, 114.0), (1024, 12.0))
TF32 = 0.5  # of the rate in bfloat16; pairs are made in it


@dataclass(frozen=True)
class Placed:
    """A phase of a stage on a cluster.

    layout: None if it does not fit, and `fault` says what would. cores: of CPUs that decode as fast as it trains, on
    all machines together; 0 where nothing is decoded.
    """

    name: str
    what: str
    resolution: int
    images: int
    layout: Layout | None = None
    images_per_second: float = 0.0
    cores: int = 0
    fault: str = ""
    trains: bool = True

    @property
    def seconds(self) -> float:
        return self.images / self.images_per_second if self.images_per_second else math.inf


@dataclass(frozen=True)
class Disk:
    """Bytes of a stage's files. states: to resume from, until it is done, with the one that is being written.

    kept: checkpoint, snapshots, pairs.
    """

    name: str
    states: int
    kept: int


def place(recipe: Recipe, cluster: Cluster) -> list[Placed]:
    """Every phase of a recipe on a cluster, in order. Raises UserError for a batch that its GPUs cannot share."""
    nets = networks(recipe)
    return [_placed(phase, recipe, nets, cluster) for phase in phases(recipe, nets)]


def _placed(phase: Phase, recipe: Recipe, nets: dict[str, NetConfig], cluster: Cluster) -> Placed:
    stage, found = phase.stage, Placed(phase.name, phase.what, phase.config.resolution, phase.images)
    if isinstance(stage, PairsStage):
        return _pairs(replace(found, trains=False), cost_of(phase, recipe, nets, gpu=True), stage, cluster)
    settings = stage.training()
    if settings.batch % cluster.gpus:
        raise UserError(
            f"stage {stage.name!r}: got a batch of {settings.batch} for {cluster.gpus} GPUs, expected a multiple of "
            f"{cluster.gpus}: write another batch, or plan for fewer GPUs"
        )

    @cache
    def measure(mode: Checkpointing) -> Sizes:
        if makes_generator(stage):
            return generator_sizes(distillation_of(phase, recipe, nets), settings, mode)
        return sizes(phase.config, settings, phase.frozen, recipe.text.max_tokens, mode)

    layout = cheapest(cluster, settings.batch, measure)
    if layout is None:
        return replace(found, fault=what_would(cluster, settings.batch, measure))
    speed = cluster.gpus * cluster.rate / layout.flops
    decoded = 0 if makes_generator(stage) else math.ceil(speed / decoded_per_second(found.resolution))
    return replace(found, layout=layout, images_per_second=speed, cores=decoded)


def _pairs(found: Placed, cost: Cost, stage: PairsStage, cluster: Cluster) -> Placed:
    """Pairs are made on all GPUs, one shard on each at a time."""
    workers = min(cluster.gpus, math.ceil(stage.n / stage.shard))
    m = cost.memory
    peak = m.weights + (m.peak - m.weights) // (stage.workers or 1)  # of one worker
    parts = Parts(m.weights, 0, 0, 0, peak - m.weights, 0, 0, peak)
    if peak > cluster.room:
        return replace(found, fault=f"it takes {peak / ROOM / 2**30:.0f} GiB a GPU: lower its batch of {stage.batch}")
    layout = Layout(workers, 1, 1, stage.batch, False, parts, cost.flops)
    return replace(found, layout=layout, images_per_second=workers * cluster.rate * TF32 / cost.flops)


def decoded_per_second(side: int) -> float:
    """Images/s that one core decodes for a resolution: between the measured ones, a straight line in logarithms."""
    for (low, fast), (high, slow) in pairwise(DECODED):
        if side <= high:
            share = max(0.0, math.log(side / low) / math.log(high / low))
            return fast * (slow / fast) ** share
    return DECODED[-1][1] * (DECODED[-1][0] / side) ** 2


def disks(recipe: Recipe) -> list[Disk]:
    """What the files of every stage take."""
    nets = networks(recipe)
    found: dict[str, Disk] = {}
    for phase in phases(recipe, nets):
        stage = phase.stage
        if isinstance(stage, PairsStage):
            latent, image = phase.config.latent_resolution**2, phase.config.resolution**2
            values = latent + (image if stage.direction == "sample" else 0)
            kept = 2 * phase.config.space.channels * values * stage.n * (1 + stage.flip)
            found[phase.name] = Disk(phase.name, 0, kept)
            continue
        settings = stage.training()
        weights, training = _numbers(phase)
        slots = 1 if settings.optimizer == "muon" else 2
        state = 4 * training * (1 + slots + len(settings.ema))
        if makes_generator(stage):  # with its discriminator's
            memory = cost_of(phase, recipe, nets, gpu=True).memory
            state, training = memory.state, (memory.state - memory.optimizer - memory.averages) // 4
        copies = phase.images // settings.snapshot_every if settings.snapshot_every else 0
        kept = 4 * weights + copies * 2 * training * len(settings.ema)
        before = found.get(phase.name, Disk(phase.name, 0, 0))  # an earlier phase of the stage
        found[phase.name] = Disk(phase.name, max(before.states, (KEPT + 1) * state), before.kept + kept)
    return list(found.values())


def _numbers(phase: Phase) -> tuple[int, int]:
    """Parameters of a phase's network, and of those that train."""
    with torch.device("meta"):
        net = UViT(phase.config)
    freeze_below(net, phase.frozen)
    return parameters_of(net), sum(p.numel() for p in trainable(net).values())
