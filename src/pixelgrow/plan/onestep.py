"""The cost of one-step stages: pairs by a teacher's ODE, and the updates of generator and discriminator.

As in `network.py`, the stages' own code runs on fake tensors; here with whole networks.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pixelgrow.diffusion.denoiser import Denoiser, DiffusionConfig
from pixelgrow.diffusion.generator import Generator
from pixelgrow.diffusion.guidance import Guided
from pixelgrow.diffusion.progressive import Floor, climb, floors_of, needed_floor, upscaling
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import CoreConfig, NetConfig
from pixelgrow.models.layers import box_down
from pixelgrow.models.uvit import UViT
from pixelgrow.onestep.distill import GENERATOR, DistillBatch, DistillObjective
from pixelgrow.onestep.estimator import Labels, described
from pixelgrow.onestep.features import FeatureDistance, FeatureOutput, TeacherFeatures
from pixelgrow.onestep.losses import GuidanceDistribution
from pixelgrow.onestep.networks import networks_named
from pixelgrow.onestep.pairs import Ode
from pixelgrow.onestep.settings import LossSettings
from pixelgrow.plan.network import (
    Cost,
    Measured,
    Memory,
    blank_cond,
    bytes_of,
    default_dtype,
    freeze_below,
    measured,
    memory_of,
    parameters_of,
    spent,
)
from pixelgrow.recipe.stages import PairsStage
from pixelgrow.training.denoise import recompute_blocks
from pixelgrow.training.settings import TrainSettings

FEW = 4  # steps that reach every solver's peak of memory


# --- pairs ------------------------------------------------------------------------------------------------------------


def pairs_cost(
    stage: PairsStage,
    teacher: NetConfig,
    diffusion: DiffusionConfig | None = None,
    *,
    low: NetConfig | None = None,
    tokens: int = 32,
) -> Cost:
    """The cost of making a stage's pairs, per image of its `n`. With `flip`, every source counts as one to mirror.

    `diffusion`: the teacher's; its noise levels decide at how many steps the gates are open. One evaluation is measured
    at each resolution, and the solver runs without a network to count the evaluations. `low`: the generator whose
    images are upscaled; the work of its one evaluation is left out. Workers share a device.
    """
    guidance = 2.0 if isinstance(stage.guidance, str) else stage.guidance  # any weight but 1 costs the same
    few, whole = (_levels(stage, steps, teacher, diffusion) for steps in (min(FEW, stage.steps), stage.steps))
    with FakeTensorMode(), torch.no_grad():
        denoiser = Denoiser(UViT(teacher), diffusion)
        denoiser.gated = False  # fake noise levels open no gate; the floors decide what is evaluated
        cond = blank_cond(teacher.core, stage.batch, tokens)
        x = torch.zeros(stage.batch, teacher.space.channels, teacher.resolution, teacher.resolution)

        def floors_with(guidance: float) -> list[Floor]:
            floors = floors_of(Guided(denoiser, cond, guidance=guidance))
            if low is None:
                return floors
            image = torch.zeros(stage.batch, low.space.channels, low.resolution, low.resolution)
            return upscaling(floors, image, teacher.resolution)

        floors = floors_with(guidance)
        below, above = stage.interval or (0.0, math.inf)
        counts: Counter[tuple[int, bool]] = Counter()  # evaluations by floor and whether they are guided

        def count(scale: int, x: Tensor, sigma: float) -> Tensor:
            level = scale * sigma
            counts[needed_floor(floors, level), below < level <= above] += 1
            return x

        counting = [replace(floor, denoise=partial(count, floor.scale)) for floor in floors]
        deque(climb(counting, x, whole, stage.sampler), maxlen=0)
        inverts = stage.direction == "invert"
        solved = spent(lambda: deque(climb(floors[-1:], x if inverts else few[0] * x, few, stage.sampler), maxlen=1)[0])
        of = {True: floors, False: floors_with(1.0)}
        flops = 0.0
        for (i, guided), calls in counts.items():
            floor = of[guided][i]
            flops += calls * spent(partial(floor.denoise, box_down(x, floor.scale), 1.0)).forward / stage.batch
    core, weights = bytes_of(denoiser.net.core), bytes_of(denoiser)
    return Cost(
        parameters={"core": core // 4, "levels": (weights - core) // 4, "training": 0},
        work={"forward": flops * (1 + stage.flip)},
        memory=Memory(weights, 0, 0, 0, 0, weights + (stage.workers or 1) * solved.peak),
    )


def _levels(stage: PairsStage, steps: int, teacher: NetConfig, diffusion: DiffusionConfig | None) -> list[float]:
    """The noise levels of the stage's `Ode` with so many steps, in the stage's direction."""
    config, scale = diffusion or DiffusionConfig(), teacher.latent_resolution / teacher.core_resolution
    levels = Ode(stage.sampler, steps, scale * config.sigma_min, scale * config.sigma_max).sigmas.tolist()
    return levels[::-1] if stage.direction == "invert" else levels


# --- a generator ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measuring:
    """What a micro-batch of a one-step generator's training takes.

    parts: each network that trains, by name. core: parameters of the generator's. teacher: bytes. alone: FLOPs of the
    generator, forward and backward, for one image from each latent of the pairs.
    """

    parts: dict[str, Measured]
    core: int
    teacher: int
    alone: int


@dataclass(frozen=True)
class Distillation:
    """What trains a generator of `config` with the pairs and the features of `teacher`.

    distribution: of the pairs' guidance weights. frozen: the generator that it grew from, whose tensors do not train,
    except the last `free` residual blocks. Feature networks from outside are not loaded and not counted.
    """

    config: NetConfig
    teacher: NetConfig
    losses: LossSettings
    distribution: GuidanceDistribution | None = None
    frozen: NetConfig | None = None
    free: int = 0
    tokens: int = 32

    def measured(
        self, settings: TrainSettings, *, bf16: bool, gpu: bool, weights: torch.dtype = torch.float32
    ) -> Measuring:
        """A micro-batch of these settings.

        weights: what the generator has its weights in while it is evaluated: a sharded one, bfloat16.
        """
        with FakeTensorMode():
            with default_dtype(weights):
                net = UViT(self.config)
            teacher = Denoiser(UViT(self.teacher))
            freeze_below(net, self.frozen, self.free)
            text = _Captions(self.config.core, self.tokens)
            generator = Generator(net)
            objective = _objective(generator, TeacherFeatures(teacher), self.losses, self.distribution, text)
            recompute_blocks(net, settings.activation_checkpointing)
            batch = _batch(self.config, settings.micro_batch, self.distribution)
            parts = {
                part: measured(module, settings, lambda part=part: objective.loss(batch, part).loss, bf16=bf16, gpu=gpu)  # type: ignore[misc]
                for part, module in objective.modules.items()
            }
            alone = spent(lambda: generator(batch.latent, text.cond(batch.text), batch.guidance).sum(), bf16=bf16)
        return Measuring(parts, parameters_of(net.core), bytes_of(teacher), alone.forward + alone.backward)


def distill_cost(of: Distillation, settings: TrainSettings, *, bf16: bool = False, gpu: bool = False) -> Cost:
    """The cost of training a generator. Parameters are the generator's."""
    found = of.measured(settings, bf16=bf16, gpu=gpu)
    parts = found.parts
    return Cost(
        parameters=parts[GENERATOR].parameters(found.core),
        work={part: (p.forward + p.backward) / settings.micro_batch for part, p in parts.items()},
        memory=memory_of(list(parts.values()), settings, others=found.teacher),
    )


