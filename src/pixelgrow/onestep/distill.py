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
from pixelgrow.models.cond import Cond, joined, to_device
from pixelgrow.models.discriminator import Discriminator
from pixelgrow.onestep.estimator import Labels
from pixelgrow.onestep.features import Distance, FeatureDistance, FeatureOutput, Features
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
from pixelgrow.pictures import to_float
from pixelgrow.training.denoise import Conditions
from pixelgrow.training.objective import Terms

GENERATOR, DISCRIMINATOR = "generator", "discriminator"


@dataclass(frozen=True)
class DistillBatch:
    """A batch of B real images, each with a pair.

    image: (B, 3, H, W) real images, as in a `Batch`. text: their captions.
    latent: (B, 3, h, w) and target: (B, 3, H, W), as `image` or in half precision: the pairs. target_text: the captions
    of their images.
    index: (B,) int64, positions in the training stream.
    guidance: (B,) guidance weights of the pairs, where each has its own; else None.
    caption: (B,) which of its image's captions each `text` is, for the distribution "mixed".
    cond, target_cond: conditions of `text` and `target_text`, where the stream has their encodings.
    """

    image: Tensor
    text: tuple[str, ...]
    index: Tensor
    latent: Tensor
    target: Tensor
    target_text: tuple[str, ...]
    guidance: Tensor | None = None
    caption: Tensor | None = None
    cond: Cond | None = None
    target_cond: Cond | None = None

    def __len__(self) -> int:
        return len(self.text)


class Similarity(Protocol):
    """`(images, captions) -> scalar`: how far images (B, 3, H, W) are from their captions; less is better."""

    def __call__(self, images: Tensor, texts: Sequence[str], /) -> Tensor: ...


