"""Settings of a CPU's memory allocator and arithmetic that make training faster."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def tune_allocator() -> bool:
    """Let glibc keep freed memory instead of handing each large tensor's pages back to the kernel.

    By default a large tensor is mapped, faulted in page by page and unmapped again at every step: a sixth of the
    processor's time when training `tiny` at 32 px, a quarter at 64 px. The peak of memory grows by a few per cent.
    Returns whether the allocator took the settings (False where there is no glibc).

    They hold until the process ends: glibc cannot return to the thresholds that it had adapted itself. So the command
    line calls this for its own process, and no function of the library does.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def trim() -> None:
    """Return freed memory to the kernel. Called between stages: the next one's peak is then its own."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def flush_denormals(on: bool = True) -> int:
    """Flush denormal numbers to zero, or not, in every thread that computes; returns the number of threads set.

    `torch.set_flush_denormal` sets the calling thread alone. The threads of a pool that has started keep their mode,
    and results would depend on what ran before. So each thread of torch's OpenMP pool sets its own.
    """
    done = [torch.set_flush_denormal(on)]
    library = next(iter(sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))), None)
    if library is not None:
        each = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: done.append(torch.set_flush_denormal(on)))
        ctypes.CDLL(str(library)).GOMP_parallel(each, None, torch.get_num_threads(), 0)
        done.pop(0)
    return sum(done)


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Within, denormal numbers are zero in every thread that computes; afterwards they are handled as before.

    Weights and gradients that decay towards zero become denormal, and arithmetic on them is many times slower.
    """
    before = float(torch.tensor(1e-40)) == 0  # torch does not say whether it flushes
    flush_denormals()
    try:
        yield
    finally:
        flush_denormals(before)
