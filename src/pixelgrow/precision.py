"""The number formats that networks compute in: bfloat16 in training, TF32 for float32 products on a GPU.

One place decides, for training, sampling, evaluation, pairs, features and edits. A CPU computes in float32 throughout,
unless a stage says `precision: bf16`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]
logger = logging.getLogger(__name__)


def has_bf16() -> bool:
    """Whether the current GPU computes in bfloat16; older ones (before Ampere) emulate it, slower than float32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def training_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """What forward passes of training compute in, under autocast; weights, gradients and optimizer stay float32.

    auto: bfloat16 on a GPU that has it, else float32.
    """
    lacking = device.type == "cuda" and not has_bf16()
    if precision == "auto" and lacking:
        logger.info("this GPU has no bfloat16: training in float32")
    if precision == "bf16" and lacking:
        logger.warning("precision: bf16 is emulated by this GPU, slower than float32: fp32 or auto is faster")
    auto = device.type == "cuda" and not lacking
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and auto) else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Forward passes in `dtype`: nothing changes for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


_lock, _inside = threading.Lock(), 0


@contextmanager
def tf32() -> Iterator[None]:
    """Products of float32 matrices on a GPU in TF32 (10 bits of mantissa), several times as fast. Also a decorator.

    torch has this on for convolutions, and off for matrices. Whatever the user has set stands:
    `torch.set_float32_matmul_precision("highest")` keeps float32. Afterwards, and on a CPU within, nothing is changed.
    """
    global _inside
    with _lock:
        # "none": nobody has set a precision. All threads share it, so the last one that leaves restores it.
        mine = bool(_inside) or (torch.cuda.is_available() and torch.backends.cuda.matmul.fp32_precision == "none")
        if mine and not _inside:
            _set("high")
        _inside += mine
    try:
        yield
    finally:
        with _lock:
            _inside -= mine
            if mine and not _inside:
                _set("highest")
                torch.backends.cuda.matmul.fp32_precision = "none"


def _set(precision: str) -> None:
    """Through torch's older interface: after the newer one alone, `torch.compile` fails (pytorch/pytorch#166387).
    It sets products on the CPU too; they keep what they had."""
    cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = cpu.fp32_precision
    torch.set_float32_matmul_precision(precision)
    cpu.fp32_precision = before
