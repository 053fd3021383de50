"""What a network is conditioned on, as plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """A batch of conditions from a frozen text encoder, or of class labels.

    Text: `tokens` (B, L, D) float, `mask` (B, L) bool, True where a token is real, `pooled` (B, P) float.
    Classes: `labels` (B,) int64, and the three others None.
    `null` (B,) bool: True where the network puts its learned null condition in the place of what is given.
    """

    tokens: Tensor | None
    mask: Tensor | None
    pooled: Tensor | None
    null: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.null)

    def map(self, function: Callable[[Tensor], Tensor]) -> Cond:
        """The same with `function` applied to every tensor there is."""

        def maybe(t: Tensor | None) -> Tensor | None:
            return None if t is None else function(t)

        return Cond(maybe(self.tokens), maybe(self.mask), maybe(self.pooled), function(self.null), maybe(self.labels))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cond:
        """Move to `device`; floating tensors to `dtype`."""
        return self.map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def __getitem__(self, rows: slice | Tensor) -> Cond:
        """The conditions of some rows, as a slice or an index tensor selects them."""
        return self.map(lambda t: t[rows])

    def dropped(self, drop: Tensor | None = None) -> Cond:
        """The same batch with the null condition where `drop` (B,) bool is True; everywhere if it is None."""
        null = torch.ones_like(self.null) if drop is None else self.null | drop.to(self.null.device)
        return Cond(self.tokens, self.mask, self.pooled, null, self.labels)
