"""Building blocks: attention, residual convolution, embeddings. Written for few passes over memory.

Token tensors are (B, N, C); maps are (B, C, H, W) in channels-last memory, so either is a view of the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def box_down(x: Tensor, k: int) -> Tensor:
    """Average k x k pixels, k a power of two: (B, C, H, W) -> (B, C, H/k, W/k).

    Halved repeatedly: the average of equal pixels is exactly their value, and growth's identity holds bit for bit.
    """
    while k > 1:
        x = ((x[..., ::2, ::2] + x[..., 1::2, 1::2]) + (x[..., ::2, 1::2] + x[..., 1::2, ::2])) * 0.25
        k //= 2
    return x


def up_nearest(x: Tensor, k: int) -> Tensor:
    """Repeat every pixel k x k times: (B, C, H, W) -> (B, C, kH, kW)."""
    return x if k == 1 else F.interpolate(x, scale_factor=k, mode="nearest")


def details(x: Tensor, k: int) -> Tensor:
    """What averaging over k x k pixels removes: P x = x - up(down(x)), a projection of (B, C, H, W)."""
    return x - up_nearest(box_down(x, k), k)


def bounded(x: Tensor, factors: Sequence[int] = ()) -> Tensor:
    """Images x (B, C, H, W) within [-1, 1], whose averages over blocks are the bounded averages (ours).

    `factors`, innermost first: of the growths that the images are exact over. The smallest image is clamped. Then,
    growth by growth, the details of each block and channel are scaled down until they fit, which keeps the mean. A
    clamp of the whole image would change it: where an edge overshoots, the block would become darker.
    """
    if not factors:
        return x.clamp(-1, 1)
    *inner, k = factors
    mean = box_down(x, k)
    detail, low = x - up_nearest(mean, k), up_nearest(bounded(mean, inner), k)
    room = torch.where(detail > 0, 1 - low, 1 + low) / detail.abs().clamp_min(torch.finfo(x.dtype).tiny)
    least = -F.max_pool2d(-room, k) if k > 1 else room  # in each block
    return (low + up_nearest(least.clamp(max=1), k) * detail).clamp(-1, 1)  # this clamp removes rounding errors


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W) in channels-last memory."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def zero_(layer: nn.Linear | nn.Conv2d) -> None:
    """Set a layer to zero, so its branch contributes nothing at the start."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def sincos_positions(size: tuple[int, int], dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Fixed sine-cosine positions (H*W, dim), counted from the centre, for any (h, w).

    Wavelengths from 4 to 64 tokens (ours): longer ones are nearly constant over a core's grid, and a network learns
    late to tell nearly equal positions apart.
    """
    omega = torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4)
    omega = math.pi / 2 / 16.0**omega
    h, w = (torch.arange(n, device=device, dtype=torch.float32) - (n - 1) / 2 for n in size)
    rows, cols = h[:, None] * omega, w[:, None] * omega
    rows = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, size[1], -1)
    cols = torch.cat([cols.sin(), cols.cos()], 1)[None].expand(size[0], -1, -1)
    return torch.cat([rows, cols], 2).flatten(0, 1).to(dtype)


class NoiseEmbedding(nn.Module):
    """A noise level c_noise (B,) as a vector (B, width): cosine features, then two layers."""

    def __init__(self, width: int, features: int = 128) -> None:
        super().__init__()
        self.features = features
        self.up = nn.Linear(features, width)
        self.out = nn.Linear(width, width)

    def forward(self, c_noise: Tensor) -> Tensor:
        octaves = torch.linspace(-1.0, 5.0, self.features // 2, device=c_noise.device, dtype=torch.float32)
        angle = c_noise.float()[:, None] * torch.exp2(octaves) * (math.pi / 2)
        x = torch.cat([angle.sin(), angle.cos()], 1).to(self.up.weight.dtype)
        return self.out(F.silu(self.up(x)))


class GuidanceEmbedding(NoiseEmbedding):
    """A guidance weight omega (B,) as a vector (B, width): "like a noise level" (PaGoDA, arXiv 2405.14822); ours is
    ln omega / 4, on the scale of c_noise."""

    def forward(self, guidance: Tensor) -> Tensor:
        return super().forward(guidance.log() / 4)


class SelfAttention(nn.Module):
    """Self-attention with normalised queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-6, bias=False)
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-6, bias=False)
        self.out = nn.Linear(width, width)
        zero_(self.out)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, N, heads, C/heads)
        q, k = self.q_norm(q), self.k_norm(k)
        h = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(h.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention from image tokens (B, N, width) to text tokens (B, L, text_dim), with an additive mask (B, 1, 1, L)."""

    def __init__(self, width: int, heads: int, text_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(text_dim, 2 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-6, bias=False)
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-6, bias=False)
        self.out = nn.Linear(width, width)
        zero_(self.out)

    def forward(self, x: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        q = self.q_norm(self.q(x).unflatten(-1, (self.heads, -1)))
        k, v = self.kv(text).unflatten(-1, (2, self.heads, -1)).unbind(2)
        h = F.scaled_dot_product_attention(
            q.transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2), attn_mask=bias
        )
        return self.out(h.transpose(1, 2).flatten(2))


class Modulation(nn.Linear):
    """Scale and shift of each channel of a map by the condition (B, cond_dim); the identity at the start.

    F's target has unit variance, but at low sigma its signal in the input is O(sigma); a sigma-dependent gain rescales
    it. With modulation such a gain is quick to learn, and small noise is denoised early in training.
    """

    def __init__(self, cond_dim: int, channels: int) -> None:
        super().__init__(cond_dim, 2 * channels)
        zero_(self)

    def modulate(self, x: Tensor, vec: Tensor) -> Tensor:
        """(B, C, H, W) -> x * (1 + scale) + shift."""
        scale, shift = self(vec)[:, :, None, None].chunk(2, 1)
        return torch.addcmul(shift, x, scale + 1)


class ResBlock(nn.Module):
    """Convolutional residual block: norm over channels, two 3x3 convolutions with modulation by the condition between.

    The second convolution starts at zero. No dropout (the papers use none at high resolution).
    """

    def __init__(self, channels: int, cond_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.cond = Modulation(cond_dim, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        zero_(self.conv1)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        h = F.silu(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)  # (B, C, H, W)
        return x + self.conv1(F.silu(self.cond.modulate(self.conv0(h), vec)))
