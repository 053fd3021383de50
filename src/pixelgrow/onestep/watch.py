"""What is looked at while a one-step generator trains: pictures in rows, reconstruction, prior holes, drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pixelgrow.diffusion.generator import Generator
from pixelgrow.diffusion.sampling import weights_like
from pixelgrow.models.cond import Cond
from pixelgrow.models.layers import box_down
from pixelgrow.onestep.features import TeacherFeatures
from pixelgrow.onestep.pairs import psnr


@dataclass(frozen=True)
class Watched:
    """Held-out pictures `images` (N, 3, H, W) under `cond` with their latents (N, 3, h, w), as many `prior` latents,
    and what the teacher draws from those, `solved` (n, 3, h, w), for the first n. Latents and solutions are made with
    the guidance weight of the pairs; `guidance`: the same weight, where the generator is told it."""

    images: Tensor
    cond: Cond
    latents: Tensor
    prior: Tensor
    solved: Tensor
    guidance: float | None = None


class Watch:
    """Looks at a generator; each look is a pure function of its weights."""

    def __init__(self, generator: Generator, features: TeacherFeatures, watched: Watched, batch: int) -> None:
        self.generator, self.features, self.watched, self.batch = generator, features, watched, batch
        self.data = self._pooled(watched.images)

    def grid(self, columns: int = 8) -> Tensor:
        """Four rows of `columns` pictures: the teacher's solution, the prior sample from the same latent, a
        reconstruction, and the held-out picture that it reconstructs."""
        w, n, k = self.watched, columns, self.generator.resolution // self.watched.solved.shape[-1]
        solved = w.solved[:n].repeat_interleave(k, 2).repeat_interleave(k, 3)
        return torch.cat([solved, self._draw(w.prior[:n]), self._draw(w.latents[:n]), w.images[:n]])

    def numbers(self, _: int = 0) -> Mapping[str, float]:
        """`rec_psnr` of held-out pictures; `solved_psnr` of prior samples against the teacher's solutions, box-downed;
        `prior_distance` and `rec_distance`: energy distances to held-out pictures in the teacher's features, of prior
        samples and of reconstructions (a prior hole is where the first is much the larger); `drift_psnr`: of a grown
        generator's box-downed prior samples against what its base draws."""
        w = self.watched
        rec, prior = self._draw(w.latents), self._draw(w.prior)
        k = self.generator.resolution // w.solved.shape[-1]
        found = {
            "rec_psnr": psnr(rec, w.images),
            "solved_psnr": psnr(box_down(prior[: len(w.solved)], k), w.solved),
            "prior_distance": energy_distance(self._pooled(prior), self.data),
            "rec_distance": energy_distance(self._pooled(rec), self.data),
        }
        if self.generator.resolution > self.generator.latent_resolution:
            found["drift_psnr"] = self.drift()
        return found

    @torch.no_grad()
    def drift(self) -> float:
        """PSNR of box_down(G_high(z)) against G_low(z), of one and the same evaluation's rungs, in dB."""
        high, low = [], []
        for rows in self._rows(self.watched.prior):
            z = self.watched.prior[rows]
            rungs = list(self.generator.rungs(z, self.watched.cond[rows], weights_like(z, self.watched.guidance)))
            low.append(next(r.image for r in rungs if r.image.shape[-1] == self.generator.latent_resolution))
            high.append(box_down(rungs[-1].image, rungs[-1].image.shape[-1] // low[-1].shape[-1]))
        return psnr(torch.cat(high), torch.cat(low))

    @torch.no_grad()
    def _draw(self, latents: Tensor) -> Tensor:
        drawn = []
        for rows in self._rows(latents):
            z = latents[rows]
            drawn.append(self.generator(z, self.watched.cond[rows], weights_like(z, self.watched.guidance)))
        return self.generator.space.bound(torch.cat(drawn).float())

    @torch.no_grad()
    def _pooled(self, images: Tensor) -> Tensor:
        """The teacher's last tokens of each picture as a whole, averaged: (N, C)."""
        found = []
        for rows in self._rows(images):
            middle = images.new_full((len(images[rows]), 2), 0.5)
            tokens = self.features(images[rows], self.watched.cond[rows], middle).tokens
            found.append(tokens[len(self.features.layers) - 1].mean(1))
        return torch.cat(found)

    def _rows(self, of: Tensor) -> list[slice]:
        return [slice(start, min(start + self.batch, len(of))) for start in range(0, len(of), self.batch)]


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Energy distance of two samples (N, C): 2 E|a - b| - E|a - a'| - E|b - b'| (Szekely & Rizzo, 2013), each mean over
    rows of different numbers, since rows of one number share a caption; about 0 for samples of one distribution."""
    a, b = a.double(), b.double()
    off = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    across, *within = (torch.cdist(x, y)[off].mean() for x, y in ((a, b), (a, a), (b, b)))
    return float(2 * across - within[0] - within[1])
