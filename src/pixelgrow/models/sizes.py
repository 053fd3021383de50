"""The size ladder: one table from `nano` to `huge`, and the networks of each size.

The papers give the largest (8B) and one shape of the 2B class (core width 2048, levels 128/256/512); the rest is our
choice. `parameters` counts the Shallow-UViT of a size with that size's reference text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

from pixelgrow.errors import UserError
from pixelgrow.models.config import PIXELS, CoreConfig, LevelConfig, NetConfig, RungConfig, Space


@dataclass(frozen=True)
class Size:
    """`channels[j]`: width of a level whose map is 2^j times the core's grid; higher levels have the last width."""

    parameters: float
    width: int
    depth: int
    heads: int
    channels: tuple[int, ...]
    text_dim: int
    mlp_ratio: int = 4


SIZES: dict[str, Size] = {
    "nano": Size(1.3e6, 128, 3, 2, (64, 96, 48), 384, mlp_ratio=3),
    "tiny": Size(3e6, 192, 4, 3, (72, 128, 64), 384, mlp_ratio=3),
    "small": Size(30e6, 512, 6, 8, (256, 256, 128), 384),
    "base": Size(150e6, 768, 14, 12, (384, 256, 128), 1024),
    "large": Size(650e6, 1152, 27, 18, (512, 256, 128), 2048),
    "xl": Size(1.3e9, 1536, 28, 24, (512, 256, 128), 4096),
    "xxl": Size(2.4e9, 2048, 31, 32, (512, 512, 256, 128), 4096),
    "huge": Size(8e9, 4096, 29, 32, (512, 512, 256, 128), 4096),
}


def size(name: str) -> Size:
    """The row of the table; UserError for a name it does not have."""
    if name not in SIZES:
        raise UserError(f"size {name!r} is not known: choose one of {', '.join(SIZES)}")
    return SIZES[name]


def core_config(
    name: str, *, text_dim: int | None = None, pooled_dim: int | None = None, classes: int = 0
) -> CoreConfig:
    """The core of a size, for a text encoder `text_dim` wide (default: the size's reference) or for class labels."""
    row = size(name)
    text_dim = text_dim or row.text_dim
    return CoreConfig(
        width=row.width,
        depth=row.depth,
        heads=row.heads,
        mlp_ratio=row.mlp_ratio,
        text_dim=text_dim,
        pooled_dim=pooled_dim or text_dim,
        classes=classes,
    )


def level(name: str, resolution: int, doublings: int, blocks: int = 1) -> LevelConfig:
    """A level of a size whose map is 2^doublings times the core's grid."""
    channels = size(name).channels
    return LevelConfig(resolution=resolution, channels=channels[min(doublings, len(channels) - 1)], blocks=blocks)


def shallow_uvit(
    name: str,
    resolution: int,
    *,
    stride: int = 4,
    patch: int | None = None,
    core: CoreConfig | None = None,
    space: Space = PIXELS,
) -> NetConfig:
    """Shallow-UViT: entry convolution of the core's stride, a residual block, the core, a block, the mirrored exit.

    `patch` (ours): the entry reduces only by this factor, the blocks work on the finer map, and a second convolution
    leads to the core's grid. Edges are better for a little more compute. Default: the stride, as in the paper.
    """
    patch = patch or stride
    if resolution % stride:
        raise UserError(f"resolution {resolution} is not a multiple of the core's stride {stride}: choose one that is")
    if stride % patch:
        raise UserError(f"patch {patch} does not divide the core's stride {stride}: choose a divisor")
    finer = (stride // patch).bit_length() - 1
    rung = RungConfig(levels=(level(name, resolution, finer),), patch=patch)
    return NetConfig(
        size=name,
        core=core or core_config(name),
        core_resolution=resolution,
        core_stride=stride,
        rungs=(rung,),
        space=space,
    )
