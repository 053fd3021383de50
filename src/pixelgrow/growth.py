"""Growth: from a model and a target resolution to a larger model, with a report of every tensor's origin.

One mechanism for two papers. A denoiser grows by levels: with `init: random` (Greedy Growing, arXiv 2405.16759) the
core stays, the outer ends are removed, and new levels around the core start at random. A one-step generator grows by
decoder halves only: with `init: random` (PaGoDA, arXiv 2405.14822) from the features to a new output layer. For both,
`init: preserve` (ours) puts a rung on the finished network that adds nothing at the start.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pixelgrow import rng
from pixelgrow.diffusion.denoiser import Denoiser, DiffusionConfig
from pixelgrow.diffusion.heldout import Images, denoising_error
from pixelgrow.errors import UserError
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import LevelConfig, NetConfig, RungConfig
from pixelgrow.models.layers import box_down, details, up_nearest
from pixelgrow.models.sizes import level
from pixelgrow.models.uvit import UViT

Init = Literal["preserve", "random", "scratch"]
GATE = 2.0  # sigma at the resolution of a rung's lowest level, up to which it is evaluated (docs/exact-growth.md)


@dataclass(frozen=True)
class GrowthReport:
    """Names of the grown model's tensors by origin, and held-out error by noise level before and after.

    loaded, new, dropped   tensors from the parent; tensors with new values; tensors of the parent that are removed
    exact   whether the average of the image is the parent's for all weights of the new tensors
    until   the gate of the last rung, in core units
    before  error of the parent on the averaged image, its prediction up-sampled: {sigma in core units: mean squared
            error}
    after   the same of the grown model before its first step, on the same held-out images and noise
    """

    init: Init
    resolution: tuple[int, int]
    loaded: list[str]
    new: list[str]
    dropped: list[str]
    parameters: dict[str, int]
    exact: bool = False
    until: float | None = None
    before: dict[float, float] = field(default_factory=dict)
    after: dict[float, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def kept_in(lineage: Sequence[Mapping[str, Any]]) -> list[str]:
    """Hashes of the models that the model at the end of a lineage contains, latest first.

    Those are the parents of its last `preserve` growths and grafts, as long as they stayed frozen in training and lost
    no rung, and the model before its weights were `cast` to another precision, which only rounds them.
    """
    found = []
    for entry in reversed(lineage):
        tensors = entry.get("tensors", {})
        loaded = tensors.get("loaded")
        frozen = tensors.get("frozen", loaded) == loaded and "unfrozen_after" not in entry
        grown = entry.get("init") == "preserve" and frozen and not tensors.get("dropped")
        if "parent" not in entry or not (grown or entry.get("verb") == "cast"):
            break
        found.append(str(entry["parent"]))
    return found


def ungrown(denoiser: Denoiser) -> Denoiser:
    """The model before the last `preserve` growth, with copies of its weights."""
    config = denoiser.net.config
    net = UViT(config.model_copy(update={"rungs": config.rungs[:-1]}).checked())
    kept = denoiser.net.state_dict()
    net.load_state_dict({name: kept[name] for name in net.state_dict()}, strict=True)
    return type(denoiser)(net, denoiser.config).to(next(denoiser.parameters()).device).eval()


def graft(below: UViT, donor: UViT) -> tuple[UViT, int]:
    """The network of `below`'s rungs and, on them, those of `donor` above; and how many tensors are the donor's.

    Where `below` has as many rungs as the donor or more, its own last ones give way to the donor's last. Raises
    UserError unless both have the same weights below: a rung refines the image and the features that it was trained on.
    """
    ours, theirs = below.config, donor.config
    height = min(len(ours.rungs), len(theirs.rungs) - 1)
    if not height:
        raise UserError("graft: the donor has no rung above its core: name a model that was grown by preserve")
    shared = theirs.model_copy(update={"rungs": theirs.rungs[:height]})
    if ours.model_copy(update={"rungs": ours.rungs[:height]}) != shared:
        raise UserError("graft: the models below the rung have different shapes: expected two models of one core")
    mine, given = below.state_dict(), donor.state_dict()
    kept = inherited(given, theirs, shared)
    odd = [name for name in kept if not torch.equal(mine[name], given[name])]
    if odd:
        raise UserError(
            f"graft: {len(odd)} of {len(kept)} tensors below the rung differ, {odd[0]} the first: a rung fits the "
            "weights that it was trained on; name models grown from one checkpoint, with core: frozen"
        )
    net = UViT(theirs)
    net.load_state_dict(given | {name: mine[name] for name in kept}, strict=True)
    return net.to(next(below.parameters()).device).eval(), len(given) - len(kept)


def grown_config(
    config: NetConfig,
    to: int,
    init: Init,
    *,
    patch: int | None = None,
    blocks: int = 1,
    detail_std: float = 0.1,
    generator: bool = False,
    exact: bool = True,
    until: float | None = None,
) -> NetConfig:
    """The network that `config` grows into at `to` pixels, its resolution times any power of two.

    patch      pixels per cell of the new top map; default (ours) the core's stride for `random` levels around a core,
               half of it for rungs that only add details
    generator  the growth of a one-step generator: decoder halves only
    exact      with `preserve`: a rung whose averaged image is the image from below for all weights
    until      gate of an exact rung of a denoiser, in core units, inf for none; default `GATE` at the resolution of its
               lowest level, but at most the gate of the rung below

    Raises UserError if `to`, `patch`, `init`, `exact` or `until` do not fit.
    """
    if generator and init == "scratch":
        raise UserError("init: scratch is not for one-step generators; expected preserve or random")
    factor = to // config.resolution if config.resolution else 0
    if to % config.resolution or factor < 2 or factor & (factor - 1):
        ways = ", ".join(str(config.resolution * 2**i) for i in (1, 2, 3))
        raise UserError(
            f"cannot grow from {config.resolution} to {to} px: growth is by powers of two; choose {ways}, ..."
        )
    grid = config.core_resolution // config.core_stride
    kept: tuple[LevelConfig, ...] = ()
    below = config.resolution
    around = init != "preserve" and not generator
    if around:
        first = config.rungs[0]
        shallow = first.resolution == config.core_resolution
        below = config.core_resolution if shallow else first.resolution
        kept = () if shallow else first.levels
        patch = first.patch if kept else patch or config.core_stride
    else:
        patch = patch or min(max(1, config.core_stride // 2), 2 * config.rungs[-1].patch)
    coarsest = 2 * (config.core_stride if around else config.rungs[-1].patch)  # twice the cells of the map below
    if patch & (patch - 1) or patch > coarsest:
        raise UserError(f"patch {patch} does not fit a growth to {to} px: choose a power of two up to {coarsest}")
    sides = [below * 2**i for i in range(1, (to // below).bit_length())]
    new = tuple(level(config.size, side, (side // patch // grid).bit_length() - 1, blocks) for side in sides)
    attach: Literal["core", "base", "image", "features"] = "core" if around else "base"
    if generator:
        attach = "image" if init == "preserve" else "features"
    exact = exact and init == "preserve"
    until = None if generator or around else _gate(config, sides[0], exact, until)
    rung = RungConfig(
        levels=kept + new, patch=patch, attach=attach, detail_std=detail_std, exact=exact, until=until,
        pixel_gain=attach == "base",
    )  # fmt: skip
    return config.model_copy(update={"rungs": (rung,) if around else (*config.rungs, rung)}).checked()


def _gate(config: NetConfig, lowest: int, exact: bool, until: float | None) -> float | None:
    """The gate of a new rung whose lowest level is at `lowest` px; None for none. Raises UserError if it does not fit.

    Where the rung below is closed it has no features to give, so a gate is at most that of the rung below.
    """
    below = config.rungs[-1].until or math.inf
    if not exact:
        if below < math.inf:
            raise UserError(
                f"exact: got false, but the rung below has a gate (until {below:g}), and only exact rungs have one: "
                "drop it"
            )
        return None
    if until is None:
        until = min(GATE * config.core_resolution / lowest, below)
    if until > below:
        raise UserError(
            f"until: got {until:g}, expected at most {below:g}, the gate of the rung below; lower it or drop it"
        )
    return None if until == math.inf else until


def check_gate(until: float | None, config: DiffusionConfig) -> None:
    """Raise UserError for a gate outside of a model's noise levels, both in core units."""
    if until is not None and until != math.inf and not config.sigma_min < until < config.sigma_max:
        raise UserError(
            f"until: got {until:g}, expected a sigma between the model's sigma_min {config.sigma_min:g} and sigma_max "
            f"{config.sigma_max:g}, in core units (sigma at the core's resolution); or .inf for no gate"
        )


