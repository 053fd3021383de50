"""A cascade's second model: a diffusion model of large images, conditioned on small ones. What growth replaces.

Built as cascades are (CDM, Ho et al., arXiv 2106.15282; Imagen, Saharia et al., arXiv 2205.11487): a network of its own
receives the noisy large image and, as more channels, the small image enlarged. In training the small image is the
average of the large one with noise added to it (conditioning augmentation), of a level that is drawn for each image and
told to the network; in sampling it is the first model's, with noise of one fixed level. The network is the UViT that
`scratch` trains, but for its channels, and it reads the caption, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pixelgrow import rng
from pixelgrow.data.buckets import Shapes, square
from pixelgrow.data.loader import Batch
from pixelgrow.diffusion.denoiser import Denoiser, DiffusionConfig, NoiseSchedule, coefficients, column
from pixelgrow.diffusion.loss import weight
from pixelgrow.diffusion.sampling import sample
from pixelgrow.evaluation.images import Made, eight_bit
from pixelgrow.evaluation.judges import SceneJudge
from pixelgrow.evaluation.protocol import Plan, evaluate
from pixelgrow.evaluation.shards import Shards
from pixelgrow.growth import grown_config
from pixelgrow.model import Model
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import PIXELS, NetConfig, Space
from pixelgrow.models.layers import box_down, up_nearest
from pixelgrow.models.uvit import UViT
from pixelgrow.pictures import to_float
from pixelgrow.recipe.stages import EvaluateStage, ModelStage
from pixelgrow.stages.evaluate import MEASURED, accuracy_of, real_of
from pixelgrow.stages.materials import BAD_FILES, Materials
from pixelgrow.stages.train import SPREAD
from pixelgrow.training import loop, state
from pixelgrow.training.denoise import Conditions
from pixelgrow.training.objective import Terms
from pixelgrow.training.settings import TrainSettings
from pixelgrow.writing import atomic, write_json

CHANNELS = Space(channels=7)  # the noisy image, the small one enlarged, the level of its noise
MOST = 0.5  # the largest level of noise on the small image in training, in units of the data range [-1, 1]
LEVEL = 0.1  # and in sampling
# In core units. The small image tells what a large one is like in the large, so no level is needed above these.
DIFFUSION = DiffusionConfig(sigma_min=0.002, sigma_max=20.0)
NOISE = {"mean": 0.0, "std": 1.5}
WEIGHTS = "model.safetensors"


def config_above(low: NetConfig, to: int, patch: int) -> NetConfig:
    """The network that enlarges images of `low` to `to` px: of the shape that `scratch` has there."""
    return grown_config(low, to, "scratch", patch=patch).model_copy(update={"space": CHANNELS}).checked()


class Enlarger(nn.Module):
    """D(x, sigma, cond; small image, level of its noise) -> x0, with EDM's preconditioning."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.denoiser = Denoiser(UViT(config), DIFFUSION)
        self.factor = config.resolution // config.core_resolution

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond, small: Tensor, level: Tensor) -> Tensor:
        """x (B, 3, H, W) at sigma (B,); small (B, 3, H/k, W/k) with noise of level (B,) -> (B, 3, H, W)."""
        net, std = self.denoiser.net, DIFFUSION.sigma_data
        c_skip, c_out, c_in = map(column, coefficients("edm", sigma, std))
        told = column(4 * level - 1).expand(-1, 1, *x.shape[-2:])  # within [-1, 1]
        given = torch.cat([c_in * x, up_nearest(small, self.factor) / std, told], 1)
        ctx = net.embed(torch.log(sigma.float() / self.denoiser.noise_scale) / 4, cond)
        return c_skip * x + c_out * net.rung(net.config.rungs[0], given, ctx).image[:, :3].to(x.dtype)


class EnlargerObjective:
    """Weighted squared error of the large image. All randomness is keyed by (seed, index)."""

    def __init__(self, model: Enlarger, text: Conditions, settings: TrainSettings, seed: int) -> None:
        self.modules: dict[str, nn.Module] = {"enlarger": model}
        self.rates: Mapping[str, float] = {"enlarger": 1.0}
        self.model, self.text, self.settings, self.seed = model, text, settings, seed
        self.schedule = NoiseSchedule(settings.noise, model.denoiser)
        model.train()

    def loss(self, batch: Batch, part: str = "enlarger") -> Terms:
        """The mean weighted error of a batch."""
        seed, x0 = self.seed, to_float(batch.image)
        sigma = self.schedule.sigma(rng.uniform(seed, "sigma", batch.index)).float()
        level = MOST * rng.uniform(seed, "level", batch.index).float()
        small = box_down(x0, self.model.factor)
        small = small + column(level) * rng.normal(small.shape[1:], seed, "augment", batch.index)
        eps = rng.normal(x0.shape[1:], seed, "noise", batch.index)
        found = self.model(x0 + column(sigma) * eps, sigma, self.text.cond(batch.text), small, level)
        weights = weight(self.settings.weighting, sigma, DIFFUSION.sigma_data)
        losses = weights * (found.float() - x0).square().mean((1, 2, 3))
        return Terms(losses.mean(), {}, sigma, losses.detach())


