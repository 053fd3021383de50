"""Sampling: from noise and conditions to images, by a denoiser in many steps or by a generator in one.

Noise levels: `karras_grid` and `native_grid`. Solvers: solvers.py. Guidance: guidance.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pixelgrow.diffusion.guidance import Guided, Network, exact_factors
from pixelgrow.diffusion.progressive import climb, evaluations, floors_of
from pixelgrow.diffusion.solvers import Noise
from pixelgrow.errors import UserError
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import PIXELS, Space
from pixelgrow.precision import tf32
from pixelgrow.rng import normal

NO_PREVIEW = "no preview: the model was not grown by exact rungs, so no smaller image is the same image; drop it"
GUIDED_PREVIEW = "no preview: the guide is another model, which changes the smaller image too; drop the guide"
MAX_STEPS, MAX_SIDE = 10_000, 8192  # more is a typing error


class DenoiserLike(Protocol):
    """What sampling needs of a denoiser."""

    @property
    def sigma_min(self) -> float: ...
    @property
    def sigma_max(self) -> float: ...
    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond, /) -> Tensor: ...


class OneStep(Protocol):
    """What sampling needs of a one-step generator."""

    def preview(self, z: Tensor, cond: Cond, guidance: Tensor | None, /) -> Tensor: ...
    def latent_size(self, size: tuple[int, int], /) -> tuple[int, int]: ...
    def __call__(self, z: Tensor, cond: Cond, guidance: Tensor | None, /) -> Tensor: ...


class Schedule(Protocol):
    """A training distribution of sigma by its inverse CDF: u float64 in [0, 1) -> sigma, increasing."""

    def sigma(self, u: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Samples:
    """`images` (N,3,H,W) float in [-1, 1], or latents (N,C,h,w); `nfe`: network evaluations spent on each."""

    images: Tensor
    nfe: int


# --- grids: (steps + 1,) float64 from sigma_max down to 0 -------------------------------------------------------------


def karras_grid(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise levels evenly spaced in sigma^(1/rho) from sigma_max to sigma_min, then 0 (arXiv 2206.00364, eq. 5)."""
    _check_grid(steps, sigma_min, sigma_max)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas.clamp(sigma_min, sigma_max), sigmas.new_zeros(1)])


