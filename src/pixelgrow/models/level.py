"""A level: one doubling of resolution, as an encoder half and a decoder half. Also the entry and the exit."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pixelgrow.models.layers import Modulation, ResBlock, up_nearest, zero_


class EncoderHalf(nn.Module):
    """Residual blocks at one resolution, then a strided convolution to the `below` channels of the next part.

    `factor`: 2 to the next level, 1 to a core of the same grid, 0 for no further part (a `base` rung's lowest level).
    """

    def __init__(self, channels: int, blocks: int, cond_dim: int, below: int, factor: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(channels, cond_dim) for _ in range(blocks))
        self.down = nn.Conv2d(channels, below, factor, stride=factor) if factor else None

    def forward(self, x: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (B, C, H, W) for the skip, and the input of the next part (the same if there is none)."""
        for block in self.blocks:
            x = block(x, vec)
        return x, x if self.down is None else self.down(x)


class DecoderHalf(nn.Module):
    """The map from below, brought to this level's channels and size, plus the skip if any; then residual blocks."""

    def __init__(self, channels: int, blocks: int, cond_dim: int, below: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(below, channels, 1)
        self.blocks = nn.ModuleList(ResBlock(channels, cond_dim) for _ in range(blocks))

    def forward(self, below: Tensor, skip: Tensor | int, vec: Tensor) -> Tensor:
        """(B, C_below, h, w) and the skip (B, C, H, W), or only the factor H / h -> (B, C, H, W)."""
        if isinstance(skip, Tensor):
            x = up_nearest(self.up(below), skip.shape[-1] // below.shape[-1]) + skip
        else:
            x = up_nearest(self.up(below), skip)
        for block in self.blocks:
            x = block(x, vec)
        return x


class Entry(nn.Conv2d):
    """Pixels to the top map: a convolution as wide as its stride, which reduces the image at once."""

    def __init__(self, in_channels: int, channels: int, patch: int) -> None:
        super().__init__(in_channels, channels, patch, stride=patch)


class Exit(nn.Module):
    """The top map to pixels: norm, modulation, 1x1 convolution initialised to zero, channels to pixels.

    Linear after the norm (as in DiT, arXiv 2212.09748): after a non-linearity a map would need two channels for every
    pixel value that must pass through, and denoising small noise would be learnt late.
    """

    def __init__(self, channels: int, patch: int, cond_dim: int, out: int) -> None:
        super().__init__()
        self.patch = patch
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.cond = Modulation(cond_dim, channels)
        self.conv = nn.Conv2d(channels, out * patch**2, 1)
        zero_(self.conv)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        h = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.pixel_shuffle(self.conv(self.cond.modulate(h, vec)), self.patch)
