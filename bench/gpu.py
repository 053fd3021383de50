"""Everything that has to be known of one GPU, in ten minutes: memory, speed, kernels, loading, latency, saving.

    python -m bench.gpu [--output runs/bench/gpu.json] [--only NAME ...] [--minutes 9.5]
    python -m bench.gpu --toy --device cpu

One JSON file with a section for each part; a section that fails says why and the others run. What the time does not
suffice for is named. `--toy` runs all of it with the smallest networks, to see that it runs; its figures mean nothing.
Networks were never trained, captions are random. `mfu` is FLOP/s (products, convolutions and attention, forward and
backward, nothing that is computed again counted twice) over the public rate of the GPU, or over the measured rate of
products where the GPU is not in `pixelgrow.plan.gpus`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench.loader import write_photographs
from bench.sampling_overhead import conditions
from bench.throughput import clock
from bench.untrained import TOKENS, RandomText, denoiser
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from pixelgrow import precision
from pixelgrow.data import Loader, open_source
from pixelgrow.data.loader import Batch
from pixelgrow.diffusion.generator import Generator
from pixelgrow.diffusion.sampling import sample
from pixelgrow.distributed import Shards, Team
from pixelgrow.distributed.shard import split
from pixelgrow.growth import grown_config
from pixelgrow.models.config import NetConfig
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.models.uvit import UViT
from pixelgrow.plan.gpus import GPUS
from pixelgrow.plan.network import network_cost
from pixelgrow.training import monitor, state
from pixelgrow.training.denoise import DenoiseObjective
from pixelgrow.training.loop import Training
from pixelgrow.training.saving import Saver
from pixelgrow.training.settings import TrainSettings

TRAINING = 0.6  # of the minutes, for all trainings together


@dataclass(frozen=True)
class Work:
    """A network that trains: a core of `low` px, grown to `to` px by `init` if that is not 0, in micro-batches."""

    size: str
    low: int
    batch: int
    to: int = 0
    init: str = "random"
    compile: bool = True
    checkpointing: bool | str = False

    @property
    def name(self) -> str:
        grown = f" grown to {self.to} px by {self.init}" if self.to else ""
        return f"{self.size} at {self.low} px{grown}, batch {self.batch}{'' if self.compile else ', eager'}" + (
            f", checkpointing {self.checkpointing}" if self.checkpointing else ""
        )

    @property
    def nets(self) -> tuple[NetConfig, NetConfig | None]:
        """The network, and the one in it that is frozen."""
        core = shallow_uvit(self.size, self.low)
        if not self.to:
            return core, None
        return grown_config(core, self.to, self.init), core if self.init == "preserve" else None  # type: ignore[arg-type]

    def settings(self, device: torch.device) -> TrainSettings:
        bf16 = "bf16" if device.type == "cpu" or precision.has_bf16() else "fp32"
        more = {"compile": self.compile, "activation_checkpointing": self.checkpointing}
        return TrainSettings(images=10**9, batch=self.batch, precision=bf16, **more)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Scale:
    """What is measured, and how long: `works` train; `latency` is (size, px of its core, highest px) of a generator."""

    works: tuple[Work, ...]
    steps: int
    photographs: int
    side: int
    latency: tuple[str, int, int]
    sampled: Work
    sampling_steps: int
    sharded: Work


FULL = Scale(
    works=(
        Work("large", 64, 128),
        Work("large", 64, 128, compile=False),
        Work("large", 64, 128, compile=False, checkpointing="selective"),
        Work("large", 64, 128, compile=False, checkpointing=True),
        Work("base", 64, 64, to=256),
        Work("base", 64, 8, to=1024),
        Work("base", 64, 8, to=1024, init="preserve"),
    ),
    steps=8,
    photographs=256,
    side=1024,
    latency=("base", 64, 1024),
    sampled=Work("base", 64, 16, to=256, init="preserve"),
    sampling_steps=32,
    sharded=Work("large", 64, 128, compile=False),
)
TOY = Scale(
    works=(
        Work("tiny", 8, 2, compile=False),
        Work("tiny", 8, 2, to=16, init="preserve", compile=False, checkpointing="selective"),
    ),
    steps=1,
    photographs=4,
    side=16,
    latency=("tiny", 8, 16),
    sampled=Work("tiny", 8, 2, to=16, init="preserve"),
    sampling_steps=2,
    sharded=Work("tiny", 8, 2, compile=False),
)


@dataclass(frozen=True)
class Bench:
    """The device and the scale of a run. peak: FLOP/s that an MFU of 1 stands for. until: by `time.perf_counter`, when
    no further work begins to train."""

    device: torch.device
    scale: Scale
    peak: float
    until: float

    def training(self, work: Work, folder: Path, mesh: Any = None) -> tuple[Training, list[Batch]]:
        """A training and the micro-batch of a step, as the loader gives it; sharded over a mesh's processes."""
        torch.manual_seed(0)
        (net, frozen), s = work.nets, work.settings(self.device)
        model = denoiser(net, frozen).to(self.device)
        shards = Shards()
        if mesh is not None:
            dtype, last = precision.training_dtype(s.precision, self.device), list(model.net.exit.values())
            split_model = split(model, model.net.blocks, last, mesh, self.device, dtype, Team())
            shards = Shards({"denoiser": split_model})
        network = shards.network("denoiser", model)
        objective = DenoiseObjective(network, RandomText(net.core, s.batch), s, seed=0)
        training = Training(objective, s, folder, seed=0, shards=shards)
        training._compile()
        image = torch.randint(0, 256, (s.batch, 3, model.resolution, model.resolution), dtype=torch.uint8)
        return training, [Batch(image, ("",) * s.batch, torch.arange(s.batch))]

    def wait(self) -> None:
        monitor.synchronize(self.device)

    def peak_memory(self) -> int:
        return monitor.peak_memory(self.device)


