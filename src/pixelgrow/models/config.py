"""The configuration of a network: validated, and written into every checkpoint's `config.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pixelgrow.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Frozen(BaseModel):
    """Base of the configurations: immutable; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Space(Frozen):
    """Channels and range of a network's images, within [-1, 1] if `bounded`. RGB, unless a network generates latents of
    an autoencoder."""

    channels: int = Field(3, ge=1)
    bounded: bool = True

    def bound(self, images: Tensor, factors: Sequence[int] = ()) -> Tensor:
        """Images within the limits; see `layers.bounded` for `factors`."""
        from pixelgrow.models.layers import bounded  # late: this module is read without torch

        return bounded(images, factors) if self.bounded else images


PIXELS = Space()


class CoreConfig(Frozen):
    """The text-conditioned transformer. `classes` > 0 replaces the text encoder with learned class tokens."""

    width: int = Field(ge=1)
    depth: int = Field(ge=1)
    heads: int = Field(ge=1)
    mlp_ratio: int = 4
    text_dim: int = 384
    pooled_dim: int = 384
    classes: int = 0

    @model_validator(mode="after")
    def _heads_divide(self) -> CoreConfig:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4 and of heads {self.heads}")
        return self


class LevelConfig(Frozen):
    """One resolution: encoder half and decoder half of `blocks` residual blocks each, `channels` wide."""

    resolution: int = Field(ge=1)
    channels: int = Field(ge=1)
    blocks: int = 1


class RungConfig(Frozen):
    """The levels that one training stage added, in ascending resolution; the last is at the rung's own resolution.

    The top level has a map of side `resolution / patch`; each lower level has a map of half the side.
    `attach`: what is below the lowest level, and what the rung receives at its own resolution:
    - `core`: the core's grid (Shallow-UViT; UViT as the paper grows it); receives the noisy image.
    - `base`: the finished lower-resolution network (`preserve` growth of a denoiser), whose image and features it
      refines; receives the noisy image.
    - `image`, `features`: the features of a one-step generator; decoder halves only, which receive nothing else. The
      image is added to the one from below (`preserve`, ours) or replaces it (PaGoDA, arXiv 2405.14822).
    `detail_std`: standard deviation of the held-out images' details, x - up(box_down(x)), in units of the data range
    [-1, 1]; measured when the rung is grown. It scales the output of a `base` or `image` rung.
    `exact`, of `base` and `image` rungs: the rung adds only details, P F with P = 1 - up(down(.)), and the average of
    its image is the image from below for all weights (ours; docs/exact-growth.md). `until`, of exact `base` rungs: the
    gate, a sigma in core units; above it the rung adds nothing and is not evaluated. `pixel_gain`, of `base` rungs:
    whether the share of the noisy details that passes is a number for each pixel (ours) or one for the image.
    """

    levels: tuple[LevelConfig, ...] = Field(min_length=1)
    patch: int = Field(ge=1)
    attach: Literal["core", "base", "image", "features"] = "core"
    detail_std: float = 0.1
    exact: bool = False
    until: float | None = Field(None, gt=0)
    pixel_gain: bool = False

    @property
    def resolution(self) -> int:
        return self.levels[-1].resolution

    @property
    def decodes(self) -> bool:
        """Whether it has decoder halves only, as in a grown generator."""
        return self.attach in ("image", "features")

    @property
    def kind(self) -> str:
        """For people to read: what it attaches to, whether it is exact, and its gate: `base, exact until sigma 1`."""
        gate = "" if self.until is None else f" until sigma {self.until:g}"
        return f"{self.attach}{', exact' if self.exact else ''}{gate}"


def exact_sides(rungs: Sequence[RungConfig]) -> list[int]:
    """Resolutions at which the averaged image of the last rung is exactly that of a lower rung; its own is the last."""
    sides = [rungs[-1].resolution]
    for lower, upper in reversed(list(pairwise(rungs))):
        if not upper.exact:
            break
        sides.insert(0, lower.resolution)
    return sides


