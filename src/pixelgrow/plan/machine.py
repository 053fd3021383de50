"""What a machine has for training: cores, memory, a GPU, and how fast it multiplies matrices."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from pixelgrow.plan.recipe import measured_rate
from pixelgrow.precision import has_bf16

LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # of containers


@dataclass(frozen=True)
class Machine:
    """`memory`: bytes, of the GPU if there is one. `rate`: FLOP/s that training may reach. `gpu`: its name, or ""."""

    cores: int
    memory: int
    rate: float
    gpu: str = ""
    bf16: bool = False

    def __str__(self) -> str:
        cores = f"{self.cores} CPU core{'s' if self.cores > 1 else ''}"
        return f"{self.gpu or cores} with {self.memory / 2**30:.1f} GiB of memory"


def this_machine() -> Machine:
    """The machine that this runs on; of several GPUs the first. Its rate is measured."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return Machine(cores, found.total_memory, measured_rate(), found.name, has_bf16())
    return Machine(cores, _memory(), measured_rate())


def _memory() -> int:
    """Bytes of memory that this process may use."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            found = min(found, int(path.read_text(encoding="utf-8")))
    return found
