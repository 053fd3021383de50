"""Training on cores that others use too: what idle threads that spin cost, and what `pixelgrow`'s setting saves.

    python -m bench.contention [--seconds 6] [--others 0 1 2]

Training steps of the `tiny` core at 32 px, batch 16, each setting in a process of its own beside a number of processes
that compute without end. One JSON line each: images/s, and that over the images/s of one thread alone in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SETTINGS: dict[str, dict[str, str]] = {
    "libgomp's own": {},
    "pixelgrow's": {"GOMP_SPINCOUNT": "5000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OURS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def steps(seconds: float, batch: int = 16) -> float:
    """Images a second of training steps, in this process."""
    import torch
    from bench.sampling_overhead import conditions
    from bench.untrained import TOKENS, denoiser

    from pixelgrow.diffusion.loss import loss
    from pixelgrow.models.sizes import shallow_uvit
    from pixelgrow.training import cpu

    cpu.tune_allocator()
    cpu.flush_denormals()
    model = denoiser(shallow_uvit("tiny", 32))
    cond = conditions(model.net.config.core, batch, torch.device("cpu"), TOKENS)
    x, sigma = torch.randn(batch, 3, 32, 32), torch.ones(batch)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        loss(model, x, sigma, torch.randn_like(x), cond, sigma).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        done += batch
    return done / (time.perf_counter() - began)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute without end."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(setting: str, seconds: float) -> float:
    """`steps` in a process of its own."""
    kept = {k: v for k, v in os.environ.items() if k not in OURS}
    command = [sys.executable, "-m", "bench.contention", "--here", "--seconds", str(seconds)]
    done = subprocess.run(command, env=kept | SETTINGS[setting], stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--others", type=int, nargs="+", default=[0, 1, 2], help="numbers of busy processes")
    parser.add_argument("--here", action="store_true", help="measure in this process")
    args = parser.parse_args()
    if args.here:
        print(steps(args.seconds))
        return
    alone = measure("one thread", args.seconds)
    for others in args.others:
        with busy(others):
            for setting in SETTINGS:
                rate = measure(setting, args.seconds)
                result = {"bench": "contention", "others": others, "threads": setting, "images_per_s": round(rate, 1)}
                print(json.dumps(result | {"over_one_thread_alone": round(rate / alone, 2)}), flush=True)


if __name__ == "__main__":
    main()
