"""What a stage will need, before anything is allocated: parameters, FLOPs, memory, time.

Networks are run, forward and backward, on fake tensors: every operation happens, none of them on data. The core's
blocks are all alike: a network is run with one of them, and one is run alone for all the others.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pixelgrow.diffusion import Denoiser, loss
from pixelgrow.flops import FORMULAS
from pixelgrow.growth import freeze, inherited
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import CoreConfig, NetConfig
from pixelgrow.models.uvit import UViT
from pixelgrow.recipe import Recipe, read_recipe
from pixelgrow.recipe_spec import GrowStage, ModelStage, TrainStage, makes_generator
from pixelgrow.shapes import networks, parent_network
from pixelgrow.training.denoise import recompute_blocks
from pixelgrow.training.settings import TrainSettings

REFERENCE = "the size's reference"  # a text encoder that is nowhere: the width of the size's table row stands in
SHARE = 0.5  # of the matrix-product rate that training is taken to achieve, where a time is told


@dataclass(frozen=True)
class Memory:
    """Bytes. `activations`: what a micro-batch keeps for the way back; `peak`: everything at the worst moment."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    peak: int


@dataclass(frozen=True)
class Cost:
    """A network in training: parameters by part (`core`, `levels`, `training`), FLOPs per image, memory of a step."""

    parameters: dict[str, int]
    forward: float
    backward: float
    memory: Memory

    @property
    def flops(self) -> float:
        """FLOPs per training image."""
        return self.forward + self.backward


@dataclass(frozen=True)
class StagePlan:
    """One phase of one stage: what it trains, at `resolution`, on `images` in micro-batches of `batch`."""

    name: str
    what: str
    resolution: int
    images: int
    batch: int
    cost: Cost

    def seconds(self, rate: float) -> float:
        """Time at `rate` FLOP/s achieved."""
        return self.images * self.cost.flops / rate


# --- one network ------------------------------------------------------------------------------------------------------