def _objective(
    generator: Generator,
    teacher: TeacherFeatures,
    losses: LossSettings,
    distribution: GuidanceDistribution | None,
    text: _Captions,
) -> DistillObjective:
    """The objective, with stand-ins for feature networks from outside."""
    outside, elsewhere = networks_named(losses), _Elsewhere(teacher)
    return DistillObjective(
        generator,
        elsewhere if "discriminator" in outside else teacher,
        text,
        losses,
        seed=0,
        distance=FeatureDistance(elsewhere if "distance" in outside else teacher),
        similarity=(lambda images, texts: images.mean()) if "similarity" in outside else None,
        distribution=distribution,
        labels=_Labels(teacher) if distribution else None,
    )


def _batch(config: NetConfig, n: int, distribution: GuidanceDistribution | None) -> DistillBatch:
    image, latent = (
        torch.zeros(n, config.space.channels, side, side) for side in (config.resolution, config.latent_resolution)
    )
    texts = tuple(map(str, range(n)))  # all different, as most captions of a batch are
    index: Any = range(n)  # the values of a fake tensor cannot be read
    guidance, captions = (torch.ones(n), torch.zeros(n, dtype=torch.int64)) if distribution else (None, None)
    return DistillBatch(image, texts, index, latent, image, texts, guidance, captions)


@dataclass(frozen=True)
class _Captions:
    """Conditions of any captions, each of `tokens` tokens."""

    core: CoreConfig
    tokens: int

    def cond(self, texts: Sequence[str]) -> Cond:
        return blank_cond(self.core, len(texts), self.tokens)


class _Labels(Labels):
    """Labels that cost the teacher's features alone; the estimator's few layers are left out."""

    def __init__(self, features: TeacherFeatures) -> None:
        self.features = features

    def __call__(self, images: Tensor, cond: Cond) -> Tensor:
        return described(self.features, images, cond)[:, 0]


class _Elsewhere:
    """Features in place of a network that is not loaded: one token, the mean of the image."""

    def __init__(self, teacher: TeacherFeatures) -> None:
        self.teacher, self.vec_width = teacher, teacher.vec_width
        self.channels = teacher.teacher.space.channels

    def widths(self, resolution: int) -> list[int]:
        return [self.channels]

    def vec(self, cond: Cond) -> Tensor:
        return self.teacher.vec(cond)

    def __call__(self, images: Tensor, cond: Cond, crop: Tensor) -> FeatureOutput:
        return FeatureOutput([images.mean((2, 3))[:, None]], self.vec(cond))
