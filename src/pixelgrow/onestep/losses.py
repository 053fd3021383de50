"""Losses of one-step distillation as pure functions (PaGoDA, Kim et al., arXiv 2405.14822): distances, the adversarial
loss and its weight, differentiable augmentation, and the distributions of guidance weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Norms = Literal["squared", "plain"]
GuidanceDistribution = Literal["captions", "recaptions", "mixed"]
GUIDANCE_DISTRIBUTIONS: tuple[GuidanceDistribution, ...] = get_args(GuidanceDistribution)
Augmentation = Literal["colour", "translation", "cutout"]

DRAWS = 7  # uniform random numbers that `diff_augment` takes for an image
EPS = 1e-6  # least length of a token


# --- distances and adversarial losses ---------------------------------------------------------------------------------


def feature_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Distance (B,) in [0, 4] of images by their token features: a tensor (B, N, C) for each of several layers.

    Tokens are normalised to unit length over their channels (LPIPS, arXiv 1801.03924, eq. 1); the squared difference is
    averaged over tokens, then over layers.
    """
    layers = [
        (F.normalize(p, dim=-1, eps=EPS) - F.normalize(q, dim=-1, eps=EPS)).square().sum(-1).mean(-1)  # (B,)
        for p, q in zip(a, b, strict=True)
    ]
    return torch.stack(layers).mean(0)


def similarity_loss(image: Tensor, text: Tensor) -> Tensor:
    """Mean of 1 - cosine of the embeddings (B, C) of images and their captions, a scalar in [0, 2]."""
    return 1 - F.cosine_similarity(image, text, dim=-1, eps=EPS).mean()


def hinge_discriminator(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Per-token hinge loss of a discriminator, a scalar: the mean over each head's logits (B, N), then over heads."""
    heads = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(heads).mean()


def hinge_generator(fake: Sequence[Tensor]) -> Tensor:
    """The generator's loss against `hinge_discriminator`, a scalar: minus the mean logit, over tokens, then heads."""
    return -torch.stack([f.mean() for f in fake]).mean()


# --- two losses of one generator --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputLoss:
    """A loss of a generator's output with its gradient there; the generator itself is not differentiated yet.

    output: (B, ...), with the generator's graph. value: scalar, detached. gradient: (B, ...), detached.
    """

    output: Tensor
    value: Tensor
    gradient: Tensor

    @property
    def loss(self) -> Tensor:
        """A scalar of the same value and gradient, whose backward() starts at the output."""
        return self.value + (self.gradient * (self.output - self.output.detach())).sum()


def at_output(output: Tensor, loss: Callable[[Tensor], Tensor]) -> OutputLoss:
    """Evaluate `loss(output (B, ...)) -> scalar`, and its gradient with respect to the output."""
    leaf = output.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(leaf.view_as(leaf))  # FLOPs of a module that is given a leaf cannot be counted
    (gradient,) = torch.autograd.grad(value, leaf)
    return OutputLoss(output, value.detach(), gradient)


def adaptive_weight(
    rec_norm: Tensor,
    adv_norm: Tensor,
    norms: Norms,
    scale: float = 0.2,
    limits: tuple[float, float] = (0.01, 10.0),
) -> Tensor:
    """lambda = scale * |grad L_rec| / |grad L_adv| within `limits`, a detached scalar; finite for every adv_norm.

    The norms (scalars) are of the gradients in the generator's last layer. The paper squares them, the released code
    does not.
    """
    ratio = rec_norm.detach() / adv_norm.detach().clamp_min(torch.finfo(adv_norm.dtype).tiny)
    return (scale * (ratio.square() if norms == "squared" else ratio)).clamp(*limits)


@dataclass(frozen=True)
class Balanced:
    """loss: scalar L_rec + weight * L_adv, to call backward() on. weight: lambda, detached scalar."""

    loss: Tensor
    weight: Tensor


def balanced(
    rec: OutputLoss,
    adv: OutputLoss,
    last: Tensor,
    norms: Norms,
    scale: float = 0.2,
    limits: tuple[float, float] = (0.01, 10.0),
) -> Balanced:
    """L_rec + lambda * L_adv with the `adaptive_weight` of their gradients in `last`, the weight of the last layer.

    Each loss was differentiated once, down to the output (`at_output`). Its gradient in `last` follows from that
    through the last layer alone, and one backward() of the result passes through the generator. Written naively, each
    loss would go back through the feature networks twice. The outputs may be halves of one batch.
    """

    def norm(part: OutputLoss) -> Tensor:
        (share,) = torch.autograd.grad(part.output, last, grad_outputs=part.gradient, retain_graph=True)
        return torch.linalg.vector_norm(share)

    weight = adaptive_weight(norm(rec), norm(adv), norms, scale, limits)
    return Balanced(rec.loss + weight * adv.loss, weight)


# --- differentiable augmentation --------------------------------------------------------------------------------------


def diff_augment(x: Tensor, draws: Tensor, policy: Collection[Augmentation]) -> Tensor:
    """Augmented images (B,3,H,W) of x (B,3,H,W), differentiable in x (DiffAugment, Zhao et al., arXiv 2006.10738).

    draws: (B, `DRAWS`) uniform in [0, 1), the only randomness: images with equal rows are augmented alike.
    policy: any of
    "colour"       brightness shifted by up to 0.5, saturation times 0 to 2, contrast times 0.5 to 1.5
    "translation"  by up to 1/8 of each side, filled with zeros
    "cutout"       zeros in a box of half of each side, centred anywhere
    """
    columns = draws.T[..., None, None, None]  # (DRAWS,B,1,1,1)
    brightness, saturation, contrast = columns[:3].to(x.dtype)
    place = columns[3:]
    if "colour" in policy:
        x = x + (brightness - 0.5)
        x = torch.lerp(x.mean(1, keepdim=True), x, 2 * saturation)
        x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, 0.5 + contrast)
    if "translation" in policy:
        x = _shifted(_shifted(x, place[0], 2), place[1], 3)
    if "cutout" in policy:
        x = x * ~(_in_box(x, place[2], 2) & _in_box(x, place[3], 3))
    return x


