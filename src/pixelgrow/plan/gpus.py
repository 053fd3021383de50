"""Data-centre GPUs by name, and clusters of them. The figures are the makers' public ones."""

from __future__ import annotations

from dataclasses import dataclass

from pixelgrow.errors import UserError

GIB = 2**30
ROOM = 0.9  # of a GPU's memory; the rest is for CUDA, NCCL and what the allocator cannot use
NETWORK = 50e9  # bytes/s of each GPU to other machines: 400 Gb/s, usual beside H100; A100 machines often have half


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. flops: FLOP/s of dense products in bfloat16, sums in float32. link: bytes/s in each direction to
    the other GPUs of its machine."""

    memory: int
    flops: float
    link: float


GPUS = {
    "a100-40": Gpu(40 * GIB, 312e12, 300e9),
    "a100": Gpu(80 * GIB, 312e12, 300e9),
    "l40s": Gpu(45 * GIB, 362e12, 32e9),
    "rtx4090": Gpu(24 * GIB, 165e12, 32e9),
    "h100": Gpu(80 * GIB, 989e12, 450e9),
    "h200": Gpu(141 * GIB, 989e12, 450e9),
    "b200": Gpu(180 * GIB, 2250e12, 900e9),
}


@dataclass(frozen=True)
class Cluster:
    """gpus: how many, in machines of `node`. mfu: the share of their `flops` that training is assumed to reach. taken:
    bytes of each that something else has, such as a text encoder."""

    gpus: int
    name: str
    mfu: float = 0.4
    node: int = 8
    taken: int = 0

    @property
    def gpu(self) -> Gpu:
        """UserError for a name that is not in the table."""
        if self.name not in GPUS:
            raise UserError(f"--gpu: got {self.name!r}, expected one of {', '.join(GPUS)}")
        return GPUS[self.name]

    @property
    def room(self) -> float:
        """Bytes of one GPU that a training may take."""
        return ROOM * self.gpu.memory - self.taken

    @property
    def rate(self) -> float:
        """FLOP/s of one GPU in training."""
        return self.mfu * self.gpu.flops
