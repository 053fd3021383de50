"""How a network that trains is laid out on a cluster: replicated or sharded, micro-batches, activation checkpointing.

Memory is that of one GPU. A network is measured as in `network.py`, with its weights in the format that it computes in;
what a layout adds to that is counted from the sizes of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from pixelgrow.models.config import NetConfig
from pixelgrow.models.uvit import UViT
from pixelgrow.onestep.distill import GENERATOR
from pixelgrow.plan.gpus import GPUS, NETWORK, ROOM, Cluster
from pixelgrow.plan.network import Measured, freeze_below, parameters_of, whole_network
from pixelgrow.plan.onestep import Distillation, Measuring
from pixelgrow.training.optim import trainable
from pixelgrow.training.settings import Checkpointing, TrainSettings

MODES: tuple[Checkpointing, ...] = (False, "selective", True)  # from the least work to the least memory
IMAGES = 2  # of the micro-batch that is measured
MANY = 32  # and of a second one, of a generator: what grows with the images is told from what does not
OVERLAP = 0.5  # of the work on a micro-batch; communication that takes less is taken to be free
MOST = 4096  # GPUs that are looked at if fewer do not do


@dataclass(frozen=True)
class Parts:
    """Bytes on one GPU. compute: weights in the format of the forward pass, copies of autocast or of a sharded network
    what is whole. buffers: of reductions of gradients. peak: all at most, which may be less than the sum."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    compute: int
    buffers: int
    peak: int


@dataclass(frozen=True)
class Layout:
    """`shard` GPUs have one copy of the state together; 1: every GPU has all of it. flops: an image."""

    gpus: int
    shard: int
    accumulate: int
    micro_batch: int
    checkpointing: Checkpointing
    memory: Parts
    flops: float

    def __str__(self) -> str:
        if self.gpus == 1:
            return "one GPU"
        if self.shard == 1:
            return "replicate"
        return f"shard {self.shard}" + (f" x {self.gpus // self.shard}" if self.gpus > self.shard else "")