def integers(u: Tensor, n: int) -> Tensor:
    """Uniform in [0, 1) -> uniform in 0 .. n - 1, int64; 1, which rounding may give, becomes n - 1."""
    return (u * n).long().clamp_max(n - 1)


def _shifted(x: Tensor, u: Tensor, dim: int) -> Tensor:
    """x (B,C,H,W) moved along `dim` by up to an eighth, u (B,1,1,1) in [0, 1) deciding by how much; zeros move in."""
    size = x.shape[dim]
    most = math.floor(size / 8 + 0.5)
    padded = F.pad(x, (most, most, 0, 0) if dim == 3 else (0, 0, most, most))
    start = 2 * most - integers(u, 2 * most + 1)  # `most` leaves the image where it is
    return padded.take_along_dim(start + _positions(x, dim), dim)


def _in_box(x: Tensor, u: Tensor, dim: int) -> Tensor:
    """True at the positions along `dim` that a box of half its size covers, as (B,1,H,1) or (B,1,1,W)."""
    size = x.shape[dim]
    box = math.floor(size / 2 + 0.5)
    start = integers(u, size + 1 - box % 2) - box // 2
    at = _positions(x, dim)
    return (at >= start) & (at < start + box)


def _positions(x: Tensor, dim: int) -> Tensor:
    """0, 1, ... along `dim` of x (B,C,H,W), as (1,1,H,1) or (1,1,1,W)."""
    return torch.arange(x.shape[dim], device=x.device).view((1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1))


# --- guidance as a condition ------------------------------------------------------------------------------------------


def guidance_weights(u: Tensor, distribution: GuidanceDistribution, caption: Tensor | None = None) -> Tensor:
    """Guidance weights omega in the shape of u, uniform in [0, 1), by the distribution's inverse CDF.

    "captions": U[2, 10]. "recaptions": a Gaussian of mean 2 and deviation 3, truncated to [1, 10]. "mixed": the first
    where `caption`, in the shape of u, is 0, an image's original caption, and the second elsewhere. All three are those
    of PaGoDA (arXiv 2405.14822).
    """
    if distribution == "mixed":
        assert caption is not None
        original = caption.to(u.device) == 0
        return torch.where(original, guidance_weights(u, "captions"), guidance_weights(u, "recaptions"))
    if distribution == "captions":
        return 2 + 8 * u
    whole = NormalDist(2, 3)
    low, high = whole.cdf(1), whole.cdf(10)
    z = torch.special.ndtri(low + (high - low) * u.double())
    return (whole.mean + whole.stdev * z).clamp(1, 10).to(u.dtype)


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation and limits of a distribution of guidance weights; "mixed" counts both kinds equally."""

    mean: float
    std: float
    low: float
    high: float


def spread_of(distribution: GuidanceDistribution) -> Spread:
    """See `Spread`; mean and deviation from a million evenly spaced quantiles."""
    n = 2**20
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ends, kinds = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    weights = guidance_weights(torch.cat([u, u]), distribution, torch.arange(2 * n) // n)
    limits = guidance_weights(ends, distribution, kinds)
    return Spread(float(weights.mean()), float(weights.std(correction=0)), float(limits.min()), float(limits.max()))
