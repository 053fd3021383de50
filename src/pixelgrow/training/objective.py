"""What the training loop optimises: networks and a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Terms:
    """The loss of one micro-batch and what to log.

    loss: scalar to differentiate, a mean over the micro-batch.
    logs: more numbers, averaged over steps; tensors stay on their device until they are written.
    sigma, losses: (B,) noise levels and losses of the samples; the message on a step that is not finite names the noise
    levels of the samples at fault.
    """

    loss: Tensor
    logs: dict[str, Tensor | float] = field(default_factory=dict)
    sigma: Tensor | None = None
    losses: Tensor | None = None


@dataclass(frozen=True)
class Levels:
    """Noise levels of samples whose losses are not finite, and of all."""

    wrong: list[float]
    all: list[float]


def noise_levels(terms: Sequence[Terms]) -> Levels:
    """The noise levels of some micro-batches."""
    found = [t.sigma.detach().float().cpu() for t in terms if t.sigma is not None]
    wrong = [t.sigma[~t.losses.isfinite()].float().cpu() for t in terms if t.sigma is not None and t.losses is not None]
    return Levels(*(torch.cat(some).tolist() if some else [] for some in (wrong, found)))


def in_words(levels: Sequence[Levels]) -> str:
    """`, noise level 0.0123`: that of the samples whose losses are not finite; of all if only the gradient is not."""
    wrong = [sigma for some in levels for sigma in some.wrong] or [sigma for some in levels for sigma in some.all]
    if not wrong:
        return ""
    low, high = min(wrong), max(wrong)
    return f", noise level {low:.3g}" if low == high else f", noise levels {low:.3g} to {high:.3g}"


class Objective(Protocol):
    """Networks and their losses.

    modules: the networks that train (parts), by name, with `requires_grad` set. Each has its own optimizer and
    averages; a step updates them in turn. rates: a factor on the learning rate of each.
    """

    modules: dict[str, nn.Module]
    rates: Mapping[str, float]

    def loss(self, batch: Any, part: str) -> Terms:
        """The loss of `modules[part]` on a batch of the stage's stream, a frozen dataclass of tensors and tuples over
        images. All randomness is keyed by `batch.index` (B,)."""
        ...


@runtime_checkable
class Stepped(Protocol):
    """A part that does something once before each step, however many micro-batches and processes it has."""

    def begin_step(self) -> None: ...