def machine(bench: Bench) -> dict[str, Any]:
    """The machine, in words, and its rate of products in bf16."""
    gpu = torch.cuda.get_device_name() if bench.device.type == "cuda" else ""
    side = None if gpu else 256
    found = monitor.matmul_rate(bench.device, torch.bfloat16, seconds=0.2, side=side)
    return {
        "gpu": gpu, "cpu": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
        "products_tflops": found / 1e12, "mfu_of_tflops": bench.peak / 1e12,
    }  # fmt: skip


def train(bench: Bench) -> dict[str, Any]:
    """Images/s, MFU, and memory planned and measured, of whole steps of training."""
    return {
        work.name: _train(bench, work) if time.perf_counter() < bench.until else {"skipped": "no time was left"}
        for work in bench.scale.works
    }


def _train(bench: Bench, work: Work) -> dict[str, Any]:
    (net, frozen), gpu = work.nets, bench.device.type == "cuda"
    settings = work.settings(bench.device)
    plan = network_cost(
        net, settings, frozen=frozen, tokens=TOKENS, bf16=settings.precision == "bf16", gpu=gpu
    )  # before the network is there: a plan allocates nothing
    useful = network_cost(
        net, settings.model_copy(update={"activation_checkpointing": False}), frozen=frozen, tokens=TOKENS
    )
    with tempfile.TemporaryDirectory() as folder:
        monitor.reset_peak(bench.device)
        before = 0 if gpu else bench.peak_memory()
        try:
            training, batch = bench.training(work, Path(folder))
            seconds = _step(bench, training, batch)
        except torch.cuda.OutOfMemoryError as error:
            return {"planned_gib": plan.memory.peak / 2**30, "failed": str(error).partition("\n")[0]}
        finally:
            torch.compiler.reset()
    return {
        "images_per_second": work.batch / seconds,
        "mfu": useful.flops * work.batch / seconds / bench.peak,
        "gflop_per_image": useful.flops / 1e9,
        "planned_gib": plan.memory.peak / 2**30,
        "measured_gib": (bench.peak_memory() - before) / 2**30,
    }


