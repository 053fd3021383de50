"""Settings of the whole process that hold while training runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from pixelgrow import precision
from pixelgrow.training import cpu

RECOMPILES = 1024  # one for each shape of a batch of captions and of images, in training and in sampling


@contextmanager
def settings(device: torch.device, compiled: bool = False) -> Iterator[None]:
    """Within: TF32 on a GPU, no denormal numbers on a CPU, and with `compiled` a higher limit of recompilations.

    Afterwards these are as before, and so are torch's random numbers: the process may be a user's own.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(precision.tf32())
        if device.type == "cpu":
            stack.enter_context(cpu.denormals_flushed())
        if compiled:
            import torch._dynamo.config as dynamo

            for limit in ("recompile_limit", "accumulated_recompile_limit"):
                stack.enter_context(dynamo.patch(**{limit: max(getattr(dynamo, limit), RECOMPILES)}))
        yield
