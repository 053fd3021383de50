"""Power-function averages of weights (Karras et al. 2024, EDM2, arXiv 2312.02696, section 3), counted in images.

The average of exponent gamma at time t weighs the weights at time tau by tau^gamma (eq. 1). The relative standard
deviation of that profile, sigma_rel, is called its length. Averages of other lengths are combined afterwards from
stored ones (section 3.2).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from pixelgrow.distributed import Split
from pixelgrow.errors import UserError
from pixelgrow.training.optim import trainable
from pixelgrow.training.settings import MAX_EMA_LENGTH
from pixelgrow.writing import fault_of

logger = logging.getLogger(__name__)


def gamma_of(length: float) -> float:
    """The exponent gamma of a relative length sigma_rel: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    t = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


class Ema:
    """One running average of a module's trainable tensors; frozen tensors and buffers are the module's own.

    length: sigma_rel. split: of a module that is sharded. tensors: the averages by parameter name, float32, sharded as
    the module is.
    """

    def __init__(self, module: nn.Module, length: float, split: Split | None = None) -> None:
        self.module, self.length, self.gamma, self.split = module, length, gamma_of(length), split
        self.parameters = trainable(module)
        self.tensors = {n: p.detach().float().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, before: int, now: int) -> None:
        """Add the current weights, those after the step from `before` to `now` images.

        They stand for all of (before, now], which makes beta = (before / now)^(gamma + 1): eq. 2 with times in images.
        """
        new = [p.detach() for p in self.parameters.values()]
        if new:
            torch._foreach_lerp_(list(self.tensors.values()), new, 1 - (before / now) ** (self.gamma + 1))

    def state_dict(self) -> dict[str, Tensor]:
        """The module's state dict with averages in place of trainable tensors; the others are shared, not copied."""
        state = self.module.state_dict()
        return {n: self.tensors.get(n, t) for n, t in state.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the module's trainable tensors are the averages. Tensors are exchanged, not copied, and put back.

        Of a sharded module, the whole network holds copies, in the first process; all processes enter.
        """
        if self.split is not None:
            with self.split.holding(self.tensors):
                yield
            return
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


@dataclass(frozen=True)
class Mixture:
    """Weights (N,) float64 of N stored averages, and the relative error of the profile that they add up to."""

    weights: np.ndarray
    error: float


def solve_weights(images: Sequence[int], lengths: Sequence[float], at: int, length: float) -> Mixture:
    """The mixture of stored averages closest to a wanted one, in least squares of their profiles (section 3.2).

    images, lengths: when each was stored and its sigma_rel. at, length: the same of the wanted average.
    Times are relative to `at`; the pseudo-inverse handles profiles that are nearly linearly dependent.
    """
    t, gamma = np.asarray(images, dtype=np.float64) / at, np.array([gamma_of(s) for s in lengths])
    one, wanted = np.ones(1), np.array([gamma_of(length)])
    a, b = _dot(t[:, None], gamma[:, None], t[None], gamma[None]), _dot(t, gamma, one, wanted)
    norm = np.sqrt(np.diag(a))
    w = np.linalg.lstsq(a / norm[:, None] / norm, b / norm, rcond=1e-12)[0] / norm
    whole = _dot(one, wanted, one, wanted)[0]
    return Mixture(w, float(np.sqrt(max(0.0, whole - 2 * w @ b + w @ a @ w) / whole)))


def reconstruct(folder: Path, length: float, images: int | None = None) -> dict[str, Tensor]:
    """The average of another length after a run, by parameter name, float32, from the snapshots in `folder`.

    `module.load_state_dict(module.state_dict() | reconstruct(folder, 0.07))` loads it into a module.

    images: the time of the average, by default that of the last snapshot. The stored profiles do not span those of
    averages of half the shortest stored length and less, or between snapshots: a warning gives the error.
    Raises UserError if there are no snapshots, one is damaged, or the length is out of range.
    """
    if not 0 < length < MAX_EMA_LENGTH:
        raise UserError(f"ema length: got {length:g}, expected a number between 0 and {MAX_EMA_LENGTH:.3f}")
    files = {int(p.stem): p for p in sorted(folder.glob("*.safetensors")) if p.stem.isdigit()}
    at = max(files, default=0) if images is None else images
    files = {t: p for t, p in files.items() if t <= at}
    if not files:
        raise UserError(f"no snapshots of averages up to {at:,} images in {folder}; train with snapshot_every above 0")
    stored = []
    for t, path in files.items():
        if fault := fault_of(path, "delete it to do without"):
            raise UserError(f"{path} {fault}")
        with safe_open(path, framework="pt") as file:
            stored += [(t, float(s)) for s in sorted({key.split("/", 1)[0] for key in file.keys()})]  # noqa: SIM118
    mixture = solve_weights([t for t, _ in stored], [s for _, s in stored], at, length)
    if mixture.error > 0.05:
        logger.warning(
            "the average of length %g is approximated with an error of %.0f%%: snapshots are too few or too far from "
            "it; a stage's snapshot_every and ema decide what is stored",
            length,
            100 * mixture.error,
        )
    total: dict[str, Tensor] = {}
    weights = mixture.weights / mixture.weights.sum()  # a profile that is only approximated must not scale the network
    for (t, s), w in zip(stored, weights.tolist(), strict=True):
        with safe_open(files[t], framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                kept, name = key.split("/", 1)
                if float(kept) == s:
                    part = file.get_tensor(key).float() * w
                    total[name] = total[name].add_(part) if name in total else part
    return total
