"""What share of the machine's matrix-product rate training and sampling reach, and how cost grows with pixels.

    python -m bench.throughput [--sizes tiny small] [--only small:random:64] [--output FILE.jsonl] [--figures FOLDER]
    python -m bench.throughput --device cuda --dtype bf16 --compile --batch 256

One JSON line for each case, a Markdown table at the end. A case is a network that was never trained, in a process of
its own, which measures in turn, several rounds over: a square matrix product (2048^3 in fp32 on a CPU, 8192^3 on a
GPU), the work, the product again. A round's share is the work's FLOP/s (matrix products, convolutions and attention,
as torch counts them) over the mean of the two rates beside it, so that a machine whose speed drifts disturbs it little;
the median of the rounds counts. Kinds of work:

    core      forward and backward of a Shallow-UViT
    random    the same of a core at 32 px grown by `init: random`, all of it training (the paper's fine-tuning)
    preserve  the same of one grown by `init: preserve`, its base frozen
    sample    `sample()` of the last, with guidance

images/s is that of whole training steps (drawn noise, forward, backward, clipping, AdamW, averages), or of sampling.
Memory is what the case added to a process that has done matrix products alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench.sampling_overhead import conditions
from torch import Tensor

from bench import untrained
from pixelgrow import precision
from pixelgrow.data.loader import Batch
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.loss import loss, weight
from pixelgrow.diffusion.sampling import sample
from pixelgrow.growth import grown_config
from pixelgrow.models.cond import Cond
from pixelgrow.models.flops import counted
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.training import cpu, monitor
from pixelgrow.training.denoise import DenoiseObjective
from pixelgrow.training.loop import Training
from pixelgrow.training.settings import TrainSettings

CORE = 32  # pixels of the core that grown networks have
BATCH = {16: 64, 32: 64, 64: 32, 128: 16, 256: 8}
STEPS, GUIDANCE = 4, 4.0  # of sampling
TARGETS = {
    "tiny:core:32": 0.45, "small:core:32": 0.60,
    "small:random:64": 0.45, "small:preserve:64": 0.45, "small:random:128": 0.40, "small:preserve:128": 0.40,
}  # fmt: skip
KINDS = ("core", "random", "preserve", "sample")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A network and what is done with it; `name` is `size:kind:resolution`."""

    size: str
    kind: str
    resolution: int

    @property
    def name(self) -> str:
        return f"{self.size}:{self.kind}:{self.resolution}"

    @classmethod
    def read(cls, name: str) -> Case:
        """The case of a name; argparse.ArgumentTypeError for what is none."""
        size, _, rest = name.partition(":")
        kind, _, side = rest.partition(":")
        if kind not in KINDS or not side.isdigit() or (kind != "core" and int(side) <= CORE):
            raise argparse.ArgumentTypeError(
                f"{name!r}: expected size:kind:resolution, kind one of {', '.join(KINDS)}; grown ones above {CORE} px"
            )
        return cls(size, kind, int(side))


@dataclass(frozen=True)
class Conditions:
    """Under which a case is measured."""

    device: str
    dtype: str
    compile: bool
    batch: int
    rounds: int
    gemm: int
    seconds: float


def cases(sizes: Iterable[str]) -> list[Case]:
    """Every kind of work at 16 to 256 px."""
    sides = {"core": (16, 32), "random": (64, 128, 256), "preserve": (64, 128, 256), "sample": (64,)}
    return [Case(size, kind, side) for size in sizes for kind in KINDS for side in sides[kind]]


class Products:
    """Square matrix products, and their rate."""

    def __init__(self, under: Conditions) -> None:
        self.device, self.seconds = torch.device(under.device), under.seconds / 3
        self.a, self.b = torch.randn(2, under.gemm, under.gemm, device=self.device, dtype=DTYPES[under.dtype])
        self.out = torch.empty_like(self.a)
        self.flops = counted(self.multiply)
        self.count = repeats(self.multiply, self.device, self.seconds)

    def multiply(self) -> None:
        torch.mm(self.a, self.b, out=self.out)

    def rate(self) -> float:
        """FLOP/s, now: the mean over products that take about `seconds` together."""
        return self.flops * self.count / clock(self.multiply, self.device, self.count)