@dataclass(frozen=True)
class Sizes:
    """What layouts share. Bytes in float32 of all weights, of those that train, of optimizer and averages.

    copied: of weights that autocast keeps copies of, in a replicated network. In a sharded one, block: of the largest
    block; reduced: of the largest that trains; root: of what is whole throughout a step, all but the blocks.
    width: bytes of a number in the forward pass. activations, transient: bytes for an image, kept and beside them;
    flops: an image. update: bytes that the optimizer's step makes beside the gradients.

    Of networks that every GPU has whole beside this one: others: bytes that stay; beside: that a step makes, whatever
    the number of images. fetches: how often a sharded network's weights are put together in a micro-batch; hiding:
    FLOPs of an image meanwhile.
    """

    weights: int
    training: int
    optimizer: int
    averages: int
    copied: int
    block: int
    reduced: int
    root: int
    width: int
    activations: float
    transient: float
    flops: float
    update: int
    others: int = 0
    beside: int = 0
    fetches: int = 2
    hiding: float | None = None  # None: all

    def on(self, gpus: int, shard: int, micro_batch: int, several: bool) -> Parts:
        """Memory of one of `gpus`. several: each has more than one micro-batch in a step."""
        held = (self.weights + self.optimizer + self.averages) // shard + self.others
        images = int(micro_batch * (self.activations + self.transient))
        gradients = self.training // shard
        if shard > 1:
            compute = int((2 * self.block + self.root) * self.width / 4)  # a block is used, the next one is fetched
            buffers = int(self.reduced * (self.width / 4 + 2))  # its gradients, then in float32: made, and on their way
            step = gradients + images + compute + buffers + self.beside
            after = self.weights  # in the first process, a whole average is looked at
        else:
            compute = self.copied * (4 - self.width) // 4
            buffers = self.training if gpus > 1 else 0  # all gradients in one piece
            step = images + compute + self.beside + (gradients if several else 0)
            after = gradients + buffers
        peak = held + max(step, after, gradients + self.update // shard)
        return Parts(
            self.weights // shard + self.others, gradients, self.optimizer // shard, self.averages // shard, images,
            compute, buffers, peak,
        )  # fmt: skip

    def hidden(self, cluster: Cluster, shard: int, micro_batch: int) -> bool:
        """Whether the work on a micro-batch is long enough to fetch weights and to reduce gradients meanwhile."""
        if shard == 1:
            return True
        moved = self.fetches * self.weights * self.width / 4 + self.training  # gradients are summed in float32
        link = cluster.gpu.link if shard <= cluster.node else NETWORK
        hiding = self.flops if self.hiding is None else self.hiding
        return moved / link <= OVERLAP * micro_batch * hiding / cluster.rate


def sizes(
    config: NetConfig, settings: TrainSettings, frozen: NetConfig | None, tokens: int, mode: Checkpointing
) -> Sizes:
    """Measure a network that checkpoints activations by `mode`; `frozen`, `tokens`: as in `network_cost`."""
    bf16 = settings.precision != "fp32"
    changed = {"batch": IMAGES, "accumulate": 1, "activation_checkpointing": mode}
    found, _ = whole_network(
        config,
        settings.model_copy(update=changed),
        frozen=frozen,
        tokens=tokens,
        bf16=bf16,
        gpu=True,
        weights=torch.bfloat16 if bf16 else torch.float32,
    )
    block, reduced, root = _units(config, frozen, 0)
    passed = frozen is None or config.rungs[-1].attach == "core"  # gradients pass through what is frozen
    return Sizes(
        weights=found.weights,
        training=found.training,
        optimizer=found.optimizer,
        averages=len(settings.ema) * found.training,
        copied=found.weights if passed else found.training,
        block=block,
        reduced=reduced,
        root=root,
        width=2 if bf16 else 4,
        activations=found.activations / IMAGES,
        transient=max(0, _most(found) - found.activations) / IMAGES,
        flops=(found.forward + found.backward) / IMAGES,
        update=found.peaks["update"] - found.training,
    )


def _most(part: Measured) -> int:
    """Bytes that a micro-batch makes at most, without most of the gradients, which layouts count."""
    return max(v for phase, v in part.peaks.items() if phase not in ("update", "backward first", "backward between"))


def generator_sizes(of: Distillation, settings: TrainSettings, mode: Checkpointing) -> Sizes:
    """Measure a one-step generator that checkpoints activations by `mode`. Its teacher and discriminator are whole.

    The networks update in turn, and images take what they take at most in either. The gradients of the discriminator,
    and their sum, are counted in both.
    """
    bf16 = settings.precision != "fp32"

    def of_images(n: int) -> Measuring:
        changed = {"batch": n, "accumulate": 1, "activation_checkpointing": mode}
        weights = torch.bfloat16 if bf16 else torch.float32
        return of.measured(settings.model_copy(update=changed), bf16=bf16, gpu=True, weights=weights)

    few, many = of_images(IMAGES), of_images(MANY)
    generator = few.parts[GENERATOR]
    rest = [part for name, part in few.parts.items() if name != GENERATOR]
    kept, most = (
        [max(map(of_part, one.parts.values())) for one in (few, many)]
        for of_part in (lambda part: part.activations, _most)
    )
    kept_each, most_each = ((two[1] - two[0]) / (MANY - IMAGES) for two in (kept, most))
    block, reduced, root = _units(of.config, of.frozen, of.free)
    return Sizes(
        weights=generator.weights,
        training=generator.training,
        optimizer=generator.optimizer,
        averages=len(settings.ema) * generator.training,
        copied=generator.weights if of.frozen is None else generator.training,
        block=block,
        reduced=reduced,
        root=root,
        width=2 if bf16 else 4,
        activations=kept_each,
        transient=max(0.0, most_each - kept_each),
        flops=sum(part.forward + part.backward for part in few.parts.values()) / IMAGES,
        update=generator.peaks["update"] - generator.training,
        others=few.teacher + sum(p.weights + p.optimizer + len(settings.ema) * p.training for p in rest),
        beside=max(0, int(most[0] - IMAGES * most_each)) + sum(2 * p.training for p in rest),
        fetches=2 + len(rest),  # a discriminator's update evaluates the generator, too
        hiding=few.alone / IMAGES,
    )


def _units(config: NetConfig, frozen: NetConfig | None, free: int) -> tuple[int, int, int]:
    """Bytes in float32 of the largest block, of the largest that trains, and of all that is in no block."""
    with torch.device("meta"):
        net = UViT(config)
    freeze_below(net, frozen, free)
    blocks = net.blocks
    every = [parameters_of(m) for m in blocks]
    trains = [sum(p.numel() for p in trainable(m).values()) for m in blocks]
    return 4 * max(every), 4 * max(trains), 4 * (parameters_of(net) - sum(every))


def cheapest(cluster: Cluster, batch: int, measure: Callable[[Checkpointing], Sizes]) -> Layout | None:
    """The layout that fits with the least work and the fewest GPUs for a copy of the state; None if none fits.

    measure: the sizes of a network for a way of checkpointing. A sharded layout whose GPUs would wait for each other is
    taken only if there is no other. In a layout, the largest micro-batch that fits.
    """
    waiting: Layout | None = None
    for mode in MODES:
        found = measure(mode)
        for shard in _divisors(cluster.gpus):
            layout = _largest_batch(cluster, batch, found, shard, mode)
            if layout is None:
                continue
            if found.hidden(cluster, shard, layout.micro_batch):
                return layout
            waiting = waiting or layout
    return waiting


def _largest_batch(cluster: Cluster, batch: int, found: Sizes, shard: int, mode: Checkpointing) -> Layout | None:
    each = batch // cluster.gpus
    for micro_batch in reversed(list(_divisors(each))):
        memory = found.on(cluster.gpus, shard, micro_batch, several=micro_batch < each)
        if memory.peak <= cluster.room:
            return Layout(cluster.gpus, shard, batch // micro_batch, micro_batch, mode, memory, found.flops)
    return None


def _divisors(n: int) -> Iterator[int]:
    return (k for k in range(1, n + 1) if n % k == 0)


def what_would(cluster: Cluster, batch: int, measure: Callable[[Checkpointing], Sizes]) -> str:
    """What a network needs that no layout fits: in words, after "does not fit: "."""
    found = measure(True)

    def least(gpus: int) -> tuple[int, str]:
        ways = {gpus: "sharded over all of them", 1: "whole on each"}
        return min((found.on(gpus, shard, 1, several=gpus < batch).peak, how) for shard, how in ways.items())

    peak, how = least(cluster.gpus)
    needs = (peak + cluster.taken) / ROOM
    text = (
        f"it takes {needs / 2**30:.0f} GiB of {cluster.gpu.memory / 2**30:.0f} GiB a GPU, {how}, with full "
        "checkpointing and one image at a time"
    )
    more = cluster.gpus * 2
    while more <= MOST and batch % more == 0:
        if least(more)[0] <= cluster.room:
            return f"{text}; {more} GPUs would do"
        more *= 2
    larger = next((name for name, gpu in GPUS.items() if gpu.memory >= needs), None)
    return f"{text}; {f'GPUs like {larger} would do' if larger else 'lower the size or the resolution'}"
