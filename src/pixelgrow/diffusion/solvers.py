"""Solvers of the reverse process: single steps, and trajectories over a grid of noise levels in either direction.

Everything is in the VE convention: x_sigma = x + sigma*eps, and the probability-flow ODE is
    dx/dsigma = (x - D(x, sigma)) / sigma        (Karras et al., arXiv 2206.00364, eq. 3 with eq. 1)
A solver receives `denoise(x, sigma) -> x0`, a closure over conditions and guidance (see guidance.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from pixelgrow.errors import UserError

Denoise = Callable[[Tensor, float], Tensor]
"""`(x (B,...), sigma) -> x0 (B,...)` in x's dtype."""
Noise = Callable[[int], Tensor]
"""Step number -> standard normal noise in the shape of x, for `ddpm`, which adds noise in each step."""
Solver = Callable[[Denoise, Tensor, float, float, Callable[[], Tensor], "Past | None"], "tuple[Tensor, Past | None]"]
"""One step: (denoise, x, s0, s1, noise, past) -> x at s1, and the state for the next step."""


# One step from noise level s0 > 0 to s1.
# The first-order step is D + (s1/s0) (x - D): an Euler step of the ODE, exact where D is constant. A step to sigma 0 is
# of first order in all solvers and gives D. From sigma 0, `trajectory` leaves x unchanged: the slope -sigma * score(x)
# is 0 there.


@dataclass(frozen=True)
class Past:
    """State of a multi-step solver: the denoised image of its last step, and that step's length in -log sigma."""

    x0: Tensor
    h: float


def ddim(
    denoise: Denoise, x: Tensor, s0: float, s1: float, noise: Callable[[], Tensor], past: Past | None
) -> tuple[Tensor, Past | None]:
    """DDIM with eta = 0 (Song et al., arXiv 2010.02502, eq. 13): order 1, one evaluation."""
    return torch.lerp(denoise(x, s0), x, s1 / s0), None


def ddpm(
    denoise: Denoise, x: Tensor, s0: float, s1: float, noise: Callable[[], Tensor], past: Past | None
) -> tuple[Tensor, Past | None]:
    """Ancestral DDPM, which is DDIM with eta = 1 (Ho et al., arXiv 2006.11239, eq. 6-7): one evaluation.

    A draw from q(x_s1 | x_s0, x0 = D), in VE terms: mean D + (s1/s0)^2 (x - D), variance s1^2 (1 - (s1/s0)^2).
    """
    x = torch.lerp(denoise(x, s0), x, (s1 / s0) ** 2)
    return (x + s1 * math.sqrt(1 - (s1 / s0) ** 2) * noise() if s1 > 0 else x), None


def heun(
    denoise: Denoise, x: Tensor, s0: float, s1: float, noise: Callable[[], Tensor], past: Past | None
) -> tuple[Tensor, Past | None]:
    """Heun's method (arXiv 2206.00364, algorithm 1): order 2, two evaluations, one where it ends at 0."""
    x0 = denoise(x, s0)
    x_euler = torch.lerp(x0, x, s1 / s0)
    if s1 == 0:
        return x_euler, None
    slope0, slope1 = (x - x0) / s0, (x_euler - denoise(x_euler, s1)) / s1
    return x + (s1 - s0) / 2 * (slope0 + slope1), None


def dpmpp_2m(
    denoise: Denoise, x: Tensor, s0: float, s1: float, noise: Callable[[], Tensor], past: Past | None
) -> tuple[Tensor, Past | None]:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2): order 2, one evaluation.

    The first-order step with D extrapolated, from this and the last evaluation, to the middle of the step in log sigma.
    """
    x0 = denoise(x, s0)
    h = math.log(s0 / s1) if s1 > 0 else math.inf  # step in lambda = -log sigma; negative where sigma grows
    x0_middle = x0 if past is None or s1 == 0 else torch.lerp(past.x0, x0, 1 + h / (2 * past.h))
    return torch.lerp(x0_middle, x, s1 / s0), Past(x0, h)


SAMPLERS: dict[str, Solver] = {"dpm++2m": dpmpp_2m, "heun": heun, "ddim": ddim, "ddpm": ddpm}


def trajectory(
    denoise: Denoise, x: Tensor, sigmas: Tensor | Sequence[float], method: str = "dpm++2m", noise: Noise | None = None
) -> Iterator[Tensor]:
    """x after each step of `method` along `sigmas`, starting from x (B,...) at sigmas[0].

    `sigmas` is any strictly monotone grid: a falling one samples, a rising one inverts. Only `ddpm` uses `noise`.
    Raises UserError for an unknown method, a grid that is not monotone, finite and >= 0, or `ddpm` on a rising one.
    """
    levels, step = checked(sigmas, method, noise)
    past: Past | None = None
    for n, (s0, s1) in enumerate(pairwise(levels)):
        if s0 > 0:
            x, past = step(denoise, x, s0, s1, partial(noise or _none, n), past)
        yield x


def _none(step: int) -> Tensor:
    raise AssertionError("only ddpm adds noise, and it is refused without any")


def checked(sigmas: Tensor | Sequence[float], method: str, noise: Noise | None) -> tuple[list[float], Solver]:
    """The noise levels and the solver's step; see `trajectory`."""
    if method not in SAMPLERS:
        raise UserError(f"sampler {method!r} does not exist; expected one of {', '.join(SAMPLERS)}")
    levels = [float(s) for s in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)]
    falling = all(a > b for a, b in pairwise(levels))
    rising = all(a < b for a, b in pairwise(levels))
    if len(levels) < 2 or not (falling or rising) or min(levels) < 0 or not math.isfinite(max(levels)):
        got = ", ".join(f"{s:.4g}" for s in levels)
        raise UserError(f"sigmas ({got}): expected two or more finite levels >= 0 that only fall, or only rise")
    if method == "ddpm" and rising:
        raise UserError("sampler 'ddpm' got rising sigmas: noise cannot be undone; invert with heun, dpm++2m or ddim")
    if method == "ddpm" and noise is None:
        raise UserError("sampler 'ddpm' got no noise: expected noise(step) -> normal noise like x")
    return levels, SAMPLERS[method]


def solve(
    denoise: Denoise, x: Tensor, sigmas: Tensor | Sequence[float], method: str = "dpm++2m", noise: Noise | None = None
) -> Tensor:
    """The end of `trajectory`: x (B,...) at sigmas[0] -> x (B,...) at sigmas[-1]."""
    (end,) = deque(trajectory(denoise, x, sigmas, method, noise), maxlen=1)
    return end


def invert(denoise: Denoise, x: Tensor, sigmas: Tensor, method: str = "heun") -> Tensor:
    """The ODE run backwards: images x (B,...) -> the x (B,...) at sigmas[0] that a sampler turns into them.

    `sigmas` is the sampler's falling grid. Divide by sigmas[0] for a latent of about unit variance.
    """
    return solve(denoise, x, sigmas.flip(0), method)
