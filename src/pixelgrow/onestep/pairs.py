"""Data-latent pairs: images, each with its latent by a teacher's ODE (PaGoDA, arXiv 2405.14822, section 3.1).

Pairs are a folder of shards `00000.safetensors`, ... A shard of N pairs holds

    latent    (N, 3, h, w) float16, of unit variance for a perfect teacher
    origin    (N, 3) int64: source number, sample number, mirrored; (N, 4) with the number of the caption where samples
              have several
    image     (N, 3, h, w) float16, of sampled pairs; images of inverted ones stay in the data
    guidance  (N,) float32, where each pair has a guidance weight of its own

Sampled pairs may be a one-step generator's images, upscaled by the teacher: their details then belong to the very
images that a growth of this generator adds details to.

It is written whole or not at all, with a checksum. `pairs.json` records what made the pairs.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pixelgrow.diffusion.progressive import floors_of, progressive, upscaling
from pixelgrow.diffusion.sampling import karras_grid
from pixelgrow.diffusion.solvers import Denoise, invert, solve
from pixelgrow.errors import UserError
from pixelgrow.models.layers import box_down, up_nearest
from pixelgrow.onestep.losses import GuidanceDistribution
from pixelgrow.precision import tf32
from pixelgrow.writing import atomic, fault_of

FORMAT = 1
INDEX = "pairs.json"
Direction = Literal["invert", "sample"]


@dataclass(frozen=True)
class Ode:
    """The solver that joins images and latents, on Karras' noise levels.

    An image is taken as the state at the lowest level and no noise is added, as in the released code. That step costs
    no evaluation, so Heun's method on 40 levels takes 78 from image to latent; from latent to image it takes 79, the
    paper's count.
    """

    sampler: str
    steps: int
    sigma_min: float
    sigma_max: float

    @property
    def sigmas(self) -> Tensor:
        """The falling grid (steps + 1,), from sigma_max to 0."""
        return karras_grid(self.steps, self.sigma_min, self.sigma_max)

    @tf32()
    def to_latent(self, denoise: Denoise, x: Tensor, each: Callable[[], None] | None = None) -> Tensor:
        """Images (B, 3, h, w) -> latents of about unit variance. `each` is called after each step."""
        return progressive(floors_of(denoise), x, self.sigmas.flip(0), self.sampler, each) / self.sigma_max

    @tf32()
    def to_image(
        self, denoise: Denoise, z: Tensor, each: Callable[[], None] | None = None, low: Tensor | None = None
    ) -> Tensor:
        """Latents (B, 3, h, w) -> images. `each` is called after each step.

        low: images (B, 3, h/k, w/k) that the results average down to; an exact model adds the details alone (ours).
        """
        floors = floors_of(denoise)
        if low is not None:
            floors = upscaling(floors, low, z.shape[-1])
        return progressive(floors, self.sigma_max * z, self.sigmas, self.sampler, each)

    @torch.no_grad()
    @tf32()
    def round_trip(
        self, denoise: Denoise, x: Tensor, parts: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
    ) -> dict[str, float]:
        """PSNR in dB of images (B, 3, h, w) that are inverted to a noise level and solved back: {noise level: dB}.

        parts: the noise levels, as parts of the grid from the image on.
        """
        sigmas, found = self.sigmas, {}
        for part in parts:
            grid = sigmas[round((1 - part) * (len(sigmas) - 2)) :]
            back = solve(denoise, invert(denoise, x, grid, self.sampler), grid, self.sampler)
            found[f"{float(grid[0]):.3g}"] = round(psnr(back, x), 2)
        return found


def reduced(latents: Tensor, side: int) -> Tensor:
    """Latents (B, C, h, w) of a grown teacher as those (B, C, side, side) of the model that it was grown from.

    They are averages, scaled to unit variance. A model that was grown with `preserve` passes the averages of its noise
    to its core, so both models make the same image but for details.
    """
    k = latents.shape[-1] // side
    return k * box_down(latents, k)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], over all pixels of all images."""
    return float(10 * torch.log10(4 / (a.double() - b.double()).square().mean()))


def spread(latents: Tensor) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and kurtosis of latents (N, 3, h, w) by frequency band: {"1 px": {...}, "2 px": ...}.

    The bands are Haar's, scaled so that standard normal noise has deviation 1 and kurtosis 3 in each. A deviation
    below 1 is a prior hole: the latents of the data lie in a shell that prior samples miss.
    """
    found, k, low = {}, 1, latents.double()
    while min(low.shape[-2:]) > 1 and low.shape[-1] % 2 == low.shape[-2] % 2 == 0:
        down = box_down(low, 2)
        found[f"{k} px"] = _moments((low - up_nearest(down, 2)) * (4 / 3) ** 0.5)
        low, k = 2 * down, 2 * k
    return found | {f"{k} px and above": _moments(low)}


def _moments(x: Tensor) -> dict[str, float]:
    mean, std = x.mean(), x.std(correction=0)
    kurtosis = ((x - mean) / std).pow(4).mean()
    return {"mean": round(float(mean), 4), "std": round(float(std), 4), "kurtosis": round(float(kurtosis), 3)}


# --- shards -----------------------------------------------------------------------------------------------------------


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a shard whole or not at all. Raises UserError if the disk is full."""
    with atomic(path) as part:
        save_file(tensors, part, metadata={"crc32": str(_checksum(tensors))})


