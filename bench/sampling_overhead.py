"""What sampling costs beyond the network: `sample()` against the same evaluations in a bare loop, in one run.

    python -m bench.sampling_overhead [--checkpoint FOLDER] [--device cuda]

One JSON line for each setting. `ratio` is the time of `sample` over that of the bare loop, the fastest of `repeats`
interleaved runs of each; `outside`, which the target of 5% is for, is on a CPU the time that `sample` spent outside the
network over that inside, from one and the same run, which a busy machine disturbs less (the median of the runs); on a
GPU, where the two overlap, ratio - 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pixelgrow import checkpoint
from pixelgrow.diffusion.denoiser import Denoiser, NoiseConfig, NoiseSchedule
from pixelgrow.diffusion.sampling import sample
from pixelgrow.growth import grown_config
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import CoreConfig
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.models.uvit import UViT

TARGET = 0.05  # of the time of the evaluations

SETTINGS: list[dict[str, Any]] = [
    {"sampler": "ddim"},
    {"sampler": "ddpm"},
    {"sampler": "heun"},
    {"sampler": "dpm++2m"},
    {"sampler": "dpm++2m", "grid": "native"},
    {"sampler": "dpm++2m", "guidance": 4.0},
    {"sampler": "dpm++2m", "guidance": 4.0, "threshold": 0.995},
    {"sampler": "dpm++2m", "guidance": 4.0, "interval": (0.2, 20.0)},
    {"sampler": "dpm++2m", "guidance": 2.0, "guide": "itself"},
]


class Clocked:
    """A denoiser that knows how many rows each call had and how long all of them took."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.sigma_min, self.sigma_max = denoiser, denoiser.sigma_min, denoiser.sigma_max
        self.rows: list[int] = []
        self.seconds = 0.0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        start = time.perf_counter()
        x0 = self.denoiser(x, sigma, cond)
        self.seconds += time.perf_counter() - start
        self.rows.append(len(x))
        return x0


def tiny() -> Denoiser:
    """An untrained `tiny` of 32 px grown to 64 px: the work of the trained one."""
    return Denoiser(UViT(grown_config(shallow_uvit("tiny", 32), 64, "preserve"))).eval()


def conditions(core: CoreConfig, n: int, device: torch.device, tokens: int = 16) -> Cond:
    """Random conditions that the core accepts."""
    null = torch.zeros(n, dtype=torch.bool, device=device)
    if core.classes:
        return Cond(None, None, None, null, torch.arange(n, device=device) % core.classes)
    mask = torch.ones(n, tokens, dtype=torch.bool, device=device)
    return Cond(
        torch.randn(n, tokens, core.text_dim, device=device), mask, torch.randn(n, core.pooled_dim, device=device), null
    )


@torch.no_grad()
def bare(denoiser: Denoiser, rows: list[int], cond: Cond, size: tuple[int, int]) -> None:
    """Evaluations of as many rows as `rows` lists, and nothing else."""
    device = cond.null.device
    x = torch.randn(max(rows), 3, *size, device=device)
    sigma = torch.ones(max(rows), device=device)
    repeated = cond[torch.arange(max(rows), device=device) % len(cond)]
    inputs = {n: (x[:n], sigma[:n], repeated[:n]) for n in set(rows)}
    for n in rows:
        denoiser(*inputs[n])


def wall(device: torch.device, work: Any) -> float:
    """Seconds of `work()`, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(
    denoiser: Denoiser, name: str, device: torch.device, batch: int, steps: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """One result for each of SETTINGS."""
    config = denoiser.net.config
    size = (config.resolution, config.resolution)
    cond = conditions(config.core, batch, device)
    bare(denoiser, [batch, 2 * batch] * 2, cond, size)  # warm up both shapes
    for setting in SETTINGS:
        clocked = Clocked(denoiser)
        keywords: dict[str, Any] = {"size": size, "steps": steps, "batch": batch} | setting
        if keywords.get("grid") == "native":
            keywords["grid"] = NoiseSchedule(NoiseConfig(), denoiser)
        if "guide" in keywords:
            keywords["guide"] = clocked
        nfe = sample(clocked, cond, **keywords).nfe
        rows = clocked.rows
        times: list[tuple[float, float, float]] = []
        for _ in range(repeats):
            alone = wall(device, lambda rows=rows: bare(denoiser, rows, cond, size))
            clocked = Clocked(denoiser)
            if "guide" in keywords:
                keywords["guide"] = clocked
            whole = wall(device, lambda clocked=clocked, keywords=keywords: sample(clocked, cond, **keywords))
            times.append((alone, whole, whole / clocked.seconds - 1))
        alone, whole, _ = (min(column) for column in zip(*times, strict=True))
        outside = statistics.median(t[2] for t in times) if device.type == "cpu" else whole / alone - 1
        result = {
            "bench": "sampling_overhead",
            "network": name,
            "device": device.type,
            "threads": torch.get_num_threads(),
        }
        result |= {"resolution": config.resolution, "batch": batch, "steps": steps} | setting
        result |= {"nfe": nfe, "bare_s": round(alone, 4), "sample_s": round(whole, 4), "ratio": round(whole / alone, 4)}
        yield result | {"outside": round(outside, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a checkpoint folder; an untrained tiny at 64 px if absent")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    denoiser = checkpoint.load(args.checkpoint)[0] if args.checkpoint else tiny()
    missed = False
    for result in measure(
        denoiser.to(device), args.checkpoint or "tiny, untrained", device, args.batch, args.steps, args.repeats
    ):
        print(json.dumps(result), flush=True)
        missed |= result["outside"] > TARGET
    if missed:
        sys.exit(f"more than {TARGET:.0%} of the time is spent outside the network's evaluations")


if __name__ == "__main__":
    main()
