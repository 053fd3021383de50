"""The estimator omega(x, c): the guidance weight that an image looks sampled with (PaGoDA, arXiv 2405.14822).

A guided discriminator is conditioned on the guidance weight of each image, and real images have none. A small network
estimates it; it was trained on images that the teacher sampled with known weights. Features and network are ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelgrow import rng
from pixelgrow.checkpoint import file_hash
from pixelgrow.data.order import Order
from pixelgrow.errors import UserError
from pixelgrow.models.cond import Cond
from pixelgrow.models.layers import box_down, zero_
from pixelgrow.onestep.features import TeacherFeatures
from pixelgrow.onestep.losses import GUIDANCE_DISTRIBUTIONS, GuidanceDistribution, spread_of
from pixelgrow.onestep.pairs import read_shard, shard_fault, write_shard
from pixelgrow.precision import tf32
from pixelgrow.training.objective import Terms

PART = "estimator"
FACTS, WEIGHTS = "estimator.json", "estimator.safetensors"


class Estimator(nn.Module):
    """Descriptions (B, width) of images -> guidance weights (B,), in eval mode within the limits of `distribution`.

    The network predicts the weight's difference from the distribution's mean, in standard deviations; 0 at the start.
    """

    mean: Tensor  # (width,), of the descriptions that it is trained on
    std: Tensor  # (width,), of the same

    def __init__(self, width: int, distribution: GuidanceDistribution, hidden: int = 128) -> None:
        super().__init__()
        self.distribution, self.spread = distribution, spread_of(distribution)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.up, self.mix, self.out = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)
        zero_(self.out)

    def forward(self, description: Tensor) -> Tensor:
        h = F.gelu(self.up((description - self.mean) / self.std))
        omega = self.spread.mean + self.spread.std * self.out(F.gelu(h + self.mix(h)))[:, 0]  # (B,)
        return omega if self.training else omega.clamp(self.spread.low, self.spread.high)

    @torch.no_grad()
    def standardise(self, descriptions: Tensor) -> None:
        """Set mean and deviation to those of descriptions (N, width), so that inputs arrive standardised."""
        self.mean.copy_(descriptions.mean(0))
        self.std.copy_(descriptions.std(0, correction=0).clamp_min(1e-4))


@torch.no_grad()
@tf32()
def described(features: TeacherFeatures, images: Tensor, cond: Cond) -> Tensor:
    """The estimator's input for images (B, 3, H, W) in [-1, 1]: (B, width).

    Mean and standard deviation of the teacher's tokens at its own resolution, for each layer, and the condition as the
    teacher embeds it.
    """
    small = box_down(images, images.shape[-1] // features.teacher.resolution)
    found = features(small, cond, small.new_full((len(small), 2), 0.5))
    moments = [m for t in found.tokens for m in (t.mean(1), t.std(1, correction=0))]
    return torch.cat([*moments, found.vec], 1).float()


class Labels:
    """`labels(images, cond) -> omega (B,)`: an estimator with the features that it takes."""

    def __init__(self, estimator: Estimator, features: TeacherFeatures) -> None:
        self.estimator, self.features = estimator.eval().requires_grad_(False), features

    def __call__(self, images: Tensor, cond: Cond) -> Tensor:
        return self.estimator(described(self.features, images, cond))


# --- its training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EstimateBatch:
    """`description` (B, width) of images sampled with guidance weights `guidance` (B,); `index` (B,) int64, positions
    in the training stream."""

    description: Tensor
    guidance: Tensor
    index: Tensor


def batches_of(
    description: Tensor, guidance: Tensor, batch: int, seed: int, start: int, step: int | None = None
) -> Iterator[EstimateBatch]:
    """Endless batches of descriptions (N, width) and their weights (N,), at the positions start, start + step, ... of
    a stream that is shuffled in each epoch; `step`: `batch` if None."""
    order = Order([len(description)], seed=rng.seed_of(seed, "estimate"))
    for at in count(start, step or batch):
        rows = [order.at(position).item for position in range(at, at + batch)]
        yield EstimateBatch(description[rows], guidance[rows], torch.arange(at, at + batch))


class EstimateObjective:
    """Squared error of the guidance weight over the distribution's variance: the best constant has 1."""

    def __init__(self, estimator: Estimator) -> None:
        self.estimator = estimator.train()
        self.modules: dict[str, nn.Module] = {PART: estimator}
        self.rates: Mapping[str, float] = {PART: 1.0}

    def loss(self, batch: EstimateBatch, part: str = PART) -> Terms:
        """The mean error of a batch."""
        device = self.estimator.mean.device
        omega = self.estimator(batch.description.to(device)).float()
        return Terms(((omega - batch.guidance.to(device)) / self.estimator.spread.std).square().mean())


# --- on disk ----------------------------------------------------------------------------------------------------------


def save_estimator(folder: Path, estimator: Estimator, teacher: str, rmse: float) -> dict[str, object]:
    """Write the weights of an estimator for the teacher with the hash `teacher`.

    Returns the content of `estimator.json`, which the caller writes last.
    """
    write_shard(folder / WEIGHTS, {n: t.detach().cpu().contiguous() for n, t in estimator.state_dict().items()})
    return {
        "teacher": teacher,
        "distribution": estimator.distribution,
        "heldout_rmse": rmse,
        "guidance_deviation": estimator.spread.std,
        "sha256": file_hash(folder / WEIGHTS),
    }


def load_estimator(folder: Path, teacher: str, distribution: GuidanceDistribution, device: torch.device) -> Estimator:
    """The estimator in a stage's folder. Raises UserError if it is damaged, or of another teacher or distribution."""
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        theirs, whose, digest = facts["distribution"], str(facts["teacher"]), facts["sha256"]
        if theirs not in GUIDANCE_DISTRIBUTIONS:
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{folder} holds no finished estimator: run the estimate stage first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); delete {folder} to train it again") from None
    weights = folder / WEIGHTS
    tensors = read_shard(weights)
    if tensors is None or file_hash(weights) != digest:
        raise UserError(f"{weights} {shard_fault(weights, f'delete {folder} to train it again')}")
    if whose != teacher:
        raise UserError(
            f"the estimator in {folder} was trained on images of the teacher {whose[:12]}, the pairs are of "
            f"{teacher[:12]}: train one on pairs of that teacher"
        )
    if theirs != distribution:
        raise UserError(
            f"the estimator in {folder} was trained with guidance: {theirs}, the pairs have {distribution}: "
            "train one on pairs of that distribution"
        )
    estimator = Estimator(len(tensors["mean"]), theirs)
    estimator.load_state_dict(tensors, strict=True)
    return estimator.to(device)