def read_shard(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a shard, memory-mapped; None if it is missing, cut off or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            crc = (file.metadata() or {}).get("crc32")
    except (OSError, SafetensorError):
        return None
    return tensors if crc == str(_checksum(tensors)) else None


def shard_fault(path: Path, remedy: str) -> str:
    """What is wrong with a shard for which `read_shard` gave None, and what to do; to be put after the file's name."""
    return fault_of(path, remedy) or f"is damaged (its checksum is wrong): {remedy}"


def _checksum(tensors: dict[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data, crc)  # no copy is made
    return crc


class Rows:
    """The first `count` rows of memory-mapped tensors (n, ...), one after the other, as one tensor (N, ...).

    `rows[numbers]` reads only those rows into memory.
    """

    def __init__(self, parts: Sequence[Tensor], count: int) -> None:
        self.parts = parts
        self._starts = list(accumulate((len(part) for part in parts), initial=0))
        self.shape = torch.Size([min(count, self._starts[-1]), *parts[0].shape[1:]])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, numbers: Sequence[int] | range) -> Tensor:
        """The rows (B, ...) of some numbers in [0, N)."""
        at = [bisect(self._starts, number) - 1 for number in numbers]
        return torch.stack([self.parts[i][n - self._starts[i]] for i, n in zip(at, numbers, strict=True)])


class Pairs:
    """A finished folder of pairs, to train on. Latents and images stay on disk.

    facts: the content of `pairs.json`. distribution: of the pairs' guidance weights; None if all have the same weight.
    fraction: the part of the pairs to use, the first ones; 1% is enough in PaGoDA.
    Raises UserError if something is missing or damaged.
    """

    def __init__(self, folder: Path, fraction: float = 1.0) -> None:
        path = folder / INDEX
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            form, direction, shards = facts["format"], facts["direction"], int(facts["shards"])
            guidance: GuidanceDistribution | float = facts["solver"]["guidance"]
        except FileNotFoundError:
            raise UserError(f"{folder} holds no finished pairs: it has no {INDEX}; run the pairs stage first") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is damaged ({type(error).__name__}); delete {folder / 'stage.json'} and run the recipe again: "
                "shards that are whole are kept"
            ) from None
        if form != FORMAT:
            raise UserError(f"{path}: got format {form}, expected {FORMAT}; make the pairs again")
        if direction not in get_args(Direction):
            known = " or ".join(get_args(Direction))
            raise UserError(f"{path}: got direction {direction!r}, expected {known}; make the pairs again")
        self.facts: dict[str, Any] = facts
        self.direction: Direction = direction
        first = max(1, round(fraction * int(self.facts["pairs"])))
        parts: list[dict[str, Tensor]] = []
        for number in range(shards):
            if sum(len(p["latent"]) for p in parts) >= first:
                break
            shard = read_shard(shard_path(folder, number))
            if shard is None:
                file = shard_path(folder, number)
                remedy = f"delete {folder / 'stage.json'} and run the recipe again: that shard alone is made anew"
                raise UserError(f"{file} {shard_fault(file, remedy)}")
            parts.append(shard)

        self.latents = Rows([p["latent"] for p in parts], first)  # (N, 3, h, w) float16
        self.images = Rows([p["image"] for p in parts], first) if self.direction == "sample" else None
        self.origins = torch.cat([p["origin"] for p in parts])[:first]  # (N, 3 or 4) int64
        self.distribution: GuidanceDistribution | None = guidance if isinstance(guidance, str) else None
        self.guidance = torch.cat([p["guidance"] for p in parts])[:first] if self.distribution else None  # (N,) float32

    def __len__(self) -> int:
        return len(self.latents)

    def check(self, teachers: Sequence[str], data: Sequence[dict[str, Any]]) -> None:
        """Raise UserError if the pairs are of another teacher or of other data.

        teachers: hashes of the teachers to accept; pairs of a model that was grown from one and keeps it are accepted
        too. data: descriptions of the sources.
        """
        if not {self.facts["teacher"], *self.facts.get("keeps", [])} & set(teachers):
            raise UserError(
                f"the pairs are of the teacher {self.facts['teacher'][:12]}, this model comes from "
                f"{', '.join(t[:12] for t in teachers) or 'no teacher'}: make pairs with this model's teacher"
            )
        was, now = ([s["fingerprint"] for s in of] for of in (self.facts["data"], data))
        if was != now:
            raise UserError(
                f"the pairs were made of other data ({', '.join(s['source'] for s in self.facts['data'])}, "
                f"now {', '.join(s['source'] for s in data)}; files may have changed): make the pairs again"
            )
