"""Power-function averages of weights (Karras et al. 2024, EDM2, arXiv 2312.02696, section 3), counted in images.

The average of exponent gamma at time t weighs the weights at time tau by tau^gamma (eq. 1). The relative standard
deviation of that profile, sigma_rel, is its length and names it. Averages of other lengths are put together afterwards
from stored ones (section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from pixelgrow.training.optim import trainable


def gamma_of(length: float) -> float:
    """The exponent gamma of a relative length sigma_rel: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    t = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def length_of(gamma: float) -> float:
    """The relative standard deviation sigma_rel of the profile tau^gamma."""
    return float((gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5)


class Ema:
    """One running average of a module's trainable tensors; frozen tensors and buffers are the module's own.

    length: sigma_rel. tensors: the averages by parameter name, float32.
    """

    def __init__(self, module: nn.Module, length: float) -> None:
        self.module, self.length, self.gamma = module, length, gamma_of(length)
        self.parameters = trainable(module)
        self.tensors = {n: p.detach().float().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, before: int, now: int) -> None:
        """Take in the weights as they are after the step from `before` to `now` images.

        They stand for all of (before, now], which makes beta = (before / now)^(gamma + 1), eq. 2 with 1 / t in images.
        """
        new = [p.detach() for p in self.parameters.values()]
        if new:
            torch._foreach_lerp_(list(self.tensors.values()), new, 1 - (before / now) ** (self.gamma + 1))

    def state_dict(self) -> dict[str, Tensor]:
        """The module's state dict with the averages in the place of what trains; the rest is shared, not copied."""
        state = self.module.state_dict()
        return {n: self.tensors.get(n, t) for n, t in state.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Lend the averages to the module: tensors are exchanged, nothing is copied, and all is put back."""
        mine = {n: p.data for n, p in self.parameters.items()}
        try:
            for n, p in self.parameters.items():
                p.data = self.tensors[n].to(p.dtype)
            yield
        finally:
            for n, p in self.parameters.items():
                p.data = mine[n]


def _dot(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Inner products of the profiles (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t], in closed form.

    If a ends first: (gamma_a + 1)(gamma_b + 1) / (gamma_a + gamma_b + 1) * t_a^gamma_b / t_b^(gamma_b + 1).
    """
    ratio = np.where(t_a < t_b, t_a / t_b, t_b / t_a)
    later = np.where(t_a < t_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio**later / np.maximum(t_a, t_b)


def solve_weights(images: Sequence[int], lengths: Sequence[float], at: int, length: float) -> np.ndarray:
    """Weights (N,) float64 of N stored averages whose sum comes closest to a wanted one, in squares of the profiles.

    images, lengths: when each was stored and its sigma_rel. at, length: the same of the wanted average.
    Times are taken relative to `at`, and near-dependent profiles are resolved by the pseudo-inverse.
    """
    t = np.asarray(images, dtype=np.float64) / at
    gamma = np.array([gamma_of(s) for s in lengths])
    a = _dot(t[:, None], gamma[:, None], t[None], gamma[None])
    b = _dot(t, gamma, np.ones(1), np.array([gamma_of(length)]))
    scale = 1 / np.sqrt(np.diag(a))
    return np.asarray(scale * np.linalg.lstsq(a * scale[:, None] * scale, b * scale, rcond=1e-12)[0])
