"""Sampling an exact model at the lowest sufficient resolution (ours; docs/exact-growth.md).

Above its gate an exact rung adds nothing: D_high(x) = up(D_low(down(x))). So x splits into its average, for which the
denoiser is D_low, and its details P x = x - up(down(x)), for which the denoiser is zero. Every solver step is linear in
x and D: the average is stepped at the lower resolution, the details beside it, and both are added when the gate opens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.guidance import Guided
from pixelgrow.diffusion.solvers import Denoise, Noise, Past, checked
from pixelgrow.errors import UserError
from pixelgrow.models.layers import box_down, details, up_nearest


@dataclass(frozen=True)
class Floor:
    """One resolution of an exact model.

    `denoise`: the guided model up to this resolution, in sigma at it; `scale`: side of the full image over the side
    here; `gate`: sigma at the full image up to which the floor is needed.
    """

    denoise: Denoise
    scale: int
    gate: float


def floors_of(denoise: Denoise) -> list[Floor]:
    """The resolutions that a guided model is exact over, lowest first; a single floor if it is exact over none.

    If the guide is the model's own `base`, the floors below the last rung are not guided: there the base is the model.
    Another model as the guide predicts details at every noise level, so sampling stays at full resolution throughout.
    """
    top = Floor(denoise, 1, math.inf)
    if not isinstance(denoise, Guided) or not isinstance(denoise.denoiser, Denoiser):
        return [top]
    whole, interval, guide = denoise.denoiser, denoise.interval, denoise.guide
    own = guide is not None and guide == whole.base
    if guide is not None and not own:
        return [top]
    floors, scale, upper = [top], 1, whole
    for factor in reversed(whole.exact_factors):
        floors[0] = replace(floors[0], gate=scale * upper.gate(upper.rung_configs[-1]))
        upper, scale = upper.lower(upper.height - 1), scale * factor
        lower = Guided(
            upper,
            denoise.cond,
            guidance=1.0 if own else denoise.guidance,
            interval=None if interval is None else (interval[0] / scale, interval[1] / scale),
            threshold=denoise.threshold,
            guide_details=denoise.guide_details,
        )
        floors.insert(0, Floor(lower, scale, math.inf))
    return floors


def evaluations(floors: Sequence[Floor]) -> int:
    """Network evaluations per image so far; one at a lower floor counts as one."""
    return sum(floor.denoise.nfe for floor in floors if isinstance(floor.denoise, Guided))


def upscaling(floors: Sequence[Floor], image: Tensor, side: int) -> list[Floor]:
    """The floors of an exact model of `side` pixels, such that samples average down to `image` (B, C, h, w).

    Of each denoised image the average is set to `image`, and only the details are the model's. So no network is
    evaluated while all rungs above the image are closed. Raises UserError if the model is not exact over its size.
    """
    k = side // image.shape[-1]
    at = next((i for i, floor in enumerate(floors) if floor.scale == k), len(floors) - 1)
    if k < 2 or at == len(floors) - 1:
        raise UserError(
            f"upscaling from {image.shape[-1]} to {side} px: expected a model with exact rungs from one to the other; "
            "grow it with exact: true, or name a smaller image"
        )

    def consistent(denoise: Denoise, factor: int, x: Tensor, sigma: float) -> Tensor:
        return up_nearest(image, factor) + details(denoise(x, sigma), factor)

    above = [replace(f, denoise=partial(consistent, f.denoise, k // f.scale)) for f in floors[at + 1 :]]
    return [Floor(lambda x, sigma: image, k, math.inf), *above]


def progressive(
    floors: Sequence[Floor],
    x: Tensor,
    sigmas: Tensor,
    method: str = "dpm++2m",
    each: Callable[[], None] | None = None,
) -> Tensor:
    """The end of `climb`: x (B, C, h, w) at sigmas[0] -> x at sigmas[-1]. `each` is called after each step."""
    for x_next in climb(floors, x, sigmas, method):
        x = x_next
        if each is not None:
            each()
    return x


def climb(
    floors: Sequence[Floor],
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    method: str = "dpm++2m",
    noise: Noise | None = None,
) -> Iterator[Tensor]:
    """x (B, C, h, w) after each step of `method` along `sigmas`, at the resolution of that step.

    floors: lowest first; x ends at the last one's resolution. `x`, `sigmas` and `noise(step)` are those of the full
    image; if the last floor is lower, they are averaged down to it. Rising sigmas invert. Up to rounding this equals
    `solvers.trajectory` with the last floor's `denoise`, and it raises the same errors.
    """
    levels, step = checked(sigmas, method, noise)
    top = at = len(floors) - 1
    x = box_down(x, floors[top].scale)
    # The parts that are stepped: x at floor `at`, then the details of each floor above it.
    parts: list[tuple[Tensor, Past | None]] = [(x, None)]
    for n, (s0, s1) in enumerate(pairwise(levels)):
        lowest = min(s0, s1) if method == "heun" and s1 > 0 else s0  # sigma at which the step evaluates the denoiser
        needed = needed_floor(floors, lowest)
        while at > needed:
            parts[:1], at = _split(*parts[0], floors[at - 1].scale // floors[at].scale), at - 1
        while at < needed:
            parts[:2], at = [_joined(parts[0], parts[1])], at + 1
        if s0 > 0:
            whole = noise(n) if noise is not None and method == "ddpm" and s1 > 0 else None
            for i, (value, past) in enumerate(parts):
                floor = floors[at + i]
                below = floors[at + i - 1].scale // floor.scale if i else 1
                denoise: Denoise = _nothing if i else floor.denoise
                fresh = partial(_share, whole, floor.scale, below)
                parts[i] = step(denoise, value, s0 / floor.scale, s1 / floor.scale, fresh, past)
        if n == len(levels) - 2:
            while at < top:
                parts[:2], at = [_joined(parts[0], parts[1])], at + 1
        yield parts[0][0]


def _share(noise: Tensor | None, scale: int, below: int) -> Tensor:
    """Unit noise of the full image as unit noise of an image `scale` times smaller; its details over `below` pixels."""
    assert noise is not None
    here = scale * box_down(noise, scale)
    return details(here, below) if below > 1 else here


def needed_floor(floors: Sequence[Floor], sigma: float) -> int:
    """The highest floor whose rung is open at sigma of the full image."""
    return max(i for i, floor in enumerate(floors) if i == 0 or sigma <= floor.gate)


def _nothing(x: Tensor, sigma: float) -> Tensor:
    return torch.zeros_like(x)


def _split(x: Tensor, past: Past | None, k: int) -> list[tuple[Tensor, Past | None]]:
    """A state split into that of the resolution below and its details."""
    low = None if past is None else Past(box_down(past.x0, k), past.h)
    rest = None if past is None else Past(details(past.x0, k), past.h)
    return [(box_down(x, k), low), (details(x, k), rest)]


def _joined(low: tuple[Tensor, Past | None], rest: tuple[Tensor, Past | None]) -> tuple[Tensor, Past | None]:
    """The reverse of `_split`."""
    k = rest[0].shape[-1] // low[0].shape[-1]
    past = None
    if low[1] is not None and rest[1] is not None:
        past = Past(up_nearest(low[1].x0, k) + rest[1].x0, low[1].h)
    return up_nearest(low[0], k) + rest[0], past
