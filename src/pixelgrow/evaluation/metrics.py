"""Frechet distances, Inception Score, CLIPScore, intervals, and the names under which they are printed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixelgrow import rng
from pixelgrow.errors import UserError
from pixelgrow.evaluation.statistics import Marginals, Moments

STANDARD = 50_000  # images of a published FID


def named(metric: str, images: int) -> str:
    """A metric's name with its number of generated images: FID-2,000. Only 50,000 give FID-50k."""
    return f"{metric}-50k" if images == STANDARD else f"{metric}-{images:,}"


def frechet(a: Moments, b: Moments) -> float:
    """Squared Frechet distance of the normal distributions with these moments (Dowson and Landau 1982); FID, FD-DINOv2.

    |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr sqrt(C_a^1/2 C_b C_a^1/2). Raises UserError for fewer than two images.
    """
    return _frechet(a, b, _root(b.covariance))


def _frechet(a: Moments, b: Moments, root: Tensor) -> float:
    if a.width != b.width:
        raise ValueError(f"features {a.width} and {b.width} wide, expected the same extractor's")
    # The last trace is the sum of the singular values of C_a^1/2 C_b^1/2. Taking these, rather than square roots of the
    # eigenvalues of a product of three, keeps directions without variance (fewer images than features) at 1e-16 of the
    # largest, not at 1e-8, and leaves no imaginary part.
    fidelity = torch.linalg.svdvals(_root(a.covariance).T @ root).sum()
    apart = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    return max(0.0, (apart - 2 * fidelity).item())


def _root(covariance: Tensor) -> Tensor:
    """R (width, rank) with R R^T = covariance: eigenvectors times roots of the eigenvalues that are not rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def fd_ratio(model: Mapping[str, float], heldout: Mapping[str, float]) -> float:
    """The mean over extractors of FD(model, training images) / FD(held-out, training images): 1 is as near as real.

    FDr_k of Yang et al., arXiv 2604.28190, for k extractors. Both map an extractor's name to a distance. Raises
    UserError unless they name the same extractors, and for a held-out distance of 0.
    """
    if model.keys() != heldout.keys() or not model:
        raise UserError(
            f"fd-ratio: got distances of {', '.join(model) or 'no extractor'} for the model and of "
            f"{', '.join(heldout) or 'no extractor'} for held-out images; measure both with the same extractors"
        )
    for name, distance in heldout.items():
        if distance <= 0:
            raise UserError(
                f"fd-ratio: held-out and training images are {distance:g} apart by {name}, expected more than 0; hold "
                "out images that are not among the training images"
            )
    return math.fsum(model[name] / heldout[name] for name in model) / len(model)


GROWING = 40  # images, at least, for a line through distances at growing N


@dataclass(frozen=True)
class Extrapolation:
    """A Frechet distance at N to infinity, and the distances at each N that the line was fitted to."""

    value: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def extrapolated(features: Tensor, reference: Moments, *, points: int = 15) -> Extrapolation:
    """FD of generated images to `reference`: a line in 1/N, read off at 1/N = 0 (Chong and Forsyth, arXiv 1911.07023).

    Features (n, width). As in the released code: 15 sizes N at equal steps from 5,000 to n, a fresh random part of the
    images for each; with fewer than 50,000 images from n / 10. Only the bias of the generated images' number goes, not
    that of the reference's. Raises UserError for fewer than 40 images.
    """
    n = len(features)
    if n < GROWING:
        raise UserError(f"FD at growing N: got {n} images, expected at least {GROWING}; evaluate more images")
    root, distances = _root(reference.covariance), []
    sizes = torch.linspace(min(5000, n // 10), n, points, dtype=torch.float64).long().tolist()
    for size in sizes:
        part = Moments(reference.width)
        for rows in torch.randperm(n, generator=rng.generator("extrapolated", size))[:size].split(4096):
            part.add(features[rows])
        distances.append(_frechet(part, reference, root))
    inverse = 1 / torch.tensor(sizes, dtype=torch.float64)
    y = torch.tensor(distances, dtype=torch.float64)
    slope = ((inverse - inverse.mean()) * (y - y.mean())).sum() / (inverse - inverse.mean()).square().sum()
    return Extrapolation((y.mean() - slope * inverse.mean()).item(), tuple(sizes), tuple(distances))


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation over the splits."""

    mean: float
    std: float


def inception_score(marginals: Marginals) -> InceptionScore:
    """exp(mean KL(p(y|x), p(y))) in each split (Salimans et al., arXiv 1606.03498): from 1 to the number of classes.

    Raises UserError if a split has no image.
    """
    n = marginals.counts
    if not bool(n.all()):
        raise UserError(
            f"Inception Score: got {int(n.sum())} image(s), expected some in each of {len(n)} splits; evaluate more"
        )
    classes = torch.special.entr(marginals.sums / n[:, None]).sum(1)
    scores = (classes - marginals.entropies / n).exp()
    return InceptionScore(scores.mean().item(), scores.std(correction=0).item())


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """100 max(cosine, 0) (B,) fp64 of CLIP's embeddings (B, width) of images and of their prompts.

    Hessel et al., arXiv 2104.08718, multiply by 2.5 instead of 100. The metric is the mean.
    """
    cosine = torch.nn.functional.cosine_similarity(images.double(), texts.double(), dim=1)
    return 100 * cosine.clamp(min=0)


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of independent measurements (one for each sampling seed, or each prompt) and its t interval.

    Raises UserError for fewer than two values.
    """
    n = len(values)
    if n < 2:
        raise UserError(f"an interval takes at least 2 values, got {n}; evaluate with more sampling seeds")
    x = torch.tensor(values, dtype=torch.float64)
    mean, half = x.mean().item(), _t_quantile(level, n - 1) * x.std().item() / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def frechet_interval(parts: Sequence[Moments], reference: Moments, level: float = 0.95) -> Interval:
    """The Frechet distance of all images to `reference`, and its interval from one set of images, by a jackknife.

    parts: moments of equal random parts of the images, ten or so. Each is left out in turn (delete-a-group jackknife;
    Kott 2001, J. Off. Stat. 17), and the t interval has one degree of freedom fewer than there are parts. It covers the
    choice of the images, not that of the reference's, nor the bias of a finite number. Raises UserError as `frechet`.
    """
    root, count = _root(reference.covariance), len(parts)

    def distance(kept: Sequence[Moments]) -> float:
        merged = Moments(reference.width)
        for part in kept:
            merged.merge(part)
        return _frechet(merged, reference, root)

    without = torch.tensor([distance([*parts[:i], *parts[i + 1 :]]) for i in range(count)], dtype=torch.float64)
    error = math.sqrt((count - 1) / count * (without - without.mean()).square().sum().item())
    whole, half = distance(parts), _t_quantile(level, count - 1) * error
    return Interval(whole, max(0.0, whole - half), whole + half)


def _t_quantile(level: float, freedom: int) -> float:
    """t with P(|T| < t) = level for Student's T with an integer number of degrees of freedom."""
    # With theta = atan(t / sqrt(freedom)), P is a finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4).
    odd = freedom % 2
    terms = freedom // 2
    k = 2 * torch.arange(1, max(terms, 1), dtype=torch.float64) + odd
    coefficients = torch.cat([k.new_ones(1), ((k - 1) / k).cumprod(0)])[:terms]
    powers = 2 * torch.arange(terms, dtype=torch.float64) + odd

    def probability(theta: float) -> float:
        total = math.sin(theta) * (coefficients * math.cos(theta) ** powers).sum().item()
        return 2 / math.pi * (theta + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return math.tan(low) * math.sqrt(freedom)