def clock(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds that `times` calls take, the device's queue included."""
    monitor.synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    monitor.synchronize(device)
    return time.perf_counter() - start


def repeats(work: Callable[[], object], device: torch.device, seconds: float) -> int:
    """How often to call `work` (warmed up here) to fill some seconds."""
    work()
    return max(1, math.ceil(seconds / max(1e-6, clock(work, device, 1))))


def build(case: Case, device: torch.device) -> Denoiser:
    """The network of a case."""
    torch.manual_seed(0)
    if case.kind == "core":
        return untrained.denoiser(shallow_uvit(case.size, case.resolution)).to(device)
    parent = shallow_uvit(case.size, CORE)
    if case.kind == "random":
        return untrained.denoiser(grown_config(parent, case.resolution, "random")).to(device)
    return untrained.denoiser(grown_config(parent, case.resolution, "preserve"), frozen=parent).to(device)


def sampling(denoiser: Denoiser, under: Conditions) -> Callable[[], object]:
    """Drawing a batch."""
    side, device = denoiser.resolution, torch.device(under.device)
    cond = conditions(denoiser.net.config.core, under.batch, device, untrained.TOKENS)
    denoiser.eval()

    def draw() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=under.dtype == "bf16"):
            sample(denoiser, cond, size=(side, side), steps=STEPS, guidance=GUIDANCE, batch=under.batch)

    return draw


def forward_backward(denoiser: Denoiser, x0: Tensor, cond: Cond, under: Conditions) -> Callable[[], object]:
    """The loss of a batch x0 (B, 3, H, W) whose noise is drawn already, and its gradients."""
    eps, sigma = torch.randn_like(x0), torch.rand(len(x0), device=x0.device) + 0.1
    weights = weight("edm", sigma, *denoiser.preconditioned)

    def step() -> None:
        with torch.autocast(x0.device.type, dtype=torch.bfloat16, enabled=under.dtype == "bf16"):
            value = loss(denoiser, x0, sigma, eps, cond, weights).mean()
        value.backward()
        denoiser.zero_grad(set_to_none=True)

    return step


def whole_step(denoiser: Denoiser, x0: Tensor, under: Conditions, folder: Path) -> Callable[[], object]:
    """One step of the training loop on the batch x0, which lies on the CPU."""
    settings = TrainSettings(images=10**9, batch=len(x0), precision="bf16" if under.dtype == "bf16" else "fp32")
    objective = DenoiseObjective(denoiser, untrained.RandomText(denoiser.net.config.core, len(x0)), settings, seed=0)
    training = Training(objective, settings, folder, seed=0)
    batch = Batch(x0, ("",) * len(x0), torch.arange(len(x0)))
    return lambda: training.step([batch])


@cpu.denormals_flushed()
@precision.tf32()
def measure(case: Case, under: Conditions) -> dict[str, Any]:
    """The numbers of a case, measured in this process."""
    device = torch.device(under.device)
    if device.type == "cpu":
        cpu.tune_allocator()
    products = Products(under)
    before = monitor.peak_memory(device)
    denoiser = build(case, device)
    with tempfile.TemporaryDirectory() as folder:
        if case.kind == "sample":
            work = whole = sampling(denoiser, under)
        else:
            x0 = torch.randn(under.batch, 3, case.resolution, case.resolution).clamp(-1, 1)
            cond = conditions(denoiser.net.config.core, under.batch, device, untrained.TOKENS)
            whole = whole_step(denoiser, x0, under, Path(folder))
            work = forward_backward(denoiser, x0.to(device), cond, under)
        flops = counted(work)
        if under.compile:
            denoiser.compile()
            work()
        times = repeats(work, device, under.seconds)
        whole()
        speeds, shares, rates = [], [], []
        for _ in range(under.rounds):
            beside = products.rate()
            spent = clock(work, device, times)
            rates.append((beside + products.rate()) / 2)
            shares.append(flops * times / spent / rates[-1])
            speeds.append(under.batch * times / (spent if whole is work else clock(whole, device, times)))
    result: dict[str, Any] = {"bench": "throughput", "case": case.name} | asdict(case) | asdict(under)
    return result | {
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "gflop_per_image": round(flops / under.batch / 1e9, 4),
        "gemm_gflops": round(statistics.median(rates) / 1e9, 4),
        "share": round(statistics.median(shares), 4),
        "shares": [round(s, 4) for s in shares],
        "target": TARGETS.get(case.name) if (under.device, under.dtype) == ("cpu", "fp32") else None,
        "images_per_s": round(statistics.median(speeds), 2),
        "memory_mib": round((monitor.peak_memory(device) - before) / 2**20, 1),
    }