class DistillObjective:
    """Losses of a generator and its discriminator, which are updated in turn.

    Prior samples and augmentations are functions of (seed, index). The discriminator sees frozen `features` of real
    and generated images with their captions. It also learns to reject real images with the caption of another
    (`losses.mismatched`, ours).

    distance: between generated images and those of their pairs; by `features` if None.
    similarity: of prior samples and captions, a regulariser; none if None.
    distribution: of the guidance weights of prior samples; None unless the generator is guided. A guided generator is
    conditioned on the weight of each pair, and on a random weight for each prior sample.
    labels: estimates the weights of real images, which a guided discriminator is conditioned on.
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
        """The loss that `modules[part]` descends on a batch."""
        return self._generator(batch) if part == GENERATOR else self._discriminator(batch)

    def _generator(self, batch: DistillBatch) -> Terms:
        s, n = self.losses, len(batch)
        target = to_float(to_device(batch.target, self.device))
        crop = self._uniform("crop", batch.index, 2)
        latent = to_device(batch.latent, self.device)
        guidance = None if batch.guidance is None else to_device(batch.guidance, self.device)
        if not s.adversarial and self.similarity is None:
            cond = self._cond(batch.target_cond, batch.target_text)
            images = self.generator(latent, cond, guidance)
            rec = at_output(images, lambda y: self._distance(y, target, cond, crop))
            return Terms(rec.loss, {"rec": rec.value})
        both = joined(self._cond(batch.target_cond, batch.target_text), self._cond(batch.cond, batch.text))
        first, cond = both[:n], both[n:]
        omega = self._weights(batch, GENERATOR)
        if guidance is not None and omega is not None:
            guidance = torch.cat([guidance, omega])
        images = self.generator(torch.cat([latent, self._prior(batch.index, GENERATOR)]), both, guidance)
        rec = at_output(images[:n], lambda y: self._distance(y, target, first, crop))
        loss = rec.loss
        logs: dict[str, Tensor | float] = {"rec": rec.value}
        if s.adversarial:
            draws = self._uniform("augment generator", batch.index, DRAWS + 2)
            adv = at_output(
                images[n:], lambda y: hinge_generator(self._logits(self._augmented_features(y, cond, draws), omega))
            )
            if s.balance == "fixed":
                loss, weight = rec.loss + s.scale * adv.loss, torch.tensor(s.scale)
            else:
                total = balanced(rec, adv, self.generator.last_layer, s.norms, s.scale)
                loss, weight = total.loss, total.weight
            logs |= {"adv": adv.value, "adv_weight": weight}
        if (similarity := self.similarity) is not None:
            assert s.similarity is not None
            alike = at_output(images[n:], lambda y: similarity(y, batch.text))
            loss, logs["similarity"] = loss + s.similarity.weight * alike.loss, alike.value
        return Terms(loss, logs)

    def _discriminator(self, batch: DistillBatch) -> Terms:
        n, mismatched = len(batch), self._mismatched(batch.text)
        rows, others = (to_device(torch.tensor(some, dtype=torch.int64), self.device) for some in mismatched)
        real = self._cond(batch.cond, batch.text)
        cond = joined(joined(real, real), real[others])
        draws = self._uniform("augment discriminator", batch.index, DRAWS + 2)
        with torch.no_grad():
            image, omega = to_float(to_device(batch.image, self.device)), self._weights(batch, DISCRIMINATOR)
            fake = self.generator(self._prior(batch.index, DISCRIMINATOR), cond[:n], omega)
            images, draws = torch.cat([image, fake, image[rows]]), torch.cat([draws, draws, draws[rows]])
            features = self._augmented_features(images, cond, draws)
            if omega is not None:
                assert self.labels is not None
                estimated = self.labels(image, cond[:n])
                omega = torch.cat([estimated, omega, estimated[rows]])
        logits = self._logits(features, omega)
        kept, rejected = [v[:n] for v in logits], [v[n:] for v in logits]
        groups = {"real": kept, "fake": [v[:n] for v in rejected], "mismatched": [v[n:] for v in rejected]}
        means: dict[str, Tensor | float] = {
            name: torch.stack([v.mean() for v in some]).mean().detach() for name, some in groups.items() if len(some[0])
        }
        return Terms(hinge_discriminator(kept, rejected), means)

    def _cond(self, cond: Cond | None, texts: Sequence[str]) -> Cond:
        """The conditions of a batch's captions, which it may have."""
        return (self.text.cond(texts) if cond is None else cond).to(self.device)

    def _mismatched(self, texts: Sequence[str]) -> tuple[list[int], list[int]]:
        """Rows of real images, and for each the row whose other caption it is to be rejected with."""
        if not self.losses.mismatched:
            return [], []
        pairs = ((i, (i + 1) % len(texts)) for i in range(len(texts)))
        other = [(i, j) for i, j in pairs if texts[i] != texts[j]]
        return [i for i, _ in other], [j for _, j in other]

    def _distance(self, images: Tensor, target: Tensor, cond: Cond, crop: Tensor) -> Tensor:
        """The reconstruction loss of images and those of their pairs, a scalar."""
        total = self.losses.pixels * (images - target).square().mean()
        if self.losses.features:
            total = total + self.losses.features * self.distance(images, target, cond, crop).mean()
        return total

    def _augmented_features(self, images: Tensor, cond: Cond, draws: Tensor) -> FeatureOutput:
        """Features of augmented images; draws (B, `DRAWS` + 2): for the augmentation, then for the crop."""
        return self.features(diff_augment(images, draws[:, :DRAWS], self.losses.augment), cond, draws[:, DRAWS:])

    def _logits(self, features: FeatureOutput, omega: Tensor | None) -> list[Tensor]:
        return self.discriminator(features.tokens, features.vec, omega)

    def _weights(self, batch: DistillBatch, part: str) -> Tensor | None:
        """Guidance weights (B,) of prior samples with a batch's captions."""
        if self.distribution is None:
            return None
        u = rng.uniform(self.seed, f"guidance {part}", batch.index)
        return to_device(guidance_weights(u, self.distribution, batch.caption).float(), self.device)

    def _prior(self, index: Tensor, part: str) -> Tensor:
        side = self.generator.latent_resolution
        shape = (space_of(self.generator).channels, side, side)
        return rng.normal(shape, self.seed, f"prior {part}", index, self.device)

    def _uniform(self, stream: str, index: Tensor, count: int) -> Tensor:
        """(B, count) in [0, 1), row b a function of (seed, stream, index[b])."""
        columns = [rng.uniform(self.seed, f"{stream} {i}", index) for i in range(count)]
        return to_device(torch.stack(columns, 1).float(), self.device)
