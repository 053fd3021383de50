"""Settings of the whole process that training needs, for as long as it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from pixelgrow import precision
from pixelgrow.training import cpu

RECOMPILES = 64  # shapes of captions, in training and in sampling, that `compile` may meet


@contextmanager
def settings(device: torch.device, compiled: bool = False) -> Iterator[None]:
    """Random numbers set aside; on a GPU, TF32; on a CPU, denormal numbers count as zero; `compiled`: room for
    recompilations.

    Afterwards the process is as it was: it may be the user's own, and go on with other work.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(precision.tf32())
        if device.type == "cpu":
            stack.enter_context(cpu.denormals_flushed())
        if compiled:
            import torch._dynamo.config as dynamo

            stack.enter_context(dynamo.patch(recompile_limit=max(dynamo.recompile_limit, RECOMPILES)))
        yield
