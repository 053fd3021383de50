"""What a network is conditioned on, as plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """A batch of conditions from a frozen text encoder, or of class labels.

    Text: `tokens` (B, L, D) float, `mask` (B, L) bool, True where a token is real, `pooled` (B, P) float.
    Classes: `labels` (B,) int64, and the three others None.
    Mixtures (`mixed`): `mask` float, what attention to a token is multiplied by; `labels` (B, classes) float weights.
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


def mixed(a: Cond, b: Cond, t: Tensor, classes: int = 0) -> Cond:
    """Conditions a and b of B rows each, mixed: t (B,) in [0, 1] is the share of b. `classes`: of a model of classes.

    Ours. Text: the network attends to the tokens of both, to those of `b` t times as much and to those of `a` 1 - t
    times, so that the captions may differ in length, and each end is one caption alone; the pooled vectors are
    slerped. Classes: the embeddings' straight line.
    """
    null = torch.where(t < 0.5, a.null, b.null)
    if a.labels is not None and b.labels is not None:
        one, other = (F.one_hot(labels, classes).to(t.dtype) for labels in (a.labels, b.labels))
        return Cond(None, None, None, null, torch.lerp(one, other, t[:, None]))
    assert a.tokens is not None and a.mask is not None and a.pooled is not None
    assert b.tokens is not None and b.mask is not None and b.pooled is not None
    return Cond(
        torch.cat([a.tokens, b.tokens], 1),
        torch.cat([(1 - t)[:, None] * a.mask, t[:, None] * b.mask], 1),
        slerp(a.pooled, b.pooled, t),
        null,
    )


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Along the arc from a (B,...) to b (B,...), t (B,) in [0, 1]: of the angle between them and, evenly, of their
    norms; a straight line where they point one way, or opposite ways. The ends are a and b to the bit."""
    share = t.reshape(-1, *[1] * (a.ndim - 1)).to(a.dtype)
    u, v = (x.flatten(1) for x in (a, b))
    norms = u.norm(dim=1), v.norm(dim=1)
    cosine = ((u * v).sum(1) / (norms[0] * norms[1]).clamp_min(1e-12)).clamp(-1, 1)
    angle = torch.acos(cosine).reshape(share.shape)
    length_a, length_b = (n.clamp_min(1e-12).reshape(share.shape) for n in norms)
    arc = (torch.sin((1 - share) * angle) / length_a * a + torch.sin(share * angle) / length_b * b) / torch.sin(angle)
    arc = arc * torch.lerp(length_a, length_b, share)
    straight = (torch.sin(angle) < 1e-3) | (share <= 0) | (share >= 1)
    return torch.where(straight, torch.lerp(a, b, share), arc)
