"""Making the processor's memory and arithmetic fit for training."""

from __future__ import annotations

import ctypes
import platform

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h of glibc


def tune_allocator() -> bool:
    """Let glibc keep freed memory instead of handing each large tensor's pages back to the kernel.

    By default every tensor over 32 MiB (at first over 128 KiB) is mapped, faulted in page by page, and unmapped at each
    step. Returns whether the allocator took the settings (False where there is no glibc).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    limit = 2**31 - 1
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, limit))


def prepare() -> None:
    """Allocator settings, and denormal numbers flushed to zero in every thread."""
    tune_allocator()
    torch.set_flush_denormal(True)