def _step(bench: Bench, training: Training, batch: list[Batch]) -> float:
    """Seconds of a step, after two that compile and make the optimizer's state. The peak of memory starts then."""
    for _ in range(2):
        training.step(batch)
    bench.wait()
    monitor.reset_peak(bench.device)
    return clock(lambda: training.step(batch), bench.device, bench.scale.steps) / bench.scale.steps


def kernels(bench: Bench, count: int = 20) -> dict[str, Any]:
    """Where the time of a step goes: the share of each kernel, or on a CPU of each operation, the largest first."""
    cuda = bench.device.type == "cuda"
    found: dict[str, Any] = {}
    for work in (bench.scale.works[0], bench.scale.works[-1]):
        with tempfile.TemporaryDirectory() as folder:
            training, batch = bench.training(work, Path(folder))
            for _ in range(2):
                training.step(batch)
            bench.wait()
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
            with profile(activities=activities) as prof:
                training.step(batch)
                bench.wait()
        torch.compiler.reset()
        name = "self_device_time_total" if cuda else "self_cpu_time_total"
        rows = sorted(((float(getattr(e, name)), e.key, e.count) for e in prof.key_averages()), reverse=True)
        total = sum(time for time, *_ in rows) or 1.0
        found[work.name] = [{"name": k[:120], "share": t / total, "calls": n} for t, k, n in rows[:count] if t]
    return found


def loader(bench: Bench) -> dict[str, Any]:
    """Images/s of the loader at the highest resolution, a worker on every core; photographs are half as large again."""
    side = bench.scale.side
    workers = min(os.cpu_count() or 1, 16) if bench.device.type == "cuda" else 0
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), bench.scale.photographs, scale=1.5 * side / 375)
        made = Loader(open_source(folder), size=(side, side), batch=4, workers=workers, seed=0)
        stream = made.batches(0)
        next(stream)  # starts the workers
        count, began = 0, time.perf_counter()
        while count < 2 * bench.scale.photographs and time.perf_counter() - began < 20:
            count += len(next(stream))
        seconds = time.perf_counter() - began
        stream.close()
    return {"side": side, "workers": workers, "images_per_second": count / seconds}


@torch.no_grad()
def latency(bench: Bench) -> dict[str, Any]:
    """Milliseconds of one image by a one-step generator at each resolution, the median of several."""
    size, low, high = bench.scale.latency
    config, found = shallow_uvit(size, low), {}
    bf16 = torch.bfloat16 if bench.device.type == "cpu" or precision.has_bf16() else torch.float32
    while True:
        generator = Generator(UViT(config)).eval().to(bench.device)
        z = torch.randn(1, 3, low, low, device=bench.device)
        cond = conditions(config.core, 1, bench.device, TOKENS)

        def once(generator: Generator = generator, z: torch.Tensor = z, cond: Any = cond) -> None:
            with precision.autocast(bench.device, bf16):
                generator(z, cond)

        once()
        times = [clock(once, bench.device, 1) for _ in range(2 + 3 * bench.scale.steps)]
        found[f"{config.resolution} px"] = 1e3 * statistics.median(times)
        if config.resolution >= high:
            return {"size": size, "milliseconds": found}
        config = grown_config(config, 2 * config.resolution, "preserve", generator=True)


def sampling(bench: Bench) -> dict[str, Any]:
    """Images/s of guided sampling by a grown model."""
    work, (net, _) = bench.scale.sampled, bench.scale.sampled.nets
    model = denoiser(net).eval().to(bench.device)
    cond = conditions(net.core, work.batch, bench.device, TOKENS)
    bf16 = torch.bfloat16 if bench.device.type == "cpu" or precision.has_bf16() else torch.float32

    def once() -> None:
        with precision.autocast(bench.device, bf16):
            size = (model.resolution, model.resolution)
            sample(model, cond, size=size, steps=bench.scale.sampling_steps, guidance=4.0, batch=work.batch)

    once()
    seconds = clock(once, bench.device, 1)
    return {"work": work.name, "steps": bench.scale.sampling_steps, "images_per_second": work.batch / seconds}


