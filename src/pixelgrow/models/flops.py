"""FLOPs of an operation: torch's formulas, and one for the CPU's attention, which torch's counter lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

# Formulas on the shapes of an operation's tensors.
ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
# Formulas on the tensors, called as `formula(*args, **kwargs, out_val=out)`.
FORMULAS: dict[Any, Callable[..., int]] = {**flop_registry, **{op: shape_wrapper(f) for op, f in ATTENTION.items()}}


def counted(work: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attention in `work()`."""
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    with counter:
        work()
    return counter.get_total_flops()
