"""What a training loop optimises: networks and a loss, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from pixelgrow.data.loader import Batch


@dataclass(frozen=True)
class Terms:
    """One micro-batch's loss and what to log of it.

    loss: scalar, what is differentiated; a mean over the micro-batch.
    logs: more numbers, averaged over steps; tensors stay on their device until they are written.
    sigma: (B,) noise levels of the micro-batch, named when a step is not finite.
    """

    loss: Tensor
    logs: dict[str, Tensor | float] = field(default_factory=dict)
    sigma: Tensor | None = None


class Objective(Protocol):
    """What trains and how well it does.

    modules: what trains, by name, `requires_grad` already set; each has its own optimizer and averages, and they are
    updated in turn within a step.
    """

    modules: dict[str, nn.Module]

    def loss(self, batch: Batch, part: str) -> Terms:
        """The loss that `modules[part]` descends on `batch`. All randomness is keyed by `batch.index`."""
        ...
