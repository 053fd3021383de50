"""Trainings of a small denoiser whose weights several processes share: what `test_shard.py` runs in each of them."""

from __future__ import annotations

import itertools
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffusion.test_generator import generator as one_step
from onestep.test_distill import Conditions
from pixelgrow import precision, rng
from pixelgrow.data.loader import Batch
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.generator import Generator
from pixelgrow.distributed import Shards, Team, join
from pixelgrow.distributed.shard import mesh_of, split
from pixelgrow.growth import freeze, grow
from pixelgrow.models.config import CoreConfig
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.models.uvit import UViT
from pixelgrow.onestep.distill import GENERATOR, DistillBatch, DistillObjective
from pixelgrow.onestep.features import TeacherFeatures
from pixelgrow.onestep.settings import LossSettings
from pixelgrow.training import monitor
from pixelgrow.training.denoise import DenoiseObjective, validation_hook
from pixelgrow.training.log import Averages
from pixelgrow.training.loop import train
from pixelgrow.training.settings import TrainSettings
from processes import CONTEXT
from test_growth import shallow
from training.test_denoise import Labels

STEPS: list[dict[str, float]] = []  # losses of the trainings of this process, which a log rounds
CPU = torch.device("cpu")
BASE: dict[str, Any] = {"images": 80, "batch": 4, "accumulate": 4, "lr": 2e-3, "clip": 0.5, "log_every": 4}
BASE |= {"ema": (0.2,), "save_every": 40, "snapshot_every": 0, "validate_every": 40}


def core() -> Denoiser:
    """A denoiser of which no tensor is zero; with two processes, some are cut into uneven parts."""
    torch.manual_seed(0)
    config = CoreConfig(width=32, depth=2, heads=1, text_dim=16, pooled_dim=16, classes=5)
    denoiser = Denoiser(UViT(shallow_uvit("tiny", 8, stride=2, core=config)))
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return denoiser


def images(index: torch.Tensor, side: int) -> torch.Tensor:
    return rng.normal((3, side, side), 0, "image", index).clamp(-1, 1)


def stream(side: int, batch: int, start: int, step: int) -> Iterator[Batch]:
    for first in itertools.count(start, step):
        index = torch.arange(first, first + batch)
        yield Batch(images(index, side), tuple(str(int(i) % 4) for i in index), index)


def together(work: Callable[..., None], size: int, *args: Any) -> list[int]:
    """`work(team, *args)` in so many processes; their exit codes by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [CONTEXT.Process(target=_main, args=(rank, size, port, work, args)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(250)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in codes, "it hangs"
    return codes  # type: ignore[return-value]


def _main(rank: int, size: int, port: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    monitor.matmul_rate = lambda *_: 1e11  # type: ignore[assignment]  # nothing is measured here
    add = Averages.add

    def noted(self: Averages, values: Mapping[str, Any]) -> None:
        STEPS.append({name: float(value) for name, value in values.items() if name.endswith("loss")})
        add(self, values)

    Averages.add = noted  # type: ignore[method-assign]
    with join() as team:
        work(team, *args)


def shared(team: Team, shard: int, part: str, model: Denoiser | Generator, settings: TrainSettings) -> Shards:
    mesh, dtype = mesh_of(team, shard, CPU), precision.training_dtype(settings.precision, CPU)
    if mesh is None:
        return Shards()
    blocks, last = model.net.blocks, list(model.net.exit.values())
    return Shards({part: split(model, blocks, last, mesh, CPU, dtype, team)})


def fit(team: Team, shard: int, denoiser: Denoiser, folder: Path, **changes: Any) -> None:
    """Train as a stage does; `folder/averages` and `folder/weights` get what the checkpoint of a stage would hold."""
    phases = {name: changes.pop(name) for name in ("stop_at", "after") if name in changes}
    settings = TrainSettings(**(BASE | changes))
    index = torch.arange(8)
    cond = Labels().cond([str(int(i) % 4) for i in index])
    hooks = [validation_hook(denoiser, images(index, denoiser.resolution), cond, settings.validate_every or 0)]
    shards = shared(team, shard, "denoiser", denoiser, settings)
    result = train(
        DenoiseObjective(shards.network("denoiser", denoiser), Labels(), settings, seed=1),
        partial(stream, denoiser.resolution, settings.micro_batch),
        settings,
        folder,
        seed=1,
        hooks=hooks if team.first else (),
        team=team,
        shards=shards,
        **phases,
    )
    write(team, denoiser, folder / "weights")
    (folder / f"steps{team.rank}.json").write_text(json.dumps(STEPS), encoding="utf-8")
    if result.averages["denoiser"]:
        with result.averages["denoiser"][0].applied():
            write(team, denoiser, folder / "averages")


def write(team: Team, model: Denoiser | Generator, path: Path) -> None:
    if team.first:
        save_file({n: t.detach().clone().contiguous() for n, t in model.state_dict().items()}, path)


def grown(frozen: bool) -> Denoiser:
    """A growth of the core, with frozen base or not."""
    index = torch.arange(4)
    child, report = grow(core(), 16, images=images(index, 16), cond=Labels().cond(["0", "1", "2", "3"]))
    if frozen:
        freeze(child.net, report.loaded)
    return child


def trainings(team: Team, shard: int, folder: Path, parts: Sequence[str]) -> None:
    """20 steps of a core; 10 of its growth with a frozen base, 10 more of all; 3 of a distillation; 3 in other ways."""
    if "core" in parts:
        fit(team, shard, core(), folder / "core")
    if "frozen" in parts:
        fit(team, shard, grown(True), folder / "frozen", stop_at=40)
    if "unfrozen" in parts:
        fit(team, shard, grown(False), folder / "unfrozen", after=folder / "frozen")
    if "onestep" in parts:
        distil(team, shard, folder / "onestep")
    if "other" in parts:
        fit(team, shard, core(), folder / "other", images=12, ema=(), optimizer="radam", activation_checkpointing=True)


def distil(team: Team, shard: int, folder: Path) -> None:
    """A generator and its discriminator; the losses are balanced by gradients in the generator's last layer."""
    generator, settings = one_step(), TrainSettings(**BASE | {"images": 12, "save_every": 12, "validate_every": 0})
    shards = shared(team, shard, GENERATOR, generator, settings)
    network = shards.network(GENERATOR, generator)
    objective = DistillObjective(network, TeacherFeatures(shallow()), Conditions(), LossSettings(), seed=0)

    def batches(start: int, step: int) -> Iterator[DistillBatch]:
        for first in itertools.count(start, step):
            index = torch.arange(first, first + 1)
            latent, image, target = (rng.normal((3, 16, 16), 0, name, index) for name in ("latent", "image", "target"))
            yield DistillBatch(image.clamp(-1, 1), ("a",), index, latent, target.clamp(-1, 1), ("b",))

    result = train(objective, batches, settings, folder, seed=1, team=team, shards=shards)
    write(team, generator, folder / "weights")
    (folder / f"steps{team.rank}.json").write_text(json.dumps(STEPS), encoding="utf-8")
    with result.averages[GENERATOR][0].applied():
        write(team, generator, folder / "averages")
