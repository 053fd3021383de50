"""The plan's memory against what training takes: the peak of whole training steps on a CPU.

    python -m bench.memory [--only NAME ...] [--output FILE.jsonl]

Each case trains an untrained network for two steps in a process of its own, drawn noise, update and averages included.
Measured are the bytes of tensors that torch's allocator of CPU memory held at most, as torch's profiler records them
(on a GPU that would be `torch.cuda.max_memory_allocated`), and planned is the peak of `plan.network.network_cost`. A
further process trains without the profiler: what the resident memory of the process grew by, over one that has trained
a toy network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench.untrained import TOKENS, RandomText, denoiser
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from pixelgrow.data.loader import Batch
from pixelgrow.growth import grown_config
from pixelgrow.models.config import NetConfig
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.plan.network import SCRATCH, network_cost
from pixelgrow.training import monitor
from pixelgrow.training.denoise import DenoiseObjective
from pixelgrow.training.loop import Training
from pixelgrow.training.settings import TrainSettings

TARGET = 0.10  # by which the plan may be off
STEPS = 2  # the first makes the optimizer's state


@dataclass(frozen=True)
class Case:
    """A network and how it trains. `to`: the resolution that it is grown to by `init`, its core frozen with
    `preserve`."""

    size: str
    resolution: int
    to: int = 0
    init: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def nets(self) -> tuple[NetConfig, NetConfig | None]:
        """The network, and the one in it that is frozen."""
        core = shallow_uvit(self.size, self.resolution)
        if not self.to:
            return core, None
        return grown_config(core, self.to, self.init), core if self.init == "preserve" else None  # type: ignore[arg-type]

    @property
    def training(self) -> TrainSettings:
        return TrainSettings(images=10**6, **self.settings)


CASES = {
    "fp32": Case("small", 32, settings={"batch": 16, "precision": "fp32"}),
    "bf16": Case("small", 32, settings={"batch": 8, "precision": "bf16"}),
    "bf16, accumulate 4": Case("small", 32, settings={"batch": 32, "accumulate": 4, "precision": "bf16"}),
    "bf16, accumulate 4, activation checkpointing": Case(
        "small", 32,
        settings={"batch": 8, "accumulate": 4, "precision": "bf16", "activation_checkpointing": True, "ema": []},
    ),
    "grown to 128 px, frozen, bf16": Case("small", 64, 128, "preserve", {"batch": 8, "precision": "bf16"}),
    "grown to 128 px, all of it, fp32": Case("small", 64, 128, "random", {"batch": 4, "precision": "fp32"}),
    "RAdam, bf16": Case("small", 32, settings={"batch": 2, "precision": "bf16", "optimizer": "radam"}),
}  # fmt: skip


def planned(case: Case) -> int:
    """Bytes by the plan."""
    net, frozen = case.nets
    settings = case.training
    bf16 = settings.precision == "bf16"
    return network_cost(net, settings, frozen=frozen, tokens=TOKENS, bf16=bf16).memory.peak


def steps(case: Case) -> None:
    """Build the case's network and train it for STEPS steps."""
    torch.manual_seed(0)
    (net, frozen), s = case.nets, case.training
    model = denoiser(net, frozen)
    objective = DenoiseObjective(model, RandomText(net.core, s.micro_batch), s, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        training = Training(objective, s, Path(folder), seed=0)
        side = model.resolution
        for _ in range(STEPS):
            index = torch.arange(s.batch).split(s.micro_batch)
            training.step([Batch(torch.rand(len(i), 3, side, side), ("",) * len(i), i) for i in index])


def tensors(work: Callable[[], None]) -> int:
    """The most bytes of CPU tensors that `work` had at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        work()
    roots = prof.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    return max(event.extra_fields.total_allocated for event in _allocations(roots))


def _allocations(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event
        yield from _allocations(event.children)


def resident(work: Callable[[], None]) -> int:
    """The bytes by which the process grew at most while it did `work`."""
    steps(Case("tiny", 16, settings={"batch": 2}))
    device = torch.device("cpu")
    monitor.reset_peak(device)
    before = monitor.peak_memory(device)
    work()
    return monitor.peak_memory(device) - before


def measure(name: str, by: Callable[[Callable[[], None]], int]) -> int:
    return by(lambda: steps(CASES[name]))


def in_own_process(name: str, how: str) -> int:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "bench.memory", "--only", name, "--here", how]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    if done.returncode:
        sys.exit(f"{name} failed with status {done.returncode}; see above")
    return int(done.stdout.splitlines()[-1])


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results as Markdown, in MiB."""
    heads = ("case", "planned", "tensors", "planned / tensors", "process", "planned with scratch space / process")
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {r['case']} | {r['planned'] / 2**20:.0f} | {r['tensors'] / 2**20:.0f} | {r['planned'] / r['tensors']:.3f} "
        f"| {r['process'] / 2**20:.0f} | {(r['planned'] + SCRATCH) / r['process']:.3f} |"
        for r in results
    ]
    return "\n".join(lines)


HOW = {"tensors": tensors, "process": resident}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="cases")
    parser.add_argument("--output", type=Path, help="file to which the JSON lines are appended")
    parser.add_argument("--here", choices=HOW, help="measure one case in this process, and print bytes")
    args = parser.parse_args(argv)
    if args.here:
        print(measure(args.only[0], HOW[args.here]))
        return
    results = []
    for name in args.only:
        found = {how: in_own_process(name, how) for how in HOW}
        results.append({"bench": "memory", "case": name, "planned": planned(CASES[name])} | found)
        print(json.dumps(results[-1]), flush=True)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")
    print("\n" + table(results))
    off = [r["case"] for r in results if abs(r["planned"] / r["tensors"] - 1) > TARGET]
    if off:
        sys.exit(f"off by more than {TARGET:.0%}: {', '.join(off)}")


if __name__ == "__main__":
    main()
