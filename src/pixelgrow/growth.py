"""Growth: a checkpoint and a target resolution make a larger checkpoint, and a report of what became of every tensor.

`init: random` is the paper's (arXiv 2405.16759): the core stays, the outer ends are thrown away, new levels around the
core start at random. `init: preserve` (ours) puts a rung on the finished network that adds nothing at the start.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pixelgrow import rng
from pixelgrow.diffusion import Denoiser
from pixelgrow.errors import UserError
from pixelgrow.heldout import denoising_error
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import LevelConfig, NetConfig, RungConfig
from pixelgrow.models.layers import box_down, up_nearest
from pixelgrow.models.sizes import level
from pixelgrow.models.uvit import UViT

Init = Literal["preserve", "random", "scratch"]


@dataclass(frozen=True)
class GrowthReport:
    """Names of the grown model's tensors by origin, and held-out error by noise level before and after.

    `loaded` come from the parent, `new` start fresh, `dropped` are the parent's that have no place any more. `before`
    is the parent on the pooled image, its answer up-sampled; `after` the grown model before its first step; both
    {sigma at the core: mean squared error} on the same held-out images and noise.
    """

    init: Init
    resolution: tuple[int, int]
    loaded: list[str]
    new: list[str]
    dropped: list[str]
    parameters: dict[str, int]
    before: dict[float, float] = field(default_factory=dict)
    after: dict[float, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def grown_config(
    config: NetConfig, to: int, init: Init, *, patch: int | None = None, blocks: int = 1, detail_std: float = 0.1
) -> NetConfig:
    """The network that `config` grows into at `to` pixels, any power of two above its resolution.

    `patch`: pixels per cell of the new top map; default half the core's stride for `preserve`, which draws details
    alone, and the core's stride otherwise. Nobody says; ours. Raises UserError if `to` or `patch` do not fit.
    """
    factor = to // config.resolution if config.resolution else 0
    if to % config.resolution or factor < 2 or factor & (factor - 1):
        ways = ", ".join(str(config.resolution * 2**i) for i in (1, 2, 3))
        raise UserError(
            f"cannot grow from {config.resolution} to {to} px: growth is by powers of two; choose {ways}, ..."
        )
    grid = config.core_resolution // config.core_stride
    kept: tuple[LevelConfig, ...] = ()
    below = config.resolution
    if init != "preserve":
        first = config.rungs[0]
        shallow = first.resolution == config.core_resolution
        below = config.core_resolution if shallow else first.resolution
        kept = () if shallow else first.levels
        patch = first.patch if kept else patch or config.core_stride
    else:
        patch = patch or max(1, config.core_stride // 2)
    coarsest = 2 * (config.rungs[-1].patch if init == "preserve" else config.core_stride)  # the map that it stands on
    if patch & (patch - 1) or patch > coarsest:
        raise UserError(f"patch {patch} does not fit a growth to {to} px: choose a power of two up to {coarsest}")
    sides = [below * 2**i for i in range(1, (to // below).bit_length())]
    new = tuple(level(config.size, side, (side // patch // grid).bit_length() - 1, blocks) for side in sides)
    if init == "preserve":
        rungs = (*config.rungs, RungConfig(levels=new, patch=patch, attach="base", detail_std=detail_std))
    else:
        rungs = (RungConfig(levels=kept + new, patch=patch, attach="core"),)
    return config.model_copy(update={"rungs": rungs}).checked()


def detail_std(images: Tensor, k: int) -> float:
    """Deviation of x - up(box_down(x)) over images (N, 3, H, W): what a growth by k has to add."""
    return max(1e-3, (images - up_nearest(box_down(images, k), k)).std().item())


def grow(
    parent: Denoiser,
    to: int,
    init: Init = "preserve",
    *,
    images: Tensor,
    cond: Cond,
    seed: int = 0,
    patch: int | None = None,
    blocks: int = 1,
    batch: int = 64,
) -> tuple[Denoiser, GrowthReport]:
    """Grow `parent` to `to` pixels. `images` (N, 3, to, to) and `cond`: the held-out batch that both are measured on,
    `batch` images at a time.

    `scratch` has the shape of `random` and loads no weight: the baseline. New tensors are a function of `seed`.
    Raises UserError if `to` is no power of two above the parent's resolution.
    """
    config = grown_config(parent.net.config, to, init, patch=patch, blocks=blocks)
    k = to // parent.resolution
    if init == "preserve":
        new = config.rungs[-1].model_copy(update={"detail_std": detail_std(images, k)})
        config = config.model_copy(update={"rungs": (*config.rungs[:-1], new)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of(seed, "growth", to))
        net = UViT(config).to(next(parent.net.parameters()))
    old = parent.net.state_dict()
    fresh = net.state_dict()
    loaded = [n for n in fresh if n in old and fresh[n].shape == old[n].shape]
    if init == "scratch":  # what is known of the text is no weight
        loaded = [n for n, _ in net.named_buffers() if n in loaded]
    if init == "preserve":
        assert set(loaded) == set(old), "preserve growth keeps every tensor"
    net.load_state_dict(fresh | {n: old[n] for n in loaded}, strict=True)
    child = Denoiser(net, parent.config).eval()

    def before(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return up_nearest(parent(box_down(x, k), sigma / k, cond), k)

    report = GrowthReport(
        init=init,
        resolution=(parent.resolution, to),
        loaded=loaded,
        new=[n for n in fresh if n not in set(loaded)],
        dropped=[n for n in old if n not in set(loaded)],
        parameters={
            "loaded": sum(fresh[n].numel() for n in loaded),
            "new": sum(t.numel() for n, t in fresh.items() if n not in set(loaded)),
        },
        before=denoising_error(before, images, cond, scale=child.noise_scale, seed=seed, batch=batch),
        after=denoising_error(child, images, cond, scale=child.noise_scale, seed=seed, batch=batch),
    )
    return child, report


def freeze(denoiser: Denoiser, names: list[str]) -> None:
    """Stop the gradient of the named tensors of the network: no memory for it, no optimizer state, equal to the bit."""
    frozen = set(names)
    for name, parameter in denoiser.net.named_parameters():
        parameter.requires_grad_(name not in frozen)
