"""Held-out denoising error by noise level: the number that compares stages and growths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pixelgrow import rng
from pixelgrow.models.cond import Cond
from pixelgrow.precision import tf32

# Noise levels in core units; a model grown k times is evaluated at k times these.
SIGMAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)

Images = Tensor | Sequence[Tensor]


@torch.no_grad()
@tf32()
def denoising_error(
    denoise: Callable[[Tensor, Tensor, Cond], Tensor],
    images: Images,
    cond: Cond,
    *,
    scale: float,
    seed: int = 0,
    sigmas: Sequence[float] = SIGMAS,
    batch: int = 64,
    index: Sequence[int] | None = None,
) -> dict[float, float]:
    """Mean squared error of the denoised image, by noise level: {sigma at the core: error}.

    images (N, 3, H, W) in [-1, 1], or N of several sizes (3, h, w), each of which counts the same; `scale` is sigma at
    the images' resolution over sigma at the core. The noise is a function of (seed, image's number, noise level), the
    same for every model; `index`: the N numbers, 0 .. N-1 if None.
    """
    numbers = range(len(images)) if index is None else index
    groups: dict[torch.Size, list[int]] = {}
    for row, image in enumerate(images):
        groups.setdefault(image.shape, []).append(row)
    errors = {}
    for sigma in sigmas:
        total = 0.0
        for group in groups.values():
            for start in range(0, len(group), batch):
                rows = group[start : start + batch]
                x0 = torch.stack([images[row] for row in rows])
                eps = rng.normal(x0.shape[1:], seed, f"heldout {sigma}", [numbers[row] for row in rows]).to(x0)
                level = torch.full((len(x0),), sigma * scale, device=x0.device)
                of_rows = cond[torch.tensor(rows, device=x0.device)]
                error = denoise(x0 + level[:, None, None, None] * eps, level, of_rows) - x0
                total += error.double().square().mean(dim=(1, 2, 3)).sum().item()
        errors[sigma] = total / len(images)
    return errors
