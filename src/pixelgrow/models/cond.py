"""What a network is conditioned on, as plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. A copy from the CPU to a GPU goes through pinned memory: out of other memory, it would wait
    until the GPU has done all that it was given before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class Cond:
    """A batch of conditions from a frozen text encoder, or of class labels.

    Text: `tokens` (B, L, D) float, `mask` (B, L) bool, True where a token is real, `pooled` (B, P) float.
    Classes: `labels` (B,) int64.
    `null` (B,) bool: True where the network replaces the condition by its learned null condition.
    Mixtures only (`mixed`): `token_weights` (B, L) float multiply the attention to each token; `class_weights`
    (B, classes) float stand in place of `labels`: the share of each class's embedding.
    """

    tokens: Tensor | None
    mask: Tensor | None
    pooled: Tensor | None
    null: Tensor
    labels: Tensor | None = None
    token_weights: Tensor | None = None
    class_weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.null)

    def map(self, function: Callable[[Tensor], Tensor]) -> Cond:
        """The same conditions with `function` applied to every tensor that is given."""
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        mapped: dict[str, Any] = {name: None if t is None else function(t) for name, t in given}
        return Cond(**mapped)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cond:
        """Move to `device`; cast floating-point tensors to `dtype`."""
        moved = self if device is None else self.map(lambda t: to_device(t, torch.device(device)))
        return moved.map(lambda t: t.to(dtype) if t.is_floating_point() else t) if dtype else moved

    def __getitem__(self, rows: slice | Tensor) -> Cond:
        """The conditions of some rows, selected by a slice or an index tensor."""
        return self.map(lambda t: t[rows])

    def dropped(self, drop: Tensor | None = None) -> Cond:
        """The same batch with the null condition where `drop` (B,) bool is True; everywhere if it is None."""
        null = torch.ones_like(self.null) if drop is None else self.null | drop.to(self.null.device)
        return replace(self, null=null)


def cond_of(arrays: Mapping[str, Tensor]) -> Cond:
    """Conditions from `tokens` (B, L, D) and `pooled` (B, P), which may be of half precision, and `lengths` (B,), the
    number of each caption's tokens; or from `labels` (B,)."""
    if "labels" in arrays:
        labels = arrays["labels"]
        return Cond(None, None, None, labels.new_zeros(len(labels), dtype=torch.bool), labels)
    tokens, lengths = arrays["tokens"], arrays["lengths"]
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    null = mask.new_zeros(len(mask))
    return Cond(tokens.float(), mask, arrays["pooled"].float(), null)


def joined(a: Cond, b: Cond) -> Cond:
    """The conditions of two batches, not mixtures, as one: those of fewer tokens are padded."""
    if a.labels is not None and b.labels is not None:
        return Cond(None, None, None, torch.cat([a.null, b.null]), torch.cat([a.labels, b.labels]))
    assert a.tokens is not None and a.mask is not None and b.tokens is not None and b.mask is not None
    width = max(a.tokens.shape[1], b.tokens.shape[1])
    pooled = None if a.pooled is None or b.pooled is None else torch.cat([a.pooled, b.pooled])
    return Cond(
        torch.cat([F.pad(tokens, (0, 0, 0, width - tokens.shape[1])) for tokens in (a.tokens, b.tokens)]),
        torch.cat([F.pad(mask, (0, width - mask.shape[1])) for mask in (a.mask, b.mask)]),
        pooled,
        torch.cat([a.null, b.null]),
    )


def mixed(a: Cond, b: Cond, t: Tensor, classes: int = 0) -> Cond:
    """Mixtures of conditions a and b (B rows each): t (B,) in [0, 1] is the share of b. `classes`: how many a
    class-conditional model has.

    Ours. Text: the network attends to the tokens of both, with attention multiplied by 1 - t for those of a and by t
    for those of b. So the captions may differ in length, and t = 0 and t = 1 give one caption alone. The pooled vectors
    are slerped. Classes: the embeddings are interpolated linearly.
    """
    null = torch.where(t < 0.5, a.null, b.null)
    if a.labels is not None and b.labels is not None:
        one, other = (F.one_hot(labels, classes).to(t.dtype) for labels in (a.labels, b.labels))
        return Cond(None, None, None, null, class_weights=torch.lerp(one, other, t[:, None]))
    assert a.tokens is not None and a.mask is not None and a.pooled is not None
    assert b.tokens is not None and b.mask is not None and b.pooled is not None
    shares = [(1 - t)[:, None].expand(a.mask.shape), t[:, None].expand(b.mask.shape)]
    return Cond(
        torch.cat([a.tokens, b.tokens], 1),
        torch.cat([a.mask, b.mask], 1),
        slerp(a.pooled, b.pooled, t),
        null,
        token_weights=torch.cat(shares, 1),
    )


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation from a (B,...) to b (B,...), t (B,) in [0, 1]; norms are interpolated linearly.

    Linear where a and b are parallel or opposite. t = 0 and t = 1 give a and b bit for bit.
    """
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