def saving(bench: Bench) -> dict[str, Any]:
    """Seconds that saving the state of a training takes, how long its steps pause for it, and what reading it takes."""
    with tempfile.TemporaryDirectory() as folder:
        training, batch = bench.training(bench.scale.works[0], Path(folder))
        training.step(batch)
        tensors = training.tensors()
        saver = Saver(Path(folder) / "state", Team(), sharded=False)
        began = time.perf_counter()
        saver.start(1, tensors, {})
        paused = time.perf_counter() - began
        saver.finish()
        saved = time.perf_counter() - began
        began = time.perf_counter()
        found = state.load(Path(folder) / "state")
        assert found is not None and found.read().keys() == tensors.keys()
        read = time.perf_counter() - began
        torch.compiler.reset()
    gib = sum(t.nbytes for t in tensors.values()) / 2**30
    return {"gib": gib, "pause_seconds": paused, "save_seconds": saved, "load_seconds": read}


def sharded(bench: Bench) -> dict[str, Any]:
    """A sharded training (FSDP2) in one process against a plain one: seconds of a step, and memory."""
    work, found = bench.scale.sharded, {}
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if bench.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            for name, mesh in (("plain", None), ("sharded", init_device_mesh(bench.device.type, (1,)))):
                training, batch = bench.training(work, Path(folder) / name, mesh)
                seconds = _step(bench, training, batch)
                found[name] = {"seconds": seconds, "gib": bench.peak_memory() / 2**30}
                del training
                torch.compiler.reset()
        finally:
            dist.destroy_process_group()
    return {"work": work.name, **found, "ratio": found["sharded"]["seconds"] / found["plain"]["seconds"]}


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "machine": machine,
    "train": train,
    "latency": latency,
    "sampling": sampling,
    "saving": saving,
    "sharded": sharded,
    "loader": loader,
    "kernels": kernels,
}


def peak_rate(device: torch.device) -> float:
    """FLOP/s that an MFU of 1 stands for: the GPU's public rate in bf16, or what products reach."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name().lower().replace(" ", "")
        known = next((gpu for key, gpu in GPUS.items() if key.partition("-")[0] in name), None)
        if known is not None:
            return known.flops
    return monitor.matmul_rate(device, torch.bfloat16, seconds=0.1, side=None if device.type == "cuda" else 256)


@precision.tf32()
def measure(names: list[str], device: torch.device, scale: Scale, minutes: float) -> dict[str, Any]:
    """The sections by name; what fails is reported in its place."""
    began, results = time.perf_counter(), {}
    bench = Bench(device, scale, peak_rate(device), began + TRAINING * 60 * minutes)
    for name in names:
        at = time.perf_counter()
        if at - began > 60 * minutes:
            results[name] = {"skipped": f"{minutes:g} minutes were over"}
            continue
        try:
            results[name] = SECTIONS[name](bench)
        except Exception as error:  # noqa: BLE001  # the other sections are worth having
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
        results[name]["section_seconds"] = round(time.perf_counter() - at, 1)
        print(json.dumps({name: results[name]}), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="the smallest networks; without a GPU always so")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=9.5, help="no section begins later")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/gpu.json"))
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    toy = args.toy or device.type == "cpu"
    results = measure(args.only, device, TOY if toy else FULL, args.minutes)
    results |= {"toy": toy, "date": time.strftime("%Y-%m-%d"), "scale": asdict(TOY if toy else FULL)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.output}")
    failed = [name for name in args.only if "failed" in results[name]]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
