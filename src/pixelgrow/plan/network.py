"""The cost of training a network, with nothing allocated: parameters, FLOPs, memory.

The network runs forward and backward on fake tensors, which have shapes and no data. The core's blocks are all alike:
the denoiser runs with one of them, and one alone stands for all the others.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pixelgrow.diffusion.denoiser import Denoiser, loss
from pixelgrow.growth import freeze, inherited
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import CoreConfig, NetConfig
from pixelgrow.models.flops import FORMULAS
from pixelgrow.models.uvit import UViT
from pixelgrow.training.denoise import recompute_blocks
from pixelgrow.training.optim import optimizers, trainable
from pixelgrow.training.settings import TrainSettings


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step. `activations`: kept by a micro-batch for its backward pass; `peak`: all at most."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    peak: int


@dataclass(frozen=True)
class Cost:
    """Parameters by part (`core`, `levels`, `training`), FLOPs per image by kind of work, memory of a step.

    `work`: `forward` and `backward`; for a one-step generator, the updates of `generator` and `discriminator`.
    """

    parameters: dict[str, int]
    work: dict[str, float]
    memory: Memory

    @property
    def flops(self) -> float:
        """FLOPs per image."""
        return sum(self.work.values())


def network_cost(
    config: NetConfig, settings: TrainSettings, *, frozen: NetConfig | None = None, tokens: int = 32, bf16: bool = False
) -> Cost:
    """The cost of training a network of `config`.

    frozen: the network that it grew from, whose tensors do not train. tokens: of a caption. bf16: autocast, as on a
    GPU; weights, gradients and optimizer state stay fp32.
    """
    first, block, core = _measure(config, settings, frozen, tokens, bf16)
    more = config.core.depth - 1
    whole = first.with_blocks(more, block)
    return Cost(
        parameters=whole.parameters(core + more * block.weights // 4),
        work={k: getattr(whole, k) / settings.micro_batch for k in ("forward", "backward")},
        memory=memory_of([whole], settings),
    )


@dataclass(frozen=True)
class Measured:
    """Bytes and FLOPs of a micro-batch.

    weights, training: of all parameters, and of those that train. transient: live at most beyond the larger of
    activations and gradients. forward, backward: FLOPs.
    """

    weights: int
    training: int
    optimizer: int
    activations: int
    transient: int
    forward: int
    backward: int

    def with_blocks(self, count: int, block: Measured) -> Measured:
        """The same with `count` more blocks; their transient bytes do not add up."""
        names = [f.name for f in fields(self) if f.name != "transient"]
        return replace(self, **{n: getattr(self, n) + count * getattr(block, n) for n in names})

    def parameters(self, core: int) -> dict[str, int]:
        """Parameters by part. `core`: the core's."""
        return {"core": core, "levels": self.weights // 4 - core, "training": self.training // 4}

    def peak(self, accumulate: int) -> int:
        """Bytes that a step makes, at their most."""
        # With accumulation, the gradients of earlier micro-batches are held beside the activations of the next.
        several = accumulate > 1
        held = self.activations + self.training if several else max(self.activations, self.training)
        return held + self.transient


def measured(module: nn.Module, settings: TrainSettings, run: dict[str, int]) -> Measured:
    """The cost of training `module`. `run`: of its loss forward and backward, from `spent`."""
    slots = [
        p.numel() * (1 if isinstance(opt, torch.optim.Muon) else 2)
        for opt in optimizers(module, settings)
        for group in opt.param_groups
        for p in group["params"]
    ]
    training = 4 * sum(p.numel() for p in trainable(module).values())
    return Measured(
        weights=bytes_of(module),
        training=training,
        optimizer=4 * sum(slots),
        activations=run["activations"],
        transient=run["peak"] - max(run["activations"], training),
        forward=run["forward"],
        backward=run["backward"],
    )


def memory_of(parts: Sequence[Measured], settings: TrainSettings, others: int = 0) -> Memory:
    """Memory of a step that updates several networks in turn. `others`: bytes of networks that do not train."""
    weights = others + sum(p.weights for p in parts)
    state = sum(p.optimizer for p in parts)
    averages = len(settings.ema) * sum(p.training for p in parts)
    return Memory(
        weights=weights,
        gradients=max(p.training for p in parts),
        optimizer=state,
        averages=averages,
        activations=max(p.activations for p in parts),
        peak=weights + state + averages + max(p.peak(settings.accumulate) for p in parts),
    )


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters in fp32."""
    return 4 * sum(p.numel() for p in module.parameters())


def _measure(
    config: NetConfig, settings: TrainSettings, frozen: NetConfig | None, tokens: int, bf16: bool
) -> tuple[Measured, Measured, int]:
    """A network with one block in its core; that block alone; the number of parameters of that core."""
    batch = settings.micro_batch
    with FakeTensorMode():
        denoiser = Denoiser(UViT(_shallow(config)))
        net = denoiser.net
        if frozen is not None:
            freeze(net, inherited(net.state_dict(), config, frozen))
        if settings.activation_checkpointing:
            recompute_blocks(net)
        cond = blank_cond(config.core, batch, tokens)
        block = net.core.blocks[0]
        trains, entered = (next(m.parameters()).requires_grad for m in (block, net.entry))
        grid = (config.core_resolution // config.core_stride) ** 2
        x = torch.zeros(batch, grid, config.core.width, requires_grad=entered or trains)
        seen = net.core.embed(torch.zeros(batch), cond)
        leaves = {k: getattr(seen, k).detach().requires_grad_(trains) for k in ("vec", "modulation", "text")}
        ctx = replace(seen, **leaves)
        return (
            measured(denoiser, settings, step_cost(denoiser, cond, batch, bf16=bf16)),
            measured(block, settings, spent(lambda: block(x, ctx), bf16=bf16)),
            bytes_of(net.core) // 4,
        )


def _shallow(config: NetConfig) -> NetConfig:
    return config.model_copy(update={"core": config.core.model_copy(update={"depth": 1})})


def step_cost(denoiser: Denoiser, cond: Cond, batch: int, *, bf16: bool = False) -> dict[str, int]:
    """Run one loss forward and backward: FLOPs of each, bytes live between them (`activations`) and at most (`peak`).

    Tensors may be fake or real. Bytes are those of tensors made in the run, gradients included.
    """
    side = denoiser.resolution
    x = torch.zeros(batch, denoiser.space.channels, side, side)
    sigma, weights = torch.ones(batch), torch.ones(batch)
    return spent(lambda: loss(denoiser, x, sigma, torch.zeros_like(x), cond, weights).mean(), bf16=bf16)


def spent(work: Callable[[], Tensor], *, bf16: bool = False) -> dict[str, int]:
    """Run `work` forward, and backward if anything trains; see `step_cost`."""
    with Live() as live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            out = work()
        activations, forward = live.now if out.requires_grad else 0, live.flops
        if out.requires_grad:
            out.sum().backward()
    return {"activations": activations, "peak": live.peak, "forward": forward, "backward": live.flops - forward}


def blank_cond(core: CoreConfig, batch: int, tokens: int) -> Cond:
    """Conditions in a core's shapes, of `batch` captions of `tokens` tokens, or of classes."""
    null = torch.zeros(batch, dtype=torch.bool)
    if core.classes:
        return Cond(None, None, None, null, torch.zeros(batch, dtype=torch.long))
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    return Cond(torch.zeros(batch, tokens, core.text_dim), mask, torch.zeros(batch, core.pooled_dim), null)


class Live(TorchDispatchMode):
    """Counts while it is active: bytes of live tensors made since (`now`), their maximum (`peak`), and `flops`."""

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
        if key in self._seen or key in given:  # counted already, or a view of an argument
            return
        self._seen[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size
