"""Shallow-UViT, UViT and the networks that they grow into: a core and rungs of levels.

A Shallow-UViT is a rung of one level whose map is the core's grid. A UViT is a rung whose levels go down to that grid
(arXiv 2405.16759; UViT: arXiv 2301.11093). A rung with `attach: base` refines the image of a finished, smaller network.
A rung of decoder halves only receives the features of a one-step generator (PaGoDA, arXiv 2405.14822).
Modules are keyed by absolute resolution, so growth never renames a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixelgrow.models.cond import Cond
from pixelgrow.models.config import NetConfig, RungConfig
from pixelgrow.models.core import Context, Core
from pixelgrow.models.layers import GuidanceEmbedding, to_map, to_tokens, zero_
from pixelgrow.models.level import DecoderHalf, EncoderHalf, Entry, Exit


@dataclass(frozen=True)
class RungOutput:
    """`image` (B, 3, H, W): the network output F at the rung's resolution, not yet scaled by c_out; `features`
    (B, C, h, w): the map before the exit, for the next rung; `gain` (B, 1, 1 or H, 1 or W): the share of the noisy
    details that passes (`base` rungs; else None)."""

    image: Tensor
    features: Tensor
    gain: Tensor | None


class UViT(nn.Module):
    """The network. `embed` once per evaluation, then `rung` for each rung, innermost first; a Denoiser does both."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        d = config.core.width
        self.core = Core(config.core)
        self.entry, self.exit = nn.ModuleDict(), nn.ModuleDict()
        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        self.gain = nn.ModuleDict()
        if config.guided:
            self.guidance = GuidanceEmbedding(d)
            zero_(self.guidance.out)
        features = 0
        for rung in config.rungs:
            base = rung.attach == "base"
            top = rung.levels[-1]
            key = str(rung.resolution)
            self.exit[key] = Exit(top.channels, rung.patch, d, config.space.channels + rung.pixel_gain)
            if rung.decodes:
                for i, level in enumerate(rung.levels):
                    below = rung.levels[i - 1].channels if i else features
                    self.decoder[str(level.resolution)] = DecoderHalf(level.channels, level.blocks, d, below)
                features = top.channels
                continue
            self.entry[key] = Entry((1 + base) * config.space.channels, top.channels, rung.patch)
            if base:
                self.gain[key] = gain = nn.Linear(d, 1)
                zero_(gain)
            for i, level in enumerate(rung.levels):
                if i:
                    below, factor = rung.levels[i - 1].channels, 2
                elif base:
                    below, factor = features, 0
                else:
                    below, factor = d, config.stride_of(rung) // config.map_stride(rung)
                args = (level.channels, level.blocks, d, below)
                self.encoder[str(level.resolution)] = EncoderHalf(*args, factor)
                self.decoder[str(level.resolution)] = DecoderHalf(*args)
            features = top.channels

    @property
    def blocks(self) -> list[nn.Module]:
        """The core's blocks and the halves of levels: what is computed again, or sharded, one after the other."""
        return [*self.core.blocks, *self.encoder.values(), *self.decoder.values()]

    def embed(self, c_noise: Tensor, cond: Cond, guidance: Tensor | None = None) -> Context:
        """c_noise (B,), from sigma in core units, and condition -> the context of one evaluation.

        `guidance` (B,): the weight omega, for a `guided` network; None for any other.
        """
        assert (guidance is not None) == self.config.guided
        extra = 0.0 if guidance is None else self.guidance(guidance)
        return self.core.embed(c_noise, cond, extra)

    def rung(self, rung: RungConfig, x: Tensor, ctx: Context, features: Tensor | None = None) -> RungOutput:
        """Run one rung on its preconditioned input (B, C, H, W), the image or, for `base` rungs, two images; `features`
        are those of the rung below."""
        key = str(rung.resolution)
        h, skips = self.encode(rung, x, ctx)
        if features is None:
            size = (h.shape[-2], h.shape[-1])
            h = to_map(self.core(to_tokens(h), size, ctx), size)
        else:
            h = features
        for level in rung.levels:
            h = self.decoder[str(level.resolution)](h, skips.pop(), ctx.vec)
        gain = self.gain[key](ctx.vec)[:, :, None, None] if key in self.gain else None
        image = self.exit[key](h, ctx.vec)
        if rung.pixel_gain:
            assert gain is not None
            image, of_pixels = image[:, :-1], image[:, -1:]
            gain = gain + of_pixels
        return RungOutput(image, h, gain)

    def encode(self, rung: RungConfig, x: Tensor, ctx: Context) -> tuple[Tensor, list[Tensor]]:
        """A rung's entry and encoder halves: preconditioned input -> the map for the next part down, and the skips,
        highest first."""
        h = self.entry[str(rung.resolution)](x.contiguous(memory_format=torch.channels_last))
        skips = []
        for level in reversed(rung.levels):
            skip, h = self.encoder[str(level.resolution)](h, ctx.vec)
            skips.append(skip)
        return h, skips

    def decode(self, rung: RungConfig, ctx: Context, features: Tensor) -> RungOutput:
        """Run a rung of decoder halves on the features (B, C, h, w) of the rung below."""
        h, cells = features, self.config.cells_below(rung)
        for level in rung.levels:
            stride = rung.patch * rung.resolution // level.resolution
            h = self.decoder[str(level.resolution)](h, cells // stride, ctx.vec)
            cells = stride
        return RungOutput(self.exit[str(rung.resolution)](h, ctx.vec), h, None)
