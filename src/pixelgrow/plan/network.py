"""The cost of training a network, with nothing allocated: parameters, FLOPs, memory.

The network runs forward and backward on fake tensors, which have shapes and no data. The core's blocks are all alike:
the denoiser runs with two of them and with three, and every figure is linear in their number.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.loss import loss
from pixelgrow.growth import freeze, inherited, last_blocks
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import CoreConfig, NetConfig
from pixelgrow.models.core import Core
from pixelgrow.models.flops import FORMULAS
from pixelgrow.models.uvit import UViT
from pixelgrow.training.denoise import recompute_blocks
from pixelgrow.training.optim import optimizers, trainable
from pixelgrow.training.settings import TrainSettings

# What a process on a CPU takes beside its tensors: scratch space of products and convolutions, and pages that the
# allocator keeps. 60 to 140 MiB are measured (bench.memory).
SCRATCH = 95 * 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step. `activations`: kept by a micro-batch for its backward pass; `peak`: all at most.

    state: what a saved state holds, of which a copy is in CPU memory while it is written, beside the steps.
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    peak: int
    state: int = 0


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
    config: NetConfig,
    settings: TrainSettings,
    *,
    frozen: NetConfig | None = None,
    tokens: int = 32,
    bf16: bool = False,
    gpu: bool = False,
) -> Cost:
    """The cost of training a network of `config`.

    frozen: the network that it grew from, whose tensors do not train. tokens: of a caption. bf16: autocast; weights,
    gradients and optimizer state stay fp32. gpu: on a GPU, not a CPU.
    """
    whole, core = whole_network(config, settings, frozen=frozen, tokens=tokens, bf16=bf16, gpu=gpu)
    return Cost(
        parameters=whole.parameters(core),
        work={k: getattr(whole, k) / settings.micro_batch for k in ("forward", "backward")},
        memory=memory_of([whole], settings),
    )


@dataclass(frozen=True)
class Measured:
    """Bytes and FLOPs of a micro-batch.

    weights, training: of all parameters, and of those that train. activations: kept for the backward pass. peaks: what
    the step has made at most, gradients included, in each of its phases. forward, backward: FLOPs.
    """

    weights: int
    training: int
    optimizer: int
    activations: int
    peaks: Mapping[str, int]
    forward: int
    backward: int

    def with_blocks(self, more: int, other: Measured) -> Measured:
        """The same with `more` further blocks; `other` has one of them. In a phase, bytes are linear in the number."""
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "peaks"}
        longer = {n: v + more * (getattr(other, n) - v) for n, v in numbers.items()}
        return Measured(peaks={n: v + more * (other.peaks[n] - v) for n, v in self.peaks.items()}, **longer)

    def parameters(self, core: int) -> dict[str, int]:
        """Parameters by part. `core`: the core's."""
        return {"core": core, "levels": self.weights // 4 - core, "training": self.training // 4}

    @property
    def peak(self) -> int:
        """Bytes that a step makes, at their most."""
        return max(self.peaks.values())


def measured(
    module: nn.Module, settings: TrainSettings, work: Callable[[], Tensor], *, bf16: bool = False, gpu: bool = False
) -> Measured:
    """The cost of training `module`; `work` computes the loss of a micro-batch."""
    opts = optimizers(module, settings)
    each = [(opt, p) for opt in opts for group in opt.param_groups for p in group["params"]]
    trains = list(trainable(module).values())
    training = 4 * sum(p.numel() for p in trains)
    run = spent(work, bf16=bf16, marked=module, accumulated=trains if settings.accumulate > 1 else (), gpu=gpu)
    module.zero_grad(set_to_none=True)
    return Measured(
        weights=bytes_of(module),
        training=training,
        optimizer=sum(4 * p.numel() * (1 if isinstance(opt, torch.optim.Muon) else 2) for opt, p in each),
        activations=run.activations,
        peaks={**run.peaks, "update": training + _update_bytes(each, gpu)},
        forward=run.forward,
        backward=run.backward,
    )


# Copies that an update makes: of one tensor after the other, or of all at once. AdamW is fused and makes none.
COPIES: dict[Any, int] = {torch.optim.RAdam: 5, torch.optim.Muon: 3}


def _update_bytes(each: Sequence[tuple[torch.optim.Optimizer, nn.Parameter]], gpu: bool) -> int:
    """Bytes that the optimizers' steps make at most, each parameter with its optimizer."""
    if gpu and (some := [p for opt, p in each if isinstance(opt, torch.optim.RAdam)]):
        return 4 * sum(p.numel() for p in some)  # a copy of all tensors: torch's `foreach`, the default there
    return max((4 * p.numel() * COPIES.get(type(opt), 0) for opt, p in each), default=0)


def memory_of(parts: Sequence[Measured], settings: TrainSettings, others: int = 0) -> Memory:
    """Memory of a step that updates several networks in turn. `others`: bytes of networks that do not train."""
    weights, training = others + sum(p.weights for p in parts), sum(p.training for p in parts)
    slots, averages = sum(p.optimizer for p in parts), len(settings.ema) * training
    return Memory(
        weights=weights,
        gradients=max(p.training for p in parts),
        optimizer=slots,
        averages=averages,
        activations=max(p.activations for p in parts),
        peak=weights + slots + averages + max(p.peak for p in parts),
        state=training + slots + averages,
    )


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters in fp32."""
    return 4 * parameters_of(module)


def whole_network(
    config: NetConfig,
    settings: TrainSettings,
    *,
    frozen: NetConfig | None = None,
    tokens: int = 32,
    bf16: bool = False,
    gpu: bool = False,
    weights: torch.dtype = torch.float32,
) -> tuple[Measured, int]:
    """A network, from its measurements with two and with three blocks; the number of its core's parameters.

    weights: what the network has them in while it is evaluated: of a sharded one, bfloat16.
    """

    def of_depth(depth: int) -> tuple[Measured, int]:
        less = config.model_copy(update={"core": config.core.model_copy(update={"depth": depth})})
        with FakeTensorMode():
            with default_dtype(weights):
                denoiser = Denoiser(UViT(less))
            freeze_below(denoiser.net, frozen)
            recompute_blocks(denoiser.net, settings.activation_checkpointing)
            work = loss_of(denoiser, settings.micro_batch, tokens)
            return measured(denoiser, settings, work, bf16=bf16, gpu=gpu), parameters_of(denoiser.net.core)

    depth = config.core.depth
    found, core = of_depth(min(depth, 2))
    if depth <= 2:
        return found, core
    other, core_of_other = of_depth(3)
    return found.with_blocks(depth - 2, other), core + (depth - 2) * (core_of_other - core)


def freeze_below(net: UViT, below: NetConfig | None, free: int = 0) -> None:
    """Freeze what a network has of the one that it grew from, except the last `free` residual blocks; None: nothing."""
    if below is not None:
        trains = last_blocks(below, free) if free else ()
        freeze(net, [n for n in inherited(net.state_dict(), net.config, below) if not n.startswith(trains)])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within, tensors are made in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def parameters_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def loss_of(denoiser: Denoiser, batch: int, tokens: int) -> Callable[[], Tensor]:
    """What computes the loss of a micro-batch of `batch` images, whose captions have `tokens` tokens."""
    kept: list[Tensor] = []

    def work() -> Tensor:
        x0 = torch.zeros(batch, denoiser.space.channels, denoiser.resolution, denoiser.resolution)
        kept.append(x0)  # a batch stays until the end of its step
        cond = blank_cond(denoiser.net.config.core, batch, tokens)
        return loss(denoiser, x0, torch.ones(batch), torch.zeros_like(x0), cond, torch.ones(batch)).mean()

    return work


@dataclass(frozen=True)
class Spent:
    """FLOPs forward and backward, and bytes of what a run made, gradients included: `activations` between forward and
    backward, at most in each phase, and `peak` of all phases."""

    forward: int
    backward: int
    activations: int
    peaks: Mapping[str, int]

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def spent(
    work: Callable[[], Tensor],
    *,
    bf16: bool = False,
    marked: nn.Module | None = None,
    accumulated: Iterable[nn.Parameter] = (),
    gpu: bool = False,
) -> Spent:
    """Run `work` forward, and backward if anything trains. Tensors may be fake or real.

    marked: peaks are told apart by the first and the last block of each core in it, in both directions. accumulated:
    parameters that have gradients of earlier micro-batches, which the run adds to. gpu: autocast as it is there.
    """
    with Live() as live, _phases(live, marked), _norms_of_gpu() if gpu and bf16 else nullcontext():
        for p in accumulated:
            p.grad = torch.zeros_like(p)
        before = live.now
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            out = work()
        live.enter("backward")
        activations, forward = live.now - before if out.requires_grad else 0, live.flops
        if out.requires_grad:
            out.sum().backward()
    return Spent(forward, live.flops - forward, activations, live.peaks)


@contextmanager
def _norms_of_gpu() -> Iterator[None]:
    """Within, norms compute in float32: under autocast a GPU has them so, a CPU has not.

    The function is exchanged. A mode of torch's would not see what checkpointing computes again.
    """
    real = functional.layer_norm

    def in_float32(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return real(*args, **kwargs)

    with patch.object(functional, "layer_norm", in_float32):
        yield


@contextmanager
def _phases(live: Live, module: nn.Module | None) -> Iterator[None]:
    """Within, `live` is told which of a core's blocks is evaluated or differentiated: the first, the last, another.

    In each of these phases, bytes are linear in the number of blocks from two on. Between the first block and the last
    they are so from block to block, and no maximum lies there.
    """
    cores = [m for m in module.modules() if isinstance(m, Core)] if module is not None else []
    handles = []

    def mark(block: nn.Module, names: list[str]) -> None:
        def enter(direction: str) -> None:
            live.enter(*(f"{direction} {name}" for name in names or ("between",)))

        def after(_: nn.Module, __: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda _: enter("backward"))
            live.enter("forward, after")

        handles.append(block.register_forward_pre_hook(lambda *_: enter("forward")))
        handles.append(block.register_forward_hook(after))

    for core in cores:
        last = len(core.blocks) - 1
        for i, block in enumerate(core.blocks):
            mark(block, [name for name, at in (("first", 0), ("last", last)) if i == at])
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def blank_cond(core: CoreConfig, batch: int, tokens: int) -> Cond:
    """Conditions in a core's shapes, of `batch` captions of `tokens` tokens, or of classes."""
    null = torch.zeros(batch, dtype=torch.bool)
    if core.classes:
        return Cond(None, None, None, null, torch.zeros(batch, dtype=torch.long))
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    return Cond(torch.zeros(batch, tokens, core.text_dim), mask, torch.zeros(batch, core.pooled_dim), null)


class Live(TorchDispatchMode):
    """Counts while it is active: bytes of live tensors made since (`now`), their maximum (`peak`; `peaks` by phase) and
    `flops`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.flops = 0
        self.peaks: dict[str, int] = {}
        self.enter("forward")
        self._seen: dict[int, weakref.ref[Any]] = {}

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def enter(self, *phases: str) -> None:
        """From now on, maxima are of these phases."""
        self._phases = phases
        self._look()

    def _look(self) -> None:
        for phase in self._phases:
            self.peaks[phase] = max(self.peaks.get(phase, 0), self.now)

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
        self._look()

    def _gone(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size
