"""The objective of a one-step generator: reconstruct the pairs, look real on prior samples (PaGoDA, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pixelgrow import rng
from pixelgrow.diffusion.generator import Generator
from pixelgrow.diffusion.sampling import space_of
from pixelgrow.models.cond import Cond
from pixelgrow.models.discriminator import Discriminator
from pixelgrow.onestep.estimator import Labels
from pixelgrow.onestep.features import Distance, FeatureDistance, Features, Seen
from pixelgrow.onestep.losses import (
    DRAWS,
    GuidanceDistribution,
    at_output,
    balanced,
    diff_augment,
    guidance_weights,
    hinge_discriminator,
    hinge_generator,
)
from pixelgrow.onestep.outside import OutsideGenerator
from pixelgrow.onestep.settings import LossSettings
from pixelgrow.training.objective import Terms

GENERATOR, DISCRIMINATOR = "generator", "discriminator"


@dataclass(frozen=True)
class DistillBatch:
    """`image` (B, 3, H, W) real pictures of `text`; `latent` (B, 3, h, w) and the picture `target` (B, 3, H, W) of
    `target_text` that a pair joins it to; `index` (B,) int64, the positions in the training stream. `guidance` (B,):
    the weights that the pairs were made with, where each has its own. `caption` (B,): which of its picture's captions
    each `text` is, for the distribution "mixed"."""

    image: Tensor
    text: tuple[str, ...]
    index: Tensor
    latent: Tensor
    target: Tensor
    target_text: tuple[str, ...]
    guidance: Tensor | None = None
    caption: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)


class Conditions(Protocol):
    """Where captions' encodings come from: `text_cache.TextCache`."""

    def cond(self, texts: Sequence[str]) -> Cond:
        """The conditions of captions, on the CPU."""
        ...


class Similarity(Protocol):
    """`(images, captions) -> scalar`: how little images (B, 3, H, W) show of their captions."""

    def __call__(self, images: Tensor, texts: Sequence[str], /) -> Tensor: ...


