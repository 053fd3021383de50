"""What a training loop optimises: networks and a loss, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Terms:
    """One micro-batch's loss and what to log of it.

    loss: scalar, what is differentiated; a mean over the micro-batch.
    logs: more numbers, averaged over steps; tensors stay on their device until they are written.
    sigma, losses: (B,) noise levels and losses of the micro-batch's samples; a step that is not finite is told by the
    noise levels of those that are not.
    """

    loss: Tensor
    logs: dict[str, Tensor | float] = field(default_factory=dict)
    sigma: Tensor | None = None
    losses: Tensor | None = None


def noise_levels(terms: Sequence[Terms]) -> str:
    """`, noise level 0.0123`: of the samples whose losses are not finite; of all where only the gradient is not."""
    found = [t.sigma.detach().float().cpu() for t in terms if t.sigma is not None]
    wrong = [t.sigma[~t.losses.isfinite()].float().cpu() for t in terms if t.sigma is not None and t.losses is not None]
    levels = torch.cat(wrong if any(map(len, wrong)) else found) if found else torch.empty(0)
    if not len(levels):
        return ""
    low, high = float(levels.min()), float(levels.max())
    return f", noise level {low:.3g}" if low == high else f", noise levels {low:.3g} to {high:.3g}"


class Objective(Protocol):
    """What trains and how well it does.

    modules: what trains, by name, `requires_grad` already set; each has its own optimizer and averages, and they are
    updated in turn within a step. rates: a factor on the learning rate of each.
    """

    modules: dict[str, nn.Module]
    rates: Mapping[str, float]

    def loss(self, batch: Any, part: str) -> Terms:
        """The loss that `modules[part]` descends on a batch of the stage's stream, a frozen dataclass of tensors and
        tuples over images. All randomness is keyed by `batch.index` (B,)."""
        ...