def detail_std(images: Images, k: int) -> float:
    """Standard deviation of x - up(box_down(x)) over N images (3, h, w): of the details that a growth by k adds."""
    return max(1e-3, torch.cat([details(image[None], k).flatten() for image in images]).std().item())


def grow(
    parent: Denoiser,
    to: int | Sequence[int],
    init: Init = "preserve",
    *,
    images: Images,
    cond: Cond,
    seed: int = 0,
    patch: int | None = None,
    blocks: int = 1,
    exact: bool = True,
    until: float | None = None,
    batch: int = 64,
) -> tuple[Denoiser, GrowthReport]:
    """Grow `parent` to `to` pixels, at once or over several resolutions in turn.

    `images` (N, 3, to, to), or N of several sizes in buckets, and `cond`: the held-out images that both models are
    measured on, `batch` at a time. `scratch`, the baseline, has the shape of `random` and loads no weights. New tensors
    are a function of `seed`. For the other arguments see `grown_config`. Raises UserError if `to` is not the parent's
    resolution times a power of two, or if `until` is outside of its noise levels.
    """
    config = parent.net.config
    check_gate(until, parent.config)
    sides = [to] if isinstance(to, int) else list(to)
    for side in sides:
        low = config.resolution
        config = grown_config(config, side, init, patch=patch, blocks=blocks, exact=exact, until=until)
        if init == "preserve":
            config = with_detail(config, detail_std(smaller(images, sides[-1] // side), side // low))
    net, report = grow_network(parent.net, config, init, seed)
    k = config.resolution // parent.resolution
    child = Denoiser(net, parent.config).eval()

    def before(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return up_nearest(parent(box_down(x, k), sigma / k, cond), k)

    measure = partial(denoising_error, images=images, cond=cond, scale=child.noise_scale, seed=seed, batch=batch)
    return child, replace(report, before=measure(before), after=measure(child))


def smaller(images: Images, k: int) -> list[Tensor]:
    """Averages over k x k pixels of N images (3, h, w)."""
    return [box_down(image, k) for image in images]


def with_detail(config: NetConfig, std: float) -> NetConfig:
    """`config` with the standard deviation of its last rung's details."""
    return config.model_copy(
        update={"rungs": (*config.rungs[:-1], config.rungs[-1].model_copy(update={"detail_std": std}))}
    )


def inherited(names: Iterable[str], config: NetConfig, old: NetConfig) -> list[str]:
    """The tensors of a network of `config` that come from its parent, a network of `old`.

    All of the parent's if the new rung is on top of it; else the core's, and the levels' if the parent was a UViT.
    """
    on_top = config.rungs[: len(old.rungs)] == old.rungs
    shallow = old.rungs[0].resolution == old.core_resolution
    kept = [] if shallow and not on_top else [lv for r in (old.rungs if on_top else old.rungs[:1]) for lv in r.levels]
    sides = {str(level.resolution) for level in kept}
    halves = ("encoder", "decoder") + (("entry", "exit", "gain") if on_top else ())

    def stays(name: str) -> bool:
        part, side, *_ = name.split(".")
        return part in ("core", "guidance") or (part in halves and side in sides)

    return [n for n in names if stays(n)]


def grow_network(old: UViT, config: NetConfig, init: Init, seed: int = 0) -> tuple[UViT, GrowthReport]:
    """The network of a `grown_config`, with the tensors that it inherits from `old`, and a report without errors. New
    tensors are a function of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of(seed, "growth", config.resolution))
        net = UViT(config).to(next(old.parameters()))
    kept, fresh = old.state_dict(), net.state_dict()
    loaded = inherited(fresh, config, old.config)
    if init == "scratch":  # the text's statistics, which are buffers, are loaded all the same
        loaded = [n for n, _ in net.named_buffers() if n in loaded]
    net.load_state_dict(fresh | {n: kept[n] for n in loaded}, strict=True)
    new = [n for n in fresh if n not in set(loaded)]
    return net, GrowthReport(
        init=init,
        exact=config.rungs[-1].exact,
        until=config.rungs[-1].until,
        resolution=(old.config.resolution, config.resolution),
        loaded=loaded,
        new=new,
        dropped=[n for n in kept if n not in set(loaded)],
        parameters={k: sum(fresh[n].numel() for n in names) for k, names in (("loaded", loaded), ("new", new))},
    )


def freeze(net: UViT, names: list[str]) -> None:
    """Exclude the named tensors of a network from training: no gradients, no optimizer state, never changed."""
    frozen = set(names)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in frozen)


def last_blocks(config: NetConfig, count: int) -> tuple[str, ...]:
    """Name prefixes of the last `count` residual blocks of a network, which PaGoDA trains in an otherwise frozen base.

    Raises UserError if its last half level has fewer.
    """
    top = config.rungs[-1].levels[-1]
    if count > top.blocks:
        raise UserError(f"base_blocks: got {count}, expected at most {top.blocks}, the blocks of the base's last level")
    return tuple(f"decoder.{top.resolution}.blocks.{i}." for i in range(top.blocks - count, top.blocks))
