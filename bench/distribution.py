"""What several processes lose: N that share a step's micro-batches, against one that has an Nth of the batch.

    python -m bench.distribution [--processes 2] [--size tiny] [--resolution 32] [--batch 64] [--rounds 6]

torchrun starts the processes, each on a core of its own: leave these idle. Round after round, in changing order, whole
training steps (forward, backward, all-reduce, clipping, AdamW, averages, what the processes agree on) are timed:

    alone    the first process, an Nth of the batch; the others wait
    apart    all processes at once, an Nth of the batch each, nothing shared: what the machine itself takes
    shared   all processes together, the whole batch

`lost` is 1 - seconds a step alone / shared, `machine` is 1 - alone / apart. Medians over rounds; one JSON line. Exit
status 1 if more than 10% are lost. Takes about 3 * rounds * seconds, and some for the start.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import untrained
from pixelgrow.data.loader import Batch
from pixelgrow.distributed import Team, join
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.training import cpu
from pixelgrow.training.denoise import DenoiseObjective
from pixelgrow.training.loop import train
from pixelgrow.training.settings import TrainSettings

WARM = 2  # steps that are not timed: memory is taken, the processes meet
LIMIT = 0.10
KINDS = ("alone", "apart", "shared")


def step_seconds(args: argparse.Namespace, team: Team, accumulate: int, steps: int) -> float:
    """Seconds a step of a training in which `accumulate` micro-batches of the same size make a batch."""
    micro = args.batch // args.processes
    batch = micro * accumulate
    torch.manual_seed(0)
    denoiser = untrained.denoiser(shallow_uvit(args.size, args.resolution))
    images = torch.randn(micro, 3, args.resolution, args.resolution).clamp(-1, 1)
    never: dict[str, Any] = {"sample_every": 0, "validate_every": 0, "snapshot_every": 0}
    settings = TrainSettings(images=(steps + WARM + 1) * batch, batch=batch, accumulate=accumulate, **never)
    text = untrained.RandomText(denoiser.net.config.core, micro)
    moments = []

    def batches(start: int, step: int) -> Iterator[Batch]:
        for at in range(start, settings.images, step):
            moments.append(time.perf_counter())
            yield Batch(images, ("",) * micro, torch.arange(at, at + micro))

    with tempfile.TemporaryDirectory() as folder:
        # All processes write and read states in one folder; nothing is resumed here.
        where = Path(team.tell(folder))
        train(DenoiseObjective(denoiser, text, settings, seed=0), batches, settings, where, flops=1.0, team=team)
        team.wait()
    each = accumulate // team.size
    return (moments[-each] - moments[WARM * each]) / steps


def measure(args: argparse.Namespace, team: Team) -> dict[str, list[float]]:
    """Seconds a step by kind of work, of each round, as the first process sees it."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    steps = 1
    if team.first:
        steps = math.ceil(args.seconds / step_seconds(args, Team(), 1, 3))
    steps = team.tell(steps)
    for number in range(args.rounds):
        for kind in KINDS[:: (-1) ** number]:
            team.wait()
            if kind == "shared":
                seconds = step_seconds(args, team, team.size, steps)
            elif kind == "apart" or team.first:
                seconds = step_seconds(args, Team(), 1, steps)
            else:
                continue
            found[kind].append(seconds)
    return found


def summary(found: dict[str, list[float]]) -> dict[str, Any]:
    """Medians in milliseconds, and what is lost: each round's, and its median."""
    lost = [1 - a / s for a, s in zip(found["alone"], found["shared"], strict=True)]
    machine = [1 - a / s for a, s in zip(found["alone"], found["apart"], strict=True)]
    return {
        **{f"{kind}_ms": round(1e3 * statistics.median(found[kind]), 2) for kind in KINDS},
        "lost": round(statistics.median(lost), 4),
        "rounds_lost": [round(value, 4) for value in lost],
        "machine": round(statistics.median(machine), 4),
    }


def by_torchrun(processes: int, argv: list[str]) -> dict[str, Any]:
    """The result of this benchmark in so many processes."""
    words = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "-m", "bench.distribution", *argv]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", env=environment, check=False)
    if done.returncode:
        sys.exit("a process failed; see above")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64, help="of all processes together")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=7.0, help="of each measurement")
    args = parser.parse_args(argv)
    if args.batch % args.processes:
        parser.error(f"--batch {args.batch}: expected a multiple of the {args.processes} processes")
    if "RANK" not in os.environ:
        result = by_torchrun(args.processes, sys.argv[1:] if argv is None else argv)
        print(json.dumps(result))
        raise SystemExit(result["lost"] > LIMIT)
    torch.set_num_threads(1)
    cpu.tune_allocator()
    cores = sorted(os.sched_getaffinity(0))
    with join() as team:
        os.sched_setaffinity(0, {cores[team.rank % len(cores)]})
        found = measure(args, team)
    if not team.first:
        return
    result = {"bench": "distribution", **vars(args), "cores": len(cores), **summary(found)}
    if len(cores) < args.processes:
        result["note"] = "processes share cores: this says nothing about distribution"
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
