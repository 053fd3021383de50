"""The `pairs` stage: joins images with a teacher's latents, shard by shard. A finished shard is never made again.

Several processes share the shards: process r of N makes r, r + N, ... of those that are missing.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixelgrow import checkpoint, rng
from pixelgrow.data.buckets import square
from pixelgrow.data.loader import Loader, mirrored, to_tensor
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.generator import Generator
from pixelgrow.diffusion.guidance import Guided
from pixelgrow.diffusion.sampling import initial_noise
from pixelgrow.distributed import Team
from pixelgrow.growth import kept_in
from pixelgrow.models.cond import Cond
from pixelgrow.onestep.losses import guidance_weights
from pixelgrow.onestep.pairs import FORMAT, INDEX, Ode, read_shard, reduced, shard_path, spread, write_shard
from pixelgrow.recipe.stages import PairsStage
from pixelgrow.stages.materials import BAD_FILES, Materials
from pixelgrow.stages.train import Parent
from pixelgrow.training.log import Display
from pixelgrow.writing import write_json

CHECKED = 16  # images of the round trip: inverted and solved back
DESCRIBED = 16384  # pairs whose latents' statistics are measured
logger = logging.getLogger(__name__)


class _Stopped(Exception):
    """Raised in a worker after another worker has failed or the run was stopped."""


class Models(nn.Module):
    """The teacher, and the generator whose images it upscales, if any."""

    def __init__(self, denoiser: Denoiser, generator: Generator | None = None) -> None:
        super().__init__()
        self.denoiser, self.generator = denoiser, generator


Job = tuple[Path, int, int]  # a shard's file; the first position of its images in the stream, and the one after them


@dataclass(frozen=True)
class Work:
    """What a worker makes shards with.

    `decoding`: a lock of the loader, which all workers share. `stopped`: set when a worker fails or the run is stopped;
    every worker checks it after each step of its solver.
    """

    stage: PairsStage
    models: Models
    ode: Ode
    loader: Loader
    materials: Materials
    seed: int
    decoding: threading.Lock
    stopped: threading.Event

    @property
    def denoiser(self) -> Denoiser:
        return self.models.denoiser

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def denoise(self, cond: Cond, weights: Tensor | None) -> Guided:
        guidance = self.stage.guidance if weights is None else weights
        assert not isinstance(guidance, str)
        return Guided(self.denoiser, cond, guidance=guidance, interval=self.stage.interval)

    def _check(self) -> None:
        if self.stopped.is_set():
            raise _Stopped

    def weights(self, numbers: range, origin: Tensor) -> Tensor | None:
        """Guidance weights (B,) of positions in the stream with their `origin`; None if there is no distribution."""
        if self.stage.distribution is None:
            return None
        caption = origin[:, 3] if self.loader.several else None
        return guidance_weights(rng.uniform(self.seed, "guidance", numbers), self.stage.distribution, caption).float()

    def batches(
        self, start: int, stop: int, decode: bool = True
    ) -> Iterator[tuple[Tensor, tuple[str, ...], Tensor, range]]:
        """Images (B, 3, h, w), captions, origins (B, 3 or 4) and positions of the stream from `start` to `stop`.

        Without `decode`, images are (B, 3, 0, 0).
        """
        for at in range(start, stop, self.stage.batch):
            with self.decoding:
                raw = self.loader.load(at, decode)
                for source, bad in raw.bad:
                    self.loader.bad.add(source, [bad])
            rows = min(self.stage.batch, stop - at)
            images = to_tensor(raw.image[:rows].transpose(0, 2, 3, 1))
            origin = torch.nn.functional.pad(torch.from_numpy(raw.origin[:rows]), (0, 1))
            if self.loader.several:
                origin = torch.cat([origin, torch.from_numpy(raw.caption[:rows, None])], 1)
            yield images, raw.text[:rows], origin, range(at, at + rows)

    @torch.no_grad()
    def shard(self, start: int, stop: int, note: Callable[[int], None]) -> dict[str, Tensor]:
        """The pairs of the stream's positions `start` to `stop`. `note` is called with the size of each batch done."""
        found: dict[str, list[Tensor]] = {}

        def keep(**tensors: Tensor) -> None:
            for name, tensor in tensors.items():
                found.setdefault(name, []).append(tensor.cpu())

        device, sampled = self.device, self.stage.direction == "sample"
        side, channels = self.denoiser.resolution, self.denoiser.space.channels
        for images, captions, origin, numbers in self.batches(start, stop, decode=not sampled):
            cond = self.materials.text.cond(captions).to(device)
            weights = self.weights(numbers, origin)
            denoise = self.denoise(cond, weights)
            given = {} if weights is None else {"guidance": weights}
            if sampled:
                z = initial_noise((side, side), self.seed, numbers, channels)
                low = self.low(z.to(device), cond, weights)
                samples = self.ode.to_image(denoise, z.to(device), self._check, low)
                samples = self.denoiser.space.bound(samples, self.denoiser.exact_factors)
                keep(latent=z.half(), image=samples.half(), origin=origin, **given)
            else:
                z = self.ode.to_latent(denoise, images.to(device), self._check)
                keep(latent=z.half(), origin=origin, **given)
                may = torch.tensor([self._mirrors(int(source)) for source in origin[:, 0]])
                if may.any():
                    denoise = self.denoise(cond[may.to(device)], None if weights is None else weights[may])
                    z = self.ode.to_latent(denoise, images[may].flip(-1).to(device), self._check)
                    given = {name: tensor[may] for name, tensor in given.items()}
                    other = origin[may]
                    other[:, 2] = 1
                    keep(latent=z.half(), origin=other, **given)
            note(len(numbers))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def low(self, z: Tensor, cond: Cond, weights: Tensor | None) -> Tensor | None:
        """The generator's images of latents z (B, 3, h, w); None if there is no generator."""
        made = self.models.generator
        if made is None:
            return None
        if made.guided and weights is None:
            assert not isinstance(self.stage.guidance, str)
            weights = torch.full((len(z),), self.stage.guidance)
        omega = weights.to(z.device) if weights is not None and made.guided else None
        images = made(reduced(z, made.latent_resolution), cond, omega)
        return made.space.bound(images, made.exact_factors)

    def _mirrors(self, source: int) -> bool:
        return mirrored(self.loader.sources, self.stage.flip)[source]


