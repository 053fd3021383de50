"""A small real training: two convolutions that denoise noise patterns. As a script, it trains in a folder."""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pixelgrow.errors import UserError
from pixelgrow.rng import normal, uniform
from pixelgrow.training import monitor
from pixelgrow.training.loop import Interrupted, TrainResult, train
from pixelgrow.training.monitor import Hook
from pixelgrow.training.objective import Terms
from pixelgrow.training.settings import TrainSettings


@dataclass(frozen=True)
class ToyBatch:
    image: Tensor
    text: tuple[str, ...]
    index: Tensor


class Toy:
    """x0 from x0 + sigma eps, everything keyed by the index. `poison` holds indices whose loss is not finite."""

    def __init__(self, poison: frozenset[int] = frozenset(), frozen: bool = False) -> None:
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(8, 3, 3, padding=1), nn.BatchNorm2d(3)
        )
        net[0].requires_grad_(not frozen)
        self.modules: dict[str, nn.Module] = {"net": net}
        self.rates = {"net": 1.0}
        self.poison = poison
        self.seen: list[int] = []

    def loss(self, batch: ToyBatch, part: str) -> Terms:
        self.seen += batch.index.tolist()
        sigma = uniform(0, "sigma", batch.index).float() + 0.1
        x = batch.image + sigma[:, None, None, None] * normal(batch.image.shape[1:], 0, "noise", batch.index)
        loss = (self.modules[part](x) - batch.image).square().mean()
        if self.poison & set(batch.index.tolist()):
            loss = loss * float("nan")
        return Terms(loss, {"sigma_mean": sigma}, sigma)


def stream(batch: int):
    def batches(start: int, step: int = batch) -> Iterator[ToyBatch]:
        while True:
            index = torch.arange(start, start + batch)
            yield ToyBatch(normal((3, 8, 8), 0, "image", index).clamp(-1, 1), ("",) * batch, index)
            start += step

    return batches


def settings(**changes) -> TrainSettings:
    base = {"images": 96, "batch": 8, "save_every": 24, "log_every": 16, "validate_every": 32, "sample_every": 0}
    return TrainSettings(**(base | changes))


def run(
    folder: Path,
    toy: Toy | None = None,
    hooks: tuple[Hook, ...] = (),
    keep=None,
    batches=None,
    stop_at: int | None = None,
    after: Path | None = None,
    **changes,
) -> TrainResult:
    s, toy = settings(**changes), toy or Toy()

    def validate(images: int) -> dict[str, float]:
        torch.rand(7)  # a hook that draws from the global generator perturbs nothing
        batch = next(stream(8)(10**6))
        return {"error": float((toy.modules["net"](batch.image) - batch.image).square().mean())}

    hook = Hook("validation", s.validate_every or 0, validate, at_start=True)
    batches = batches or stream(s.micro_batch)
    return train(
        toy, batches, s, folder, seed=3, hooks=(hook, *hooks), flops=1e6, keep=keep, stop_at=stop_at, after=after
    )


def weights(toy: Toy, result: TrainResult) -> dict[str, Tensor]:
    """What a stage keeps: the last weights, buffers and all averages."""
    kept = {n: t.clone() for n, t in toy.modules["net"].state_dict().items()}
    for ema in result.averages["net"]:
        kept |= {f"{ema.length}/{n}": t.clone() for n, t in ema.tensors.items()}
    return kept


def finish(folder: Path, images: int) -> int:
    """A whole run, of a process of its own; returns the exit status."""
    toy = Toy()
    try:
        result = run(folder, toy, images=images, save_every=max(8, images // 40), log_every=8, snapshot_every=0)
    except Interrupted as stop:
        sys.stderr.write(f"{stop}\n")
        return stop.status
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    save_file(weights(toy, result), folder / "model.safetensors")
    return 0


def fork(folder: Path, images: int) -> int:
    """Start a run in a child process; returns its number. Nothing has computed yet, so forking is safe."""
    child = os.fork()
    if not child:
        os._exit(finish(folder, images))
    return child


def main() -> int:
    """`FOLDER IMAGES`: run. `FOLDER IMAGES KILLS`: run in FOLDER/whole, then in FOLDER/cut with that many SIGKILLs."""
    folder, images = Path(sys.argv[1]), int(sys.argv[2])
    monitor.matmul_rate = lambda *_: 1e11  # nothing is measured here
    if len(sys.argv) == 3:
        return finish(folder, images)
    for slow in ("torch.utils.tensorboard", "torch._dynamo"):  # once, not in every child
        importlib.import_module(slow)
    began = time.monotonic()
    if os.waitstatus_to_exitcode(os.waitpid(fork(folder / "whole", images), 0)[1]):
        return 1
    seconds, chance, kills = time.monotonic() - began, random.Random(5), 0
    for _ in range(int(sys.argv[3])):
        child = fork(folder / "cut", images)
        time.sleep(chance.uniform(0.02, 0.15) * seconds)
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    sys.stdout.write(f"{kills}\n")
    return os.waitstatus_to_exitcode(os.waitpid(fork(folder / "cut", images), 0)[1])


if __name__ == "__main__":
    sys.exit(main())
