"""The core: a deep text-conditioned transformer at a fixed grid. It has no layers that read or write pixels."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelgrow.models.cond import Cond
from pixelgrow.models.config import CoreConfig
from pixelgrow.models.layers import CrossAttention, NoiseEmbedding, SelfAttention, sincos_positions, zero_


@dataclass(frozen=True)
class Context:
    """The inputs that all layers of one evaluation share.

    `vec` (B, width): noise level and pooled text; `modulation` (B, 6, width) shared by the core's blocks;
    `text` (B, L, text_dim) whitened tokens; `bias` (B, 1, 1, L) additive attention mask.
    """

    vec: Tensor
    modulation: Tensor
    text: Tensor
    bias: Tensor

    def __getitem__(self, rows: slice) -> Context:
        """The context of some rows."""
        return Context(self.vec[rows], self.modulation[rows], self.text[rows], self.bias[rows])


class Block(nn.Module):
    """Self-attention, cross-attention to the text, MLP; noise level and pooled text modulate the first and the last.

    All blocks share one modulation, to which each block adds a table of its own (PixArt-alpha, arXiv 2310.00426,
    "adaLN-single"; our choice, the paper does not say).
    """

    def __init__(self, config: CoreConfig) -> None:
        super().__init__()
        d = config.width
        self.table = nn.Parameter(torch.zeros(6, d))
        self.attn = SelfAttention(d, config.heads)
        self.cross_norm = nn.LayerNorm(d, eps=1e-6)
        self.cross = CrossAttention(d, config.heads, config.text_dim)
        self.up = nn.Linear(d, config.mlp_ratio * d)
        self.out = nn.Linear(config.mlp_ratio * d, d)
        zero_(self.out)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        shift0, scale0, gate0, shift1, scale1, gate1 = (ctx.modulation + self.table).unsqueeze(2).unbind(1)  # (B, 1, C)
        norm = x.shape[-1:]
        x = torch.addcmul(x, gate0 + 1, self.attn(torch.addcmul(shift0, F.layer_norm(x, norm), scale0 + 1)))
        x = x + self.cross(self.cross_norm(x), ctx.text, ctx.bias)
        h = torch.addcmul(shift1, F.layer_norm(x, norm), scale1 + 1)
        return torch.addcmul(x, gate1 + 1, self.out(F.gelu(self.up(h))))


class Core(nn.Module):
    """Tokens (B, h*w, width) -> tokens, with the condition embedded once per evaluation by `embed`."""

    text_mean: Tensor  # (text_dim,) and
    text_scale: Tensor  # (text_dim, text_dim), of the encoder's tokens: `whiten`

    def __init__(self, config: CoreConfig) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.noise = NoiseEmbedding(d)
        self.pooled = nn.Linear(config.pooled_dim, d)
        if not config.classes:
            self.register_buffer("text_mean", torch.zeros(config.text_dim))
            self.register_buffer("text_scale", torch.eye(config.text_dim))
        self.null_token = nn.Parameter(torch.randn(config.text_dim))
        self.null_pooled = nn.Parameter(torch.zeros(config.pooled_dim))
        if config.classes:
            self.class_token = nn.Embedding(config.classes, config.text_dim)
            self.class_pooled = nn.Embedding(config.classes, config.pooled_dim)
        self.gain = nn.Linear(d, d)
        self.modulation = nn.Linear(d, 6 * d)
        zero_(self.gain)
        zero_(self.modulation)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))

    @torch.no_grad()
    def whiten(self, tokens: Iterable[Tensor]) -> None:
        """Measure mean and covariance of an encoder's tokens, given as (N, text_dim) at a time; `embed` then whitens
        tokens to mean 0 and covariance 1.

        Ours. In an encoder's output, directions that distinguish occurrences of a word ("the left one", "the right
        one") have far less variance than those that distinguish words. Whitening gives both the same scale, and "a left
        of b" is learnt sooner.
        """
        assert not self.config.classes, "class labels have no text tokens"
        total = self.text_mean.double() * 0
        squares, count = self.text_scale.double() * 0, 0
        for some in tokens:
            t = some.to(total)
            total, squares, count = total + t.sum(0), squares + t.T @ t, count + len(t)
        mean = total / count
        values, vectors = torch.linalg.eigh(squares / count - mean[:, None] * mean)
        least = 0.01 * values.mean().clamp(min=1e-6)  # directions without variance are not amplified
        scale = vectors * (values.clamp(min=0) + least).rsqrt() @ vectors.T
        self.text_mean.copy_(mean)
        self.text_scale.copy_(scale)

    def embed(self, c_noise: Tensor, cond: Cond, extra: Tensor | float = 0.0) -> Context:
        """Noise level c_noise (B,) and condition -> the context of blocks and levels. `extra` (B, width) is added to
        the embedding of the noise level."""
        dtype = self.null_token.dtype
        tokens, weights, pooled = (self._classes if self.config.classes else self._text)(cond)
        null = cond.null
        first = torch.arange(weights.shape[1], device=weights.device) == 0
        tokens = torch.where(null[:, None, None], self.null_token, tokens)
        weights = torch.where(null[:, None], first.to(dtype), weights)
        pooled = torch.where(null[:, None], self.null_pooled, pooled)
        vec = F.silu(self.noise(c_noise) + self.pooled(pooled) + extra)
        return Context(
            vec=vec,
            modulation=self.modulation(vec).unflatten(1, (6, -1)),
            text=tokens,
            bias=weights.log()[:, None, None],  # added before the softmax: multiplies attention by the weights
        )

    def _classes(self, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """Classes -> one token (B, 1, text_dim), its weight (B, 1) and the pooled vector (B, pooled_dim)."""
        tables = self.class_token, self.class_pooled
        if cond.class_weights is not None:
            token, pooled = (cond.class_weights.to(table.weight.dtype) @ table.weight for table in tables)
        elif cond.labels is not None:
            token, pooled = (table(cond.labels) for table in tables)
        else:
            raise ValueError("a class-conditional core got a text condition")
        return token[:, None], token.new_ones(len(token), 1), pooled

    def _text(self, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """Text -> whitened tokens (B, L, text_dim), weights of the attention to them (B, L) and the pooled vector."""
        if cond.tokens is None or cond.mask is None or cond.pooled is None:
            raise ValueError("a text-conditional core got class labels")
        dtype = self.null_token.dtype
        tokens = (cond.tokens.to(dtype) - self.text_mean) @ self.text_scale
        weights = cond.mask.to(dtype)
        if cond.token_weights is not None:
            weights = weights * cond.token_weights.to(dtype)
        return tokens, weights, cond.pooled.to(dtype)

    def forward(self, x: Tensor, size: tuple[int, int], ctx: Context) -> Tensor:
        (last,) = deque(self.layers(x, size, ctx), maxlen=1)
        return last

    def layers(self, x: Tensor, size: tuple[int, int], ctx: Context) -> Iterator[Tensor]:
        """The tokens (B, h*w, width) after each block."""
        # A gain that depends on the noise level scales the tokens first: strong noise would hide the positions.
        x = x * (1 + self.gain(ctx.vec)[:, None]) + sincos_positions(size, x.shape[-1], x.device, x.dtype)
        for block in self.blocks:
            x = block(x, ctx)
            yield x
