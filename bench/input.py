"""Images that reach training, a second, against what the same workers decode with nothing behind them.

    python -m bench.input [--resolutions 64 256 1024] [--workers N] [--rounds 5] [--seconds 2] [--output input.json]

Training is a stand-in that takes each batch and does nothing, as the process of a training only waits while its GPU
works. So what is measured is what stands between: shared memory, pipes, this process. "Decoded" are the same batches by
the same workers, which send back a number. The two take turns.

`share` is the median over the rounds of images/s that arrive over images/s decoded. `by CPU` compares the CPU seconds
per image of all processes instead, which other work on the machine changes less. `at most`: images per CPU second of
this process alone: what it could take from any number of workers.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench.loader import write_photographs

from pixelgrow.data import Loader, open_source
from pixelgrow.data.workers import Workers

FILES = 24
SCALES = {64: 0.8, 256: 0.8, 1024: 2.2}  # of the photographs, 1 is about 640x480; other resolutions: twice as large
BATCHES = {64: 64, 256: 32, 1024: 8}
LEAST = 0.9


def cpu_seconds() -> float:
    """Of this process and its children, so far."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split()
    ticks = 0
    for pid in ("self", *children):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measured(batches: Iterator[Any], size: int, warm: int, seconds: float) -> tuple[float, float, float]:
    """Of batches of `size` images, once `warm` of them were taken: images per second; CPU seconds per image, of all
    processes and of this one."""
    for _ in itertools.islice(batches, warm):
        pass
    began, worked, own, images = time.perf_counter(), cpu_seconds(), time.process_time(), 0
    while time.perf_counter() - began < seconds or images < 2 * warm * size:
        next(batches)
        images += size
    took, own = time.perf_counter() - began, time.process_time() - own
    return images / took, (cpu_seconds() - worked) / images, own / images


def compare(loader: Loader, rounds: int, seconds: float) -> dict[str, float]:
    """Both rates, and their ratio, of a loader with workers."""
    warm, rows = 3 * loader.workers, []
    for _ in range(rounds):
        with contextlib.closing(
            Workers(lambda at: len(loader.load(at).text), itertools.count(0, loader.batch), loader.workers)
        ) as alone:
            decoded = measured(alone, loader.batch, warm, seconds)
        with contextlib.closing(loader.batches()) as stream:
            arrived = measured(stream, loader.batch, warm, seconds)
        rows.append((*decoded, *arrived))
    rates, costs, _, through, with_all, own = (statistics.median(column) for column in zip(*rows, strict=True))
    return {
        "decoded": rates,
        "arrived": through,
        "share": statistics.median(row[3] / row[0] for row in rows),
        "by CPU": costs / with_all,
        "at most": 1 / own,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0))))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for side in args.resolutions:
        with tempfile.TemporaryDirectory() as folder:
            write_photographs(Path(folder), FILES, SCALES.get(side, 2 * side / 480))
            loader = Loader(open_source(folder), size=(side, side), batch=BATCHES.get(side, 16), workers=args.workers)
            found = {"resolution": side, "workers": args.workers} | compare(loader, args.rounds, args.seconds)
        rows.append(found)
        print(
            f"{side:5} px: decoded {found['decoded']:7.1f} images/s, arrived {found['arrived']:7.1f}, "
            f"share {found['share']:.3f}, by CPU {found['by CPU']:.3f}, at most {found['at most']:8.0f}",
            flush=True,
        )
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0 if all(row["share"] >= LEAST for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