def table(results: Iterable[dict[str, Any]]) -> str:
    """Results as Markdown."""
    lines = [
        "| network | px | batch | parameters | GFLOP an image | images/s | MiB | share of products' rate | target |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        low, high = min(r["shares"]), max(r["shares"])
        share = f"{r['share']:.2f} ({low:.2f} to {high:.2f})"
        target = "" if r["target"] is None else f"{r['target']:.2f} {'met' if r['share'] >= r['target'] else 'missed'}"
        lines.append(
            f"| {r['size']} {r['kind']} | {r['resolution']} | {r['batch']} | {r['parameters'] / 1e6:.1f}M "
            f"| {r['gflop_per_image']:.2f} | {r['images_per_s']:.1f} | {r['memory_mib']:.0f} | {share} | {target} |"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Cost by resolution: seconds and memory an image in training, each size and kind a line, the core with each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for size in dict.fromkeys(r["size"] for r in results):
        for kind, style in (("random", "o--"), ("preserve", "o-")):
            line = sorted(
                (r["resolution"], 1e3 / r["images_per_s"], r["memory_mib"] / r["batch"])
                for r in results
                if r["size"] == size and r["kind"] in ("core", kind)
            )
            for axis, values in zip(axes, list(zip(*line, strict=True))[1:], strict=False):
                axis.plot([side for side, *_ in line], values, style, label=f"{size}, {kind}")
    for axis, title in zip(axes, ("milliseconds an image, training", "MiB an image, training"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="resolution, px", title=title)
        axis.set_xticks(sides := sorted({r["resolution"] for r in results}), [str(side) for side in sides])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def in_own_process(case: Case, argv: list[str]) -> dict[str, Any]:
    """`measure` in a fresh process, whose peak of memory is the case's own."""
    command = [sys.executable, "-m", "bench.throughput", *argv, "--only", case.name, "--here"]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    if done.returncode:
        sys.exit(f"{case.name} failed with status {done.returncode}; see above")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--sizes", nargs="+", default=["tiny", "small"])
    made.add_argument("--only", nargs="+", type=Case.read, help="cases, such as small:core:32, instead of all")
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    made.add_argument("--compile", action="store_true")
    made.add_argument("--batch", type=int, help="images at a time, instead of 64 at 32 px to 8 at 256 px")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--gemm", type=int, help="side of the matrices; 2048, on a GPU 8192")
    made.add_argument("--seconds", type=float, default=0.6, help="least length of each measurement of the work")
    made.add_argument("--threads", type=int, help="of the CPU; all if left out")
    made.add_argument("--output", type=Path, help="file to which the JSON lines are appended")
    made.add_argument("--figures", type=Path, help="folder for throughput.png")
    made.add_argument("--here", action="store_true", help="measure in this process (memory then adds up over cases)")
    return made


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(given)
    if args.threads:
        torch.set_num_threads(args.threads)
    results = []
    for case in args.only or cases(args.sizes):
        if args.here:
            batch = args.batch or BATCH.get(case.resolution, 8)
            gemm = args.gemm or (2048 if torch.device(args.device).type == "cpu" else 8192)
            under = Conditions(args.device, args.dtype, args.compile, batch, args.rounds, gemm, args.seconds)
            result = measure(case, under)
        else:
            result = in_own_process(case, _shared(args))
        results.append(result)
        print(json.dumps(result), flush=True)
        if args.output and not args.here:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    if not args.here:
        print("\n" + table(results))
    if args.figures:
        plot(results, args.figures / "throughput.png")
    if missed := [r["case"] for r in results if r["target"] is not None and r["share"] < r["target"]]:
        sys.exit(f"below their targets: {', '.join(missed)}")


def _shared(args: argparse.Namespace) -> list[str]:
    """The options that a case's own process needs too."""
    pairs = {k: getattr(args, k) for k in ("device", "dtype", "batch", "rounds", "gemm", "seconds", "threads")}
    flags = ["--compile"] if args.compile else []
    return flags + [word for k, v in pairs.items() if v is not None for word in (f"--{k}", str(v))]


if __name__ == "__main__":
    main()