class DistillObjective:
    """Generator and discriminator, updated in turn; prior samples and augmentations keyed by (seed, index).

    The discriminator looks at frozen `features` of real and drawn pictures under their captions, the teacher's or
    others; real ones under another's caption it is to refuse too (`losses.mismatched`, ours). `distance` to the
    pictures of pairs: by the same features if None; `similarity`: none if None. A guided generator is conditioned on
    the weight of each pair, and for prior samples on one of `distribution`; so is the discriminator, for real images on
    what `labels` estimate.
    """

    def __init__(
        self,
        generator: Generator | OutsideGenerator,
        features: Features,
        text: Conditions,
        losses: LossSettings,
        seed: int,
        distance: Distance | None = None,
        similarity: Similarity | None = None,
        distribution: GuidanceDistribution | None = None,
        labels: Labels | None = None,
    ) -> None:
        assert generator.guided == (distribution is not None)
        self.distance, self.similarity = distance or FeatureDistance(features), similarity
        self.distribution, self.labels = distribution, labels
        self.generator, self.features, self.text, self.losses, self.seed = generator, features, text, losses, seed
        self.device = next(generator.parameters()).device
        self.modules: dict[str, nn.Module] = {GENERATOR: generator}
        self.rates: Mapping[str, float] = {GENERATOR: 1.0, DISCRIMINATOR: losses.discriminator_rate}
        generator.train()
        if losses.adversarial:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(rng.seed_of(seed, "discriminator"))
                widths = features.widths(generator.resolution)
                made = Discriminator(widths, features.vec_width, guided=generator.guided)
            # A plan's tensors are fake, on the CPU, and cannot be moved.
            self.discriminator = made if self.device.type == "cpu" else made.to(self.device)
            self.modules[DISCRIMINATOR] = self.discriminator

    def loss(self, batch: DistillBatch, part: str) -> Terms:
        """The loss of a part on a batch; see the class."""
        return self._generator(batch) if part == GENERATOR else self._discriminator(batch)

    def _generator(self, batch: DistillBatch) -> Terms:
        s, n = self.losses, len(batch)
        target = batch.target.to(self.device)
        crop = self._uniform("crop", batch.index, 2)
        latent = batch.latent.to(self.device)
        told = None if batch.guidance is None else batch.guidance.to(self.device)
        if not s.adversarial and self.similarity is None:
            cond = self.text.cond(batch.target_text).to(self.device)
            drawn = self.generator(latent, cond, told)
            rec = at_output(drawn, lambda y: self._distance(y, target, cond, crop))
            return Terms(rec.loss, {"rec": rec.value})
        both = self.text.cond(batch.target_text + batch.text).to(self.device)
        first, cond = both[:n], both[n:]
        omega = self._weights(batch, GENERATOR)
        if told is not None and omega is not None:
            told = torch.cat([told, omega])
        drawn = self.generator(torch.cat([latent, self._prior(batch.index, GENERATOR)]), both, told)
        rec = at_output(drawn[:n], lambda y: self._distance(y, target, first, crop))
        loss = rec.loss
        logs: dict[str, Tensor | float] = {"rec": rec.value}
        if s.adversarial:
            draws = self._uniform("augment generator", batch.index, DRAWS + 2)
            adv = at_output(drawn[n:], lambda y: hinge_generator(self._verdict(self._see(y, cond, draws), omega)))
            if s.balance == "fixed":
                loss, weight = rec.loss + s.scale * adv.loss, torch.tensor(s.scale)
            else:
                made = balanced(rec, adv, self.generator.last_layer, s.norms, s.scale)
                loss, weight = made.loss, made.weight
            logs |= {"adv": adv.value, "adv_weight": weight}
        if (similarity := self.similarity) is not None:
            assert s.similarity is not None
            alike = at_output(drawn[n:], lambda y: similarity(y, batch.text))
            loss, logs["similarity"] = loss + s.similarity.weight * alike.loss, alike.value
        return Terms(loss, logs)

    def _discriminator(self, batch: DistillBatch) -> Terms:
        n, others = len(batch), self._others(batch.text)
        cond = self.text.cond((*batch.text, *batch.text, *(batch.text[j] for _, j in others))).to(self.device)
        draws = self._uniform("augment discriminator", batch.index, DRAWS + 2)
        with torch.no_grad():
            image, omega = batch.image.to(self.device), self._weights(batch, DISCRIMINATOR)
            fake = self.generator(self._prior(batch.index, DISCRIMINATOR), cond[:n], omega)
            rows = [i for i, _ in others]
            seen = self._see(torch.cat([image, fake, image[rows]]), cond, torch.cat([draws, draws, draws[rows]]))
            if omega is not None:
                assert self.labels is not None
                said = self.labels(image, cond[:n])
                omega = torch.cat([said, omega, said[rows]])
        verdict = self._verdict(seen, omega)
        real, drawn = [v[:n] for v in verdict], [v[n:] for v in verdict]
        groups = {"real": real, "fake": [v[:n] for v in drawn], "mismatched": [v[n:] for v in drawn]}
        means: dict[str, Tensor | float] = {
            name: torch.stack([v.mean() for v in some]).mean().detach() for name, some in groups.items() if len(some[0])
        }
        return Terms(hinge_discriminator(real, drawn), means)

    def _others(self, texts: Sequence[str]) -> list[tuple[int, int]]:
        """Rows of real pictures, each with the row whose caption it is shown under to be refused."""
        if not self.losses.mismatched:
            return []
        pairs = ((i, (i + 1) % len(texts)) for i in range(len(texts)))
        return [(i, j) for i, j in pairs if texts[i] != texts[j]]

    def _distance(self, images: Tensor, target: Tensor, cond: Cond, crop: Tensor) -> Tensor:
        """Scalar: how far pictures are from those of their pairs."""
        total = self.losses.pixels * (images - target).square().mean()
        if self.losses.features:
            total = total + self.losses.features * self.distance(images, target, cond, crop).mean()
        return total

    def _see(self, images: Tensor, cond: Cond, draws: Tensor) -> Seen:
        """What the discriminator sees of images; draws (B, `DRAWS` + 2): of the augmentation, and where to crop."""
        return self.features(diff_augment(images, draws[:, :DRAWS], self.losses.augment), cond, draws[:, DRAWS:])

    def _verdict(self, seen: Seen, omega: Tensor | None) -> list[Tensor]:
        return self.discriminator(seen.tokens, seen.vec, omega)

    def _weights(self, batch: DistillBatch, whose: str) -> Tensor | None:
        """Guidance weights (B,) of prior samples under a batch's captions."""
        if self.distribution is None:
            return None
        u = rng.uniform(self.seed, f"guidance {whose}", batch.index)
        return guidance_weights(u, self.distribution, batch.caption).float().to(self.device)

    def _prior(self, index: Tensor, whose: str) -> Tensor:
        side = self.generator.latent_resolution
        shape = (space_of(self.generator).channels, side, side)
        return rng.normal(shape, self.seed, f"prior {whose}", index, self.device)

    def _uniform(self, stream: str, index: Tensor, count: int) -> Tensor:
        """(B, count) in [0, 1), row b a function of (seed, stream, index[b])."""
        columns = [rng.uniform(self.seed, f"{stream} {i}", index) for i in range(count)]
        return torch.stack(columns, 1).float().to(self.device)