@dataclass(frozen=True)
class Over:
    """An enlarger bound to small images (B, 3, h, w): the denoiser that a sampler takes."""

    model: Enlarger
    small: Tensor
    level: float = LEVEL
    space: Space = PIXELS

    @property
    def sigma_min(self) -> float:
        return self.model.denoiser.sigma_min

    @property
    def sigma_max(self) -> float:
        return self.model.denoiser.sigma_max

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond, /) -> Tensor:
        return self.model(x, sigma, cond, self.small, torch.full((len(x),), self.level))


@torch.no_grad()
def enlarged(model: Enlarger, small: Tensor, cond: Cond, numbers: Sequence[int], seed: int, steps: int) -> Tensor:
    """Large images (B, 3, H, W) of small ones, a function of (seed, number)."""
    noisy = small + LEVEL * rng.normal(small.shape[1:], seed, "cascade", numbers)
    h, w = small.shape[-2:]
    size = (model.factor * h, model.factor * w)
    # Another seed than the first model's: its noise must not be a part of this one's.
    own = rng.seed_of(seed, "enlarger") % 2**31
    return sample(Over(model, noisy), cond, size=size, seed=own, index=numbers, steps=steps, batch=len(small)).images


class Cascade:
    """The candidate of an evaluation: a core's samples, enlarged."""

    prompts = None
    conditions: Any = "text"

    def __init__(self, core: Path, model: Enlarger, stage: EvaluateStage, materials: Materials) -> None:
        self.name, self.model, self.stage, self.materials = "cascade", model.eval(), stage, materials
        self.core = Model.from_pretrained(core, materials.device)
        side = self.core.resolution * model.factor
        self.size = (side, side)

    def describe(self) -> dict[str, Any]:
        return {"kind": "cascade", "core": self.core.config.sha256, "sampling": self.core.settings(**self.stage.given)}

    def make(self, prompts: Sequence[str], numbers: Sequence[int], seed: int) -> Made:
        cond = self.materials.cond(prompts)
        found = self.core.sampler(seed=seed, batch=self.stage.batch, **self.stage.given)(cond, numbers, None)
        assert self.stage.steps is not None
        images = enlarged(self.model, found.images, cond, numbers, seed, self.stage.steps)
        return Made(eight_bit(images, self.name, numbers), found.nfe + self.stage.steps)


def run_cascade(
    training: ModelStage, asked: EvaluateStage, core: str, config: NetConfig, materials: Materials
) -> dict[str, Any]:
    """Train (or go on with) the enlarger of a core's images, and evaluate the cascade; what is done is left alone.

    training: its settings and name, which is that of its folder; asked: of the evaluation, whose folder gets
    `metrics.json` as an `evaluate` stage's."""
    seed = rng.seed_of(materials.recipe.seed, "stage", training.name, "")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of(materials.recipe.seed, "weights", training.name))
        model = Enlarger(config)
    weights = materials.folder / training.name / WEIGHTS
    if not weights.is_file():
        train_enlarger(model, training, seed, materials)
        with atomic(weights) as part:
            save_file({k: t.contiguous() for k, t in model.state_dict().items()}, part)
        state.clear(weights.parent / "state")
    model.load_state_dict(load_file(weights))
    return judge(Cascade(materials.checkpoint(core), model, asked, materials), asked, materials)


def train_enlarger(model: Enlarger, stage: ModelStage, seed: int, materials: Materials) -> None:
    """Train; the averaged weights are in the model at the end."""
    settings, folder, side = stage.training(), materials.folder / stage.name, model.denoiser.resolution
    loader = materials.loader(materials.data.mixture(stage), square(side), settings, seed, folder / BAD_FILES)
    held = materials.heldout(1, square(side))
    texts = list(loader.texts())
    materials.encode(stage.name, chain(texts, held.captions))
    model.denoiser.net.core.whiten(materials.tokens(texts[:: math.ceil(len(texts) / SPREAD)]))
    objective = EnlargerObjective(model, materials.text, settings, seed)
    result = loop.train(objective, loader.batches, settings, folder, seed=seed, name=f"{folder.parent.name}/cascade")
    with result.averages["enlarger"][0].applied():
        averaged = {k: t.clone() for k, t in model.state_dict().items()}
    model.load_state_dict(averaged)


def judge(candidate: Cascade, stage: EvaluateStage, materials: Materials) -> dict[str, Any]:
    """What an `evaluate` stage measures on samples, without what it measures on a denoiser's errors."""
    folder, held = materials.folder / stage.name, materials.heldout(stage.prompts, Shapes(candidate.size))
    materials.encode(stage.name, held.captions)
    metrics = tuple(dict.fromkeys([*(stage.metrics or ()), "scenes"]))
    judged = SceneJudge(["scenes"], held.captions)
    seeds, extractors = range(materials.recipe.seed, materials.recipe.seed + 1), materials.extractors(stage)
    plan = Plan(metrics, seeds, held.captions, extractors, judged, real_of(held), batch=stage.batch)
    shards = Shards(folder / MEASURED, plan.describe(candidate))
    values = evaluate(candidate, plan, shards).values
    rows = values["metrics"]
    found = {"nfe": values["cost"]["nfe"], "accuracy": accuracy_of(rows), "metrics": rows}
    write_json(folder / "metrics.json", found)
    shards.clear()
    return found