def native_grid(schedule: Schedule, steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Quantiles of the training noise within [sigma_min, sigma_max]: u = 1, 1 - 1/steps, ..., 1/steps, then sigma 0.

    For a (shifted) cosine schedule u is its time, so these are the evenly spaced times of ancestral DDPM; for a
    log-normal one, steps are dense where training was. The distribution is truncated at both limits before it is
    divided, so no two levels coincide, however much of it lies outside or was clamped to the limits.
    """
    _check_grid(steps, sigma_min, sigma_max)
    low = _crossing(lambda u: schedule.sigma(u) <= sigma_min)
    high = _crossing(lambda u: schedule.sigma(u) < sigma_max)
    u = torch.linspace(high, low, steps + 1, dtype=torch.float64)
    sigmas = schedule.sigma(u[:-1]).to("cpu", torch.float64).clamp(sigma_min, sigma_max)
    sigmas[0] = sigma_max
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _crossing(below: Callable[[Tensor], Tensor]) -> float:
    """The u in [0, 1) up to which below(u) is true, both (N,): repeated search among 4097 points."""
    low, high = 0.0, 1 - 2**-53
    for _ in range(5):  # 4096^5 = 2^60 cells
        u = torch.linspace(low, high, 4097, dtype=torch.float64)
        n = int(below(u).sum())
        low, high = float(u[max(n - 1, 0)]), float(u[min(n, 4096)])
    return low


def _check_grid(steps: int, sigma_min: float, sigma_max: float) -> None:
    if not 1 <= steps <= MAX_STEPS:
        raise UserError(f"steps={steps}: expected 1 to {MAX_STEPS}; 16 to 64 are usual")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(
            f"noise levels from {sigma_min} to {sigma_max}: expected 0 < sigma_min < sigma_max < inf; "
            "correct the denoiser's limits"
        )


# --- images -----------------------------------------------------------------------------------------------------------


def space_of(model: object) -> Space:
    """Channels and range of a denoiser's or a generator's images: its `space` if it has one, else pixels."""
    space = getattr(model, "space", PIXELS)
    assert isinstance(space, Space)
    return space


def initial_noise(size: tuple[int, int], seed: int, index: Sequence[int], channels: int = 3) -> Tensor:
    """Standard normal noise (B,channels,h,w) float32 on the CPU, row b a function of (seed, index[b], size) alone."""
    return normal((channels, *size), seed, "sample", index)


def slices(count: int, batch: int) -> list[slice]:
    """0 .. count-1 in slices of at most `batch`, for a caller that samples many images and holds one batch at a time.

    It calls `sample` or `generate` once for each slice, with that slice's conditions and sample numbers.
    """
    if batch < 1:
        raise UserError(f"batch={batch}: expected 1 or more images at a time")
    return [slice(start, min(start + batch, count)) for start in range(0, count, batch)]


@torch.no_grad()
@tf32()
def sample(
    denoiser: DenoiserLike,
    cond: Cond,
    *,
    size: tuple[int, int],
    seed: int = 0,
    index: Sequence[int] | Tensor | None = None,
    steps: int = 32,
    sampler: str = "dpm++2m",
    grid: str | Schedule | Tensor | Sequence[float] = "karras",
    guidance: float = 1.0,
    interval: tuple[float, float] | None = None,
    guide: Network | None = None,
    threshold: float | None = None,
    guide_details: bool = True,
    batch: int = 64,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    progressive: bool = True,
    preview: bool = False,
) -> Samples:
    """One image for each of the N conditions.

    An image is a function of (seed, its index, its condition, the settings). Up to rounding it depends on neither
    `batch` nor the order. All noise is drawn on the CPU.

    size      (h, w) in pixels, multiples of the denoiser's stride
    index     N sample numbers, the key of each image's noise; 0 .. N-1 if None
    steps     solver steps; `heun` evaluates 2*steps - 1 times, the others `steps` times; guidance doubles that
    sampler   "dpm++2m", "heun", "ddim" or "ddpm"
    grid      "karras"; a training schedule (see `native_grid`); or sigmas that fall to 0, instead of `steps`
    guidance, interval, guide, threshold, guide_details   see `guidance.Guided`
    batch     images at a time; classifier-free guidance evaluates twice as many rows in one call
    device    the denoiser's device; that of `cond` if None
    progress  called with (steps done, steps in all) after each step of each batch
    progressive   step an exact model at the lowest sufficient resolution (see progressive.py): the same images
    preview   of an exact model: the images at the lowest resolution that it is exact over, from the rungs up to there;
              the full images averaged down are the same

    Returns all images at once, on `device`: for more than a few batches, call it for each of `slices`. Raises UserError
    for invalid settings, and for predictions that are not finite.
    """
    n = len(cond)
    numbers = _numbers(n, index, size, batch)
    space = space_of(denoiser)
    if threshold is not None and not space.bounded:
        raise UserError(f"threshold={threshold}: latents are not bounded as pixels are; drop it")
    sigmas = grid_of(grid, steps, denoiser)
    factors = exact_factors(denoiser)
    device = cond.null.device if device is None else torch.device(device)
    starts = range(0, n, batch)
    total, done, nfe, images = (len(sigmas) - 1) * len(starts), 0, 0, []
    for start in starts:
        rows = numbers[start : start + batch]
        guided = Guided(
            denoiser,
            cond[start : start + batch].to(device),
            guidance=guidance,
            interval=interval,
            guide=guide,
            threshold=threshold,
            guide_details=guide_details,
        )
        floors = floors_of(guided)
        if preview and len(floors) == 1:
            raise UserError(GUIDED_PREVIEW if factors else NO_PREVIEW)
        floors = floors[:1] if preview else floors if progressive else floors[-1:]
        noise = ancestral_noise((space.channels, *size), seed, rows, device)
        x = sigmas[0].item() * initial_noise(size, seed, rows, space.channels).to(device)
        for x_next in climb(floors, x, sigmas, sampler, noise):
            x, done = x_next, done + 1
            if progress is not None:
                progress(done, total)
        if not bool(x.isfinite().all()):
            raise UserError(
                f"sampling gave non-finite pixels among samples {rows[0]} to {rows[-1]}: expected finite predictions; "
                "try an earlier checkpoint, fp32 or less guidance"
            )
        images.append(space.bound(x, [] if preview else factors))
        nfe = evaluations(floors)
    return Samples(torch.cat(images), nfe)


@torch.no_grad()
@tf32()
def generate(
    generator: OneStep,
    cond: Cond,
    *,
    size: tuple[int, int],
    seed: int = 0,
    index: Sequence[int] | None = None,
    batch: int = 64,
    guidance: float | None = None,
    preview: bool = False,
) -> Samples:
    """One image of `size` (h, w) for each of the N conditions, in one evaluation of a one-step generator.

    Image i is a function of (seed, its index, its condition), as in `sample`, and starts from the same noise.
    `preview`: the image at the lowest resolution that the generator is exact over. `guidance`: the weight that a guided
    generator is conditioned on; None for any other. Raises UserError for an invalid size, batch or index.
    """
    numbers = _numbers(len(cond), index, size, batch)
    latent, device, images = generator.latent_size(size), cond.null.device, []
    space, factors = space_of(generator), exact_factors(generator)
    if preview and not factors:
        raise UserError(NO_PREVIEW)
    for start in range(0, len(cond), batch):
        rows = slice(start, start + batch)
        z = initial_noise(latent, seed, numbers[rows], space.channels).to(device)
        weights = weights_like(z, guidance)
        image = generator.preview(z, cond[rows], weights) if preview else generator(z, cond[rows], weights)
        images.append(space.bound(image.float(), () if preview else factors))
    return Samples(torch.cat(images), 1)


def _numbers(count: int, index: Sequence[int] | Tensor | None, size: tuple[int, int], batch: int) -> list[int]:
    """The sample numbers of `count` conditions. Raises UserError if they, the size or the batch are invalid."""
    numbers = list(range(count)) if index is None else [int(i) for i in index]
    if count < 1 or len(numbers) != count:
        raise UserError(
            f"{count} conditions and {len(numbers)} indices: expected an index for each of 1 or more conditions"
        )
    if min(size) < 1 or max(size) > MAX_SIDE or batch < 1:
        raise UserError(
            f"size={size}, batch={batch}: expected (height, width), each from 1 to {MAX_SIDE} pixels, and a batch of 1 "
            "or more"
        )
    return numbers


def weights_like(z: Tensor, guidance: float | None) -> Tensor | None:
    """A guidance weight as a tensor (B,) for latents z (B, ...); None for None."""
    return None if guidance is None else z.new_full((len(z),), guidance)


def grid_of(grid: str | Schedule | Tensor | Sequence[float], steps: int, denoiser: DenoiserLike) -> Tensor:
    """The falling sigmas that `grid` stands for, float64 on the CPU."""
    if isinstance(grid, str):
        if grid != "karras":
            raise UserError(f"grid {grid!r} does not exist; expected 'karras', a training schedule or a list of sigmas")
        return karras_grid(steps, denoiser.sigma_min, denoiser.sigma_max)
    if isinstance(grid, Tensor | Sequence):
        sigmas = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
        if len(sigmas) < 2 or sigmas[-1] != 0:
            raise UserError(f"grid of {len(sigmas)} sigmas: expected two or more that fall, the last of them 0")
        return sigmas
    return native_grid(grid, steps, denoiser.sigma_min, denoiser.sigma_max)


def ancestral_noise(shape: tuple[int, ...], seed: int, index: Sequence[int], device: torch.device) -> Noise:
    """The noise of `ddpm` for images of `shape` (C, H, W), a function of (seed, step, index[b], shape)."""
    return lambda step: normal(shape, seed, f"ancestral {step}", index).to(device)
