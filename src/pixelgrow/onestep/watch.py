"""Validation of a one-step generator while it trains: reconstruction, prior holes, drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pixelgrow.diffusion.generator import Generator
from pixelgrow.diffusion.guidance import exact_factors
from pixelgrow.diffusion.sampling import weights_like
from pixelgrow.models.cond import Cond
from pixelgrow.models.layers import box_down
from pixelgrow.onestep.features import TeacherFeatures
from pixelgrow.onestep.pairs import psnr


@dataclass(frozen=True)
class Watched:
    """What a generator is validated on.

    images: (N, 3, H, W) held out. cond: their N conditions. latents: (N, 3, h, w), the teacher's latents of them.
    prior: (N, 3, h, w) prior samples. solved: (n, 3, h, w), the teacher's images from the first n of those.
    Latents and solutions are made with the guidance weight of the pairs. guidance: that weight, for a generator that is
    conditioned on it; else None.
    """

    images: Tensor
    cond: Cond
    latents: Tensor
    prior: Tensor
    solved: Tensor
    guidance: float | None = None


class Watch:
    """Validates a generator; images and numbers are pure functions of its weights."""

    def __init__(self, generator: Generator, features: TeacherFeatures, watched: Watched, batch: int) -> None:
        self.generator, self.features, self.watched, self.batch = generator, features, watched, batch
        self.data = self._pooled(watched.images)

    def numbers(self, _: int = 0) -> Mapping[str, float]:
        """Metrics by name.

        rec_psnr         of reconstructions of held-out images
        solved_psnr      of prior samples, box-downed, against the teacher's images from the same latents
        prior_distance   energy distance of prior samples to held-out images, in the teacher's features
        rec_distance     the same of reconstructions; far less than `prior_distance` means a prior hole
        drift_psnr       of a grown generator: see `drift`

        Distances need two held-out images or more.
        """
        w = self.watched
        rec, prior = self.generate(w.latents, w.cond), self.generate(w.prior, w.cond)
        k = self.generator.resolution // w.solved.shape[-1]
        found = {
            "rec_psnr": psnr(rec, w.images),
            "solved_psnr": psnr(box_down(prior[: len(w.solved)], k), w.solved),
        }
        if len(self.data) > 1:
            found["prior_distance"] = energy_distance(self._pooled(prior), self.data)
            found["rec_distance"] = energy_distance(self._pooled(rec), self.data)
        if self.generator.resolution > self.generator.latent_resolution:
            found["drift_psnr"] = self.drift()
        return found

    @torch.no_grad()
    def drift(self) -> float:
        """PSNR in dB of box_down(G_high(z)) against G_low(z), rungs of the same evaluation, for prior samples z."""
        high, low = [], []
        for rows in self._rows(self.watched.prior):
            z = self.watched.prior[rows]
            rungs = list(self.generator.rungs(z, self.watched.cond[rows], weights_like(z, self.watched.guidance)))
            low.append(next(r.image for r in rungs if r.image.shape[-1] == self.generator.latent_resolution))
            high.append(box_down(rungs[-1].image, rungs[-1].image.shape[-1] // low[-1].shape[-1]))
        return psnr(torch.cat(high), torch.cat(low))

    @torch.no_grad()
    def generate(self, latents: Tensor, cond: Cond) -> Tensor:
        """The generator's images (N, 3, H, W) from latents (N, 3, h, w), with the guidance weight of the pairs."""
        images = []
        for rows in self._rows(latents):
            z = latents[rows]
            images.append(self.generator(z, cond[rows], weights_like(z, self.watched.guidance)))
        return self.generator.space.bound(torch.cat(images).float(), exact_factors(self.generator))

    @torch.no_grad()
    def _pooled(self, images: Tensor) -> Tensor:
        """The teacher's last tokens of each whole image, averaged: (N, C)."""
        found = []
        for rows in self._rows(images):
            middle = images.new_full((len(images[rows]), 2), 0.5)
            tokens = self.features(images[rows], self.watched.cond[rows], middle).tokens
            found.append(tokens[len(self.features.layers) - 1].mean(1))
        return torch.cat(found)

    def _rows(self, of: Tensor) -> list[slice]:
        return [slice(start, min(start + self.batch, len(of))) for start in range(0, len(of), self.batch)]


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Energy distance of two samples (N, C), N > 1: 2 E|a - b| - E|a - a'| - E|b - b'| (Szekely & Rizzo, 2013).

    It is about 0 for samples of one distribution. Rows of the same number share a caption, so all three means are over
    pairs of rows with different numbers.
    """
    a, b = a.double(), b.double()
    off = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    across, *within = (torch.cdist(x, y)[off].mean() for x, y in ((a, b), (a, a), (b, b)))
    return float(2 * across - within[0] - within[1])