def network_cost(
    config: NetConfig, settings: TrainSettings, *, frozen: NetConfig | None = None, tokens: int = 32, bf16: bool = False
) -> Cost:
    """The cost of training a network of `config`, the tensors of `frozen` (what it grew out of) not training.

    tokens: of a caption. bf16: under autocast, as on a GPU; weights, gradients and optimizer stay fp32.
    """
    whole, block, core = _measure(config, settings, frozen, tokens, bf16)
    more = config.core.depth - 1
    weights = whole.weights + more * block.weights
    training = whole.training + more * block.training
    state = whole.optimizer + more * block.optimizer
    activations = whole.activations + more * block.activations
    averages = training * len(settings.ema)
    transient = whole.peak - max(whole.activations, whole.training)
    # The gradients of one micro-batch are there while the next one's activations are made.
    held = activations + training if settings.accumulate > 1 else max(activations, training)
    peak = weights + state + averages + held + transient
    core += more * block.weights // 4
    return Cost(
        parameters={"core": core, "levels": weights // 4 - core, "training": training // 4},
        forward=(whole.forward + more * block.forward) / settings.micro_batch,
        backward=(whole.backward + more * block.backward) / settings.micro_batch,
        memory=Memory(weights, training, state, averages, activations, peak),
    )


@dataclass(frozen=True)
class _Measured:
    """Bytes of all weights, of those that train, of the optimizer, and live; FLOPs of a micro-batch."""

    weights: int
    training: int
    optimizer: int
    activations: int
    peak: int
    forward: int
    backward: int


def _measure(
    config: NetConfig, settings: TrainSettings, frozen: NetConfig | None, tokens: int, bf16: bool
) -> tuple[_Measured, _Measured, int]:
    """A network with one block in its core; such a block alone; and the parameters of that core."""
    batch = settings.micro_batch
    with FakeTensorMode():
        denoiser = Denoiser(UViT(_shallow(config)))
        net = denoiser.net
        if frozen is not None:
            freeze(net, inherited(net.state_dict(), config, frozen))
        if settings.activation_checkpointing:
            recompute_blocks(net)
        cond = _cond(config.core, batch, tokens)
        block = net.core.blocks[0]
        trains, entered = (next(m.parameters()).requires_grad for m in (block, net.entry))
        grid = (config.core_resolution // config.core_stride) ** 2
        x = torch.zeros(batch, grid, config.core.width, requires_grad=entered or trains)
        seen = net.core.embed(torch.zeros(batch), cond)
        leaves = {k: getattr(seen, k).detach().requires_grad_(trains) for k in ("vec", "modulation", "text")}
        ctx = replace(seen, **leaves)
        return (
            _measured(denoiser, settings, step_cost(denoiser, cond, batch, bf16=bf16)),
            _measured(block, settings, _run(lambda: block(x, ctx), bf16)),
            sum(p.numel() for p in net.core.parameters()),
        )


def _shallow(config: NetConfig) -> NetConfig:
    return config.model_copy(update={"core": config.core.model_copy(update={"depth": 1})})


def _measured(module: nn.Module, settings: TrainSettings, run: dict[str, int]) -> _Measured:
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    slots = [1 if settings.optimizer == "muon" and p.ndim == 2 else 2 for p in trained]
    return _Measured(
        weights=4 * sum(p.numel() for p in parameters),
        training=4 * sum(p.numel() for p in trained),
        optimizer=4 * sum(n * p.numel() for n, p in zip(slots, trained, strict=True)),
        **run,
    )


def step_cost(denoiser: Denoiser, cond: Cond, batch: int, *, bf16: bool = False) -> dict[str, int]:
    """Run one loss forward and backward: FLOPs of both ways, bytes live between them and at the peak.

    Works on fake tensors and on real ones alike. Bytes are of tensors made on the way, gradients included.
    """
    side = denoiser.resolution
    x = torch.zeros(batch, denoiser.space.channels, side, side)
    sigma, weights = torch.ones(batch), torch.ones(batch)
    return _run(lambda: loss(denoiser, x, sigma, torch.zeros_like(x), cond, weights).mean(), bf16)


def _run(work: Callable[[], Tensor], bf16: bool) -> dict[str, int]:
    """`work` forward and, where there is something to train, backward."""
    with Live() as live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            out = work()
        activations, forward = live.now if out.requires_grad else 0, live.flops
        if out.requires_grad:
            out.sum().backward()
    return {"activations": activations, "peak": live.peak, "forward": forward, "backward": live.flops - forward}


def _cond(core: CoreConfig, batch: int, tokens: int) -> Cond:
    null = torch.zeros(batch, dtype=torch.bool)
    if core.classes:
        return Cond(None, None, None, null, torch.zeros(batch, dtype=torch.long))
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    return Cond(torch.zeros(batch, tokens, core.text_dim), mask, torch.zeros(batch, core.pooled_dim), null)


class Live(TorchDispatchMode):
    """Bytes of the tensors made while it is on and still there: `now`, and at the most, `peak`; and `flops` done."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        if formula := FORMULAS.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), given)
        return out

    def _note(self, storage: Any, given: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen or key in given:  # counted, or a view of what was there before
            return
        self._seen[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size


# --- a recipe ---------------------------------------------------------------------------------------------------------


def plan_recipe(recipe: Recipe, *, gpu: bool | None = None) -> list[StagePlan]:
    """Every training phase of a recipe, in order, but those of one-step generators, whose cost is not planned. `gpu`:
    plan for one, by default where there is one."""
    gpu = torch.cuda.is_available() if gpu is None else gpu
    nets = networks(recipe)
    return [
        plan
        for stage in recipe.stages
        if isinstance(stage, ModelStage) and not makes_generator(stage)
        for plan in _phases(stage, nets, recipe.text.max_tokens, gpu)
    ]


def _phases(stage: ModelStage, nets: dict[str, NetConfig], tokens: int, gpu: bool) -> Iterator[StagePlan]:
    """The phases of a stage."""
    config = nets[stage.name]
    phases: Sequence[tuple[str, int, NetConfig | None]] = [("train on", stage.images, None)]
    if isinstance(stage, TrainStage) and stage.parent is None:
        phases = [(f"train {stage.size}", stage.images, None)]
    elif isinstance(stage, GrowStage):
        assert stage.parent is not None
        parent = parent_network(stage.parent, nets)
        grown = f"grow {stage.init}"
        if stage.unfreeze_after is not None:
            rest = stage.images - stage.unfreeze_after
            phases = [(f"{grown}, frozen", stage.unfreeze_after, parent), (f"{grown}, unfrozen", rest, None)]
        elif stage.trains_core:
            phases = [(grown if stage.init == "scratch" else f"{grown}, finetune", stage.images, None)]
        else:
            phases = [(f"{grown}, frozen", stage.images, parent)]
    for what, images, frozen in phases:
        settings = stage.training(images)
        bf16 = settings.precision == "bf16" or (settings.precision == "auto" and gpu)
        cost = network_cost(config, settings, frozen=frozen, tokens=tokens, bf16=bf16)
        yield StagePlan(stage.name, what, config.resolution, images, settings.micro_batch, cost)


def plan_size(size: str, resolution: int, *, core: int | None, stride: int, images: int, batch: int) -> Recipe:
    """A recipe in memory for a size of the ladder: a core, grown to `resolution` if that is more than the core's.

    `core`: pixels of the core's training; by default 64, or `resolution` if that is less.
    """
    low = min(64, resolution) if core is None else core
    stages: list[dict[str, Any]] = [
        {"train": {"name": "core", "size": size, "resolution": low, "stride": stride, "images": images, "batch": batch}}
    ]
    if resolution != low:
        stages.append({"grow": {"name": "grown", "to": resolution, "images": images, "batch": batch}})
    text = {"encoder": REFERENCE}
    return read_recipe({"name": size, "text": text, "data": {"source": "scenes"}, "stages": stages}, "plan")


def parts_of(config: NetConfig) -> dict[str, int]:
    """Parameters of a network by part: the core, and each resolution's levels with what goes with them."""
    with torch.device("meta"):
        net = UViT(config)
    parts: dict[str, int] = {}
    for name, p in net.named_parameters():
        head, _, rest = name.partition(".")
        key = head if head in ("core", "guidance") else f"{rest.partition('.')[0]} px"
        parts[key] = parts.get(key, 0) + p.numel()
    return parts


def measured_rate() -> float:
    """FLOP/s that training may achieve here: `SHARE` of the rate of matrix products, measured now."""
    from pixelgrow.training.monitor import matmul_rate

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    return SHARE * matmul_rate(device, torch.bfloat16 if gpu else torch.float32)