class NetConfig(Frozen):
    """A core with rungs around it, innermost first.

    `core_resolution`: the image side that the core was trained at; the core is conditioned on sigma at that resolution,
    sigma * core_resolution / resolution ("core units"). `core_stride`: pixels per core token there. `size`: the row of
    the size ladder with the widths of new levels. `guided`: the network is conditioned on the guidance weight too,
    embedded like a noise level (a one-step generator; PaGoDA).
    """

    size: str
    core: CoreConfig
    core_resolution: int = Field(ge=1)
    core_stride: int = Field(ge=1)
    rungs: tuple[RungConfig, ...] = Field(min_length=1)
    guided: bool = False
    space: Space = PIXELS

    @model_validator(mode="after")
    def _fits(self) -> NetConfig:
        if self.core_resolution % self.core_stride:
            raise ValueError(
                f"core_resolution {self.core_resolution} is not a multiple of its stride {self.core_stride}"
            )
        below = 0
        for i, rung in enumerate(self.rungs):
            if (rung.attach == "core") != (i == 0):
                raise ValueError("only the first rung attaches to the core, and it does so always")
            if rung.attach == "base" and self.rungs[i - 1].decodes:
                raise ValueError("a rung that receives the noisy image cannot be on top of one that does not")
            sides = [level.resolution for level in rung.levels]
            if any(b != 2 * a for a, b in pairwise(sides)) or sides[0] <= below:
                raise ValueError(f"levels {sides} are not doublings above {below}")
            if below and sides[0] != 2 * below:
                raise ValueError(f"the lowest of the levels {sides} is not the double of the resolution below, {below}")
            stride = self.map_stride(rung)
            if rung.attach == "core" and self.stride_of(rung) % stride:
                raise ValueError(f"patch {rung.patch} is too coarse for the core's grid")
            if rung.decodes and self.cells_below(rung) % stride:
                raise ValueError(f"patch {rung.patch} is too coarse for the features below")
            if rung.exact and rung.attach not in ("base", "image"):
                raise ValueError(f"exact: a rung with attach: {rung.attach} has no image from below to keep")
            if rung.until is not None and not (rung.exact and rung.attach == "base"):
                raise ValueError("until: only exact rungs of a denoiser have a gate")
            gate = self.rungs[i - 1].until if rung.attach == "base" else None
            if gate is not None and (rung.until or math.inf) > gate:
                raise ValueError(f"until {rung.until} of the rung at {rung.resolution} px exceeds {gate} of that below")
            below = rung.resolution
        return self

    def checked(self) -> NetConfig:
        """The same configuration, validated; pydantic does not validate copies with changed fields."""
        return NetConfig.model_validate(self.model_dump())

    @property
    def resolution(self) -> int:
        """Image side of the whole network."""
        return self.rungs[-1].resolution

    @property
    def latent_resolution(self) -> int:
        """Image side of the highest rung that receives the noisy image; in a generator, of its latents."""
        return max(r.resolution for r in self.rungs if not r.decodes)

    @property
    def stride(self) -> int:
        """Pixels of the final image per core token; image sides are multiples of it."""
        return self.core_stride * self.resolution // self.core_resolution

    def stride_of(self, rung: RungConfig) -> int:
        """Pixels of a rung's image per core token."""
        return self.core_stride * rung.resolution // self.core_resolution

    @property
    def patches(self) -> list[int]:
        """Sides of the rungs' patches in pixels of the final image; seams would appear at these periods."""
        return sorted({r.patch * self.resolution // r.resolution for r in self.rungs})

    @staticmethod
    def map_stride(rung: RungConfig) -> int:
        """Pixels (of the rung's image) per cell of the rung's lowest map."""
        return rung.patch * 2 ** (len(rung.levels) - 1)

    def cells_below(self, rung: RungConfig) -> int:
        """Pixels (of a rung's image) per cell of the features of the rung below."""
        below = self.rungs[self.rungs.index(rung) - 1]
        return below.patch * rung.resolution // below.resolution

    def check_size(self, size: tuple[int, int], resolution: int | None = None, *, factor: int = 1) -> None:
        """Raise UserError unless images of `size` (h, w) fit the core's grid.

        `resolution`: of the rung that makes the images; the network's own if None. `factor`: pixels of `size` per pixel
        or latent of the network.
        """
        h, w = size
        s = factor * (self.stride if resolution is None else self.core_stride * resolution // self.core_resolution)
        if h <= 0 or w <= 0 or h % s or w % s:
            up = (max(s, round(h / s) * s), max(s, round(w / s) * s))
            raise UserError(
                f"size {h}x{w} does not fit: both sides are multiples of {s}; the nearest is {up[0]}x{up[1]}"
            )
