"""A discriminator on the tokens of a frozen network: a head for each layer of features, a logit for each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pixelgrow.models.layers import GuidanceEmbedding


class Head(nn.Module):
    """Tokens (B, N, width) and condition (B, cond_dim) -> logits (B, N): spectral norm, projection of the condition.

    Projection: Miyato & Koyama, arXiv 1802.05637; per-token logits and spectral norm: PaGoDA, arXiv 2405.14822.
    """

    def __init__(self, width: int, cond_dim: int, hidden: int) -> None:
        super().__init__()
        self.down = spectral_norm(nn.Linear(width, hidden))
        self.mix = spectral_norm(nn.Linear(hidden, hidden))
        self.out = spectral_norm(nn.Linear(hidden, 1))
        self.cond = spectral_norm(nn.Linear(cond_dim, hidden))

    def forward(self, tokens: Tensor, vec: Tensor) -> Tensor:
        h = F.leaky_relu(self.down(F.layer_norm(tokens, tokens.shape[-1:])), 0.2)
        h = F.leaky_relu(h + self.mix(h), 0.2)  # (B, N, hidden)
        cond = self.cond(F.layer_norm(vec, vec.shape[-1:]))[:, :, None]  # (B, hidden, 1)
        return (self.out(h) + h @ cond / h.shape[-1] ** 0.5)[..., 0]


class Discriminator(nn.Module):
    """A head for each of `widths`: tokens (B, N_i, width_i) of several layers, and a condition -> logits (B, N_i).

    `guided`: the guidance weight of each image (B,) is a condition besides the pooled text (PaGoDA).
    """

    def __init__(self, widths: Sequence[int], cond_dim: int, hidden: int = 64, guided: bool = False) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(width, cond_dim, hidden) for width in widths)
        self.guidance = GuidanceEmbedding(cond_dim) if guided else None
        self.train()

    def train(self, mode: bool = True) -> Discriminator:
        """As of any module, but spectral norms iterate in `begin_step` alone."""
        super().train(mode)
        for _, norm in self._norms():
            norm.eval()
        return self

    @torch.no_grad()
    def begin_step(self) -> None:
        """Iterate the spectral norms once, so that a step's result does not depend on how many micro-batches it has:
        torch iterates in each forward pass."""
        for weight, norm in self._norms():
            norm.train()
            norm(weight)
            norm.eval()

    def _norms(self) -> Iterator[tuple[Tensor, nn.Module]]:
        for module in self.modules():
            if isinstance(module, nn.utils.parametrize.ParametrizationList):
                yield module.original, module[0]

    def forward(self, features: Sequence[Tensor], vec: Tensor, guidance: Tensor | None = None) -> list[Tensor]:
        assert (guidance is None) == (self.guidance is None)
        if self.guidance is not None:
            vec = F.layer_norm(vec, vec.shape[-1:]) + self.guidance(guidance)
        return [head(tokens, vec) for head, tokens in zip(self.heads, features, strict=True)]
