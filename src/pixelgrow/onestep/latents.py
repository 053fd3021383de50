"""The latent of a picture that is known in part: z* = argmin_z |y - A(G(z, c))|^2 by Adam (PaGoDA, arXiv 2405.14822).

Where the search starts and ends and what keeps a latent likely is ours; the paper names Adam alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pixelgrow import rng
from pixelgrow.diffusion.sampling import initial_noise
from pixelgrow.errors import UserError

Draw = Callable[[Tensor], Tensor]
"""Latents (B, 3, h, w) -> images (B, 3, H, W): a generator under its conditions."""
Misfit = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) -> (B,), the mean squared error of what is known of each."""


@dataclass(frozen=True)
class FitSettings:
    """How a latent is looked for. Raises UserError for what means nothing.

    `iterations`: steps of Adam at most, at `rate`. `starts`: prior samples tried; the nearest one is where it begins.
    `prior`: weight of (|z|^2 / n - 1)^2, which keeps a latent of n numbers as long as the prior's are. `tolerance`:
    root mean squared error of the known pixels, of the range [-1, 1], at which a latent is good enough.
    """

    iterations: int = 200
    rate: float = 0.05
    starts: int = 8
    prior: float = 0.01
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        for name, least in (("iterations", 0), ("starts", 1), ("prior", 0), ("tolerance", 0)):
            if not (math.isfinite(value := getattr(self, name)) and value >= least):
                raise UserError(f"{name}={value}: expected {least} or more")
        if not 0 < self.rate < math.inf:
            raise UserError(f"rate={self.rate}: expected a step above 0; 0.02 to 0.2 are usual")


@dataclass(frozen=True)
class Fitted:
    """`latent` (B, 3, h, w) and the root mean squared `error` (B,) of what is known, at it."""

    latent: Tensor
    error: Tensor


@torch.no_grad()
def nearest(
    draw: Draw, misfit: Misfit, size: tuple[int, int, int], seed: int, starts: int, device: torch.device
) -> Tensor:
    """Of `starts` prior samples for each of B pictures, the latent (B, 3, h, w) that fits best; `size` is (B, h, w).

    The first one tried is what `sampling.generate` would draw from.
    """
    count, *latent = size
    best = torch.full((count,), math.inf, device=device)
    found = torch.zeros(count, 3, *latent, device=device)
    for start in range(starts):
        key = rng.seed_of(seed, "start", start) if start else seed
        z = initial_noise((latent[0], latent[1]), key, range(count)).to(device)
        error = misfit(draw(z))
        found = torch.where((error < best)[:, None, None, None], z, found)
        best = torch.minimum(error, best)
    return found


def fit(
    draw: Draw,
    misfit: Misfit,
    start: Tensor,
    settings: FitSettings,
    progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """The best latents on Adam's way from `start` (B, 3, h, w), each apart from the others.

    A row stands still once it is within the tolerance; the search ends when all do. `progress` is called with
    (iterations done, iterations in all).
    """
    z = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=settings.rate, betas=(0.9, 0.99))
    best, least = start.clone(), torch.full((len(start),), math.inf, device=start.device)
    for step in range(settings.iterations + 1):
        with torch.enable_grad():
            error = misfit(draw(z))
            length = z.square().mean(dim=(1, 2, 3))
            loss = (error + settings.prior * (length - 1).square()).sum()
        now = error.detach().clamp_min(0).sqrt()
        better = (now < least) & (least > settings.tolerance)
        best = torch.where(better[:, None, None, None], z.detach(), best)
        least = torch.where(better, now, least)
        if step == settings.iterations or bool((least <= settings.tolerance).all()):
            if progress is not None:
                progress(settings.iterations, settings.iterations)
            break
        (z.grad,) = torch.autograd.grad(loss, z)
        optimizer.step()
        if progress is not None:
            progress(step, settings.iterations)
    if not bool(least.isfinite().all()):
        raise UserError("the generator drew non-finite pixels: expected finite ones; try another checkpoint, or fp32")
    return Fitted(best, least)