def make(name: str, works: Sequence[Work], jobs: Sequence[Job], team: Team) -> float | None:
    """Write the shards of `jobs`, one thread for each of `works`. Each takes the next job of this process.

    Returns the images per second of all processes; None if there are no jobs. A process that fails waits for no other:
    it ends them.
    """
    mine = jobs[team.rank :: team.size]
    left, taking, counting, done = iter(mine), threading.Lock(), threading.Lock(), 0

    def worker(work: Work) -> None:
        while True:
            with taking:
                job = next(left, None)
            if job is None:
                return
            path, start, stop = job
            write_shard(path, work.shard(start, stop, note))

    def note(images: int) -> None:
        nonlocal done
        with counting:
            done += images
            if display is not None:
                display.update(min(images_of(jobs), done * team.size))  # the others are about as far

    threads, began = torch.get_num_threads(), time.monotonic()
    each = max(1, threads // len(works))
    with (
        Display(name, images_of(jobs), 0) if team.first else nullcontext() as display,
        ThreadPoolExecutor(len(works), initializer=torch.set_num_threads, initargs=(each,)) as pool,
    ):
        try:
            for future in as_completed([pool.submit(worker, work) for work in works]):
                future.result()
        except BaseException:
            works[0].stopped.set()
            raise
        finally:
            torch.set_num_threads(threads)
    team.wait()
    return images_of(jobs) / (time.monotonic() - began) if jobs else None


def images_of(jobs: Sequence[Job]) -> int:
    """Images in the shards of `jobs`."""
    return sum(stop - start for _, start, stop in jobs)


def devices_of(stage: PairsStage, device: torch.device, processes: int = 1) -> list[torch.device]:
    """The device of each worker of a process: `device`, or the GPUs in turn if the process is alone."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if processes > 1:  # each has a GPU of its own
        return [device] * -(-(stage.workers or 1) // processes)
    workers = stage.workers or max(1, gpus)
    return [torch.device("cuda", i % gpus) if gpus else device for i in range(workers)]


def pairs_stage(stage: PairsStage, parent: Parent, folder: Path, materials: Materials) -> dict[str, Any]:
    """Run or resume a `pairs` stage; returns the numbers of its run."""
    team = materials.team
    denoiser, _ = checkpoint.load(parent.folder, materials.device)
    seed = rng.seed_of(materials.recipe.seed, "stage", stage.name)
    side = denoiser.resolution
    mixture = materials.data.mixture(stage)
    sources = materials.seen(mixture.sources, side)

    def loader_of() -> Loader:
        return Loader(
            sources,
            mixture.weights,
            size=(side, side),
            batch=stage.batch,
            seed=seed,
            random_crop=False,
            bad_limit=stage.bad_limit,
            bad_path=folder / BAD_FILES,  # all write it, as soon as they meet one: no shard is made twice
        )

    loader = team.in_turn(loader_of)
    if stage.direction == "invert" and stage.n > len(loader):
        logger.warning(
            "%s: n is %d, the data have %d images: some are inverted more than once", stage.name, stage.n, len(loader)
        )
    materials.sees(stage.name, materials.images(stage, square(side)))
    materials.encode(stage.name, loader.texts())
    ode = Ode(stage.sampler, stage.steps, denoiser.sigma_min, denoiser.sigma_max)
    generator, upscaled = None, {}
    if stage.upscales is not None:
        generator, config = checkpoint.load_generator(materials.checkpoint(stage.upscales), materials.device)
        upscaled = {"upscales": config.sha256}
    models = Models(denoiser, generator)
    work = Work(stage, models, ode, loader, materials, seed, threading.Lock(), threading.Event())
    devices = devices_of(stage, work.device, team.size)
    copies = {d: models if d == work.device else copy.deepcopy(models).to(d) for d in dict.fromkeys(devices)}
    works = [replace(work, models=copies[device]) for device in devices]
    starts = range(0, stage.n, stage.shard)
    all_of = ((shard_path(folder, i), start, min(start + stage.shard, stage.n)) for i, start in enumerate(starts))
    jobs = team.alone(lambda: [job for job in all_of if read_shard(job[0]) is None])
    speed = make(stage.name, works, jobs, team)
    loader.bad.share(team)
    made = team.alone(lambda: _describe(work, folder, parent, len(starts), upscaled))
    return {
        "images": stage.n,
        **made,
        **({"images_per_second": speed} if speed else {}),
        "bad_files": len(loader.bad),
        "bad_report": loader.bad.report(),
    }


def _describe(work: Work, folder: Path, parent: Parent, shards: int, upscaled: dict[str, str]) -> dict[str, Any]:
    """Write `pairs.json`: what made the pairs, what their latents look like, what is lost on the way and back."""
    stage, materials, ode, side = work.stage, work.materials, work.ode, work.denoiser.resolution
    pairs, some = 0, []
    for i in range(shards):
        shard = read_shard(shard_path(folder, i))
        assert shard is not None  # it was made or read just now
        some.append(shard["latent"][: max(0, DESCRIBED - pairs)].clone())  # a copy, so that the shard is freed
        pairs += len(shard["latent"])
    logger.info("%s: %d pairs; measuring a round trip of %d images", stage.name, pairs, min(CHECKED, stage.n))
    images, captions, origin, checked = next(work.batches(0, min(CHECKED, stage.n)))
    denoise = work.denoise(materials.cond(captions), work.weights(checked, origin))
    solver: dict[str, Any] = {"sampler": stage.sampler, "steps": stage.steps, "guidance": stage.guidance}
    if stage.interval is not None:
        solver["interval"] = stage.interval
    facts: dict[str, Any] = {
        "format": FORMAT,
        "teacher": parent.config.sha256,
        "keeps": kept_in(parent.config.lineage),
        "direction": stage.direction,
        **upscaled,
        "solver": solver,
        "resolution": [side, side],
        "data": materials.data.mixture(stage).describe(),
        "pairs": pairs,
        "shards": shards,
        "latents": spread(torch.cat(some)),
        "round_trip_psnr": ode.round_trip(denoise, images.to(materials.device)),
    }
    write_json(folder / INDEX, facts)
    for band, numbers in facts["latents"].items():
        logger.info("latents, %s: %s", band, ", ".join(f"{k} {v:g}" for k, v in numbers.items()))
    psnrs = ", ".join(f"{v:g} dB from sigma {k}" for k, v in facts["round_trip_psnr"].items())
    logger.info("round trip: %s", psnrs)
    return {
        "pairs": pairs,
        "bytes_per_pair": sum(shard_path(folder, i).stat().st_size for i in range(shards)) / pairs,
        "latents": facts["latents"],
        "round_trip_psnr": facts["round_trip_psnr"],
    }
