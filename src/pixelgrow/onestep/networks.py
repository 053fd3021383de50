"""The feature networks that a generator's losses use, by their settings: the teacher, or frozen models from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pixelgrow.external.vision import Clip, Lpips, describe, describe_clip, describe_lpips, load_clip, load_vision
from pixelgrow.models.cond import Cond
from pixelgrow.onestep.features import Distance, FeatureDistance, Features, VisionFeatures
from pixelgrow.onestep.losses import similarity_loss
from pixelgrow.onestep.settings import LossSettings
from pixelgrow.text.cut import Cut, cut_in


@dataclass(frozen=True)
class FeatureNetworks:
    """`features`: of the discriminator. `distance`: for reconstruction. `similarity`: of images and captions."""

    features: Features
    distance: Distance
    similarity: ClipSimilarity | None


def networks_named(losses: LossSettings) -> dict[str, str]:
    """Names of the outside models that losses use, by their part of the losses."""
    named: dict[str, str] = {}
    if losses.features and losses.distance != "teacher":
        named["distance"] = losses.distance
    if losses.adversarial and losses.discriminator != "teacher":
        named["discriminator"] = losses.discriminator
    if losses.similarity and losses.similarity.weight:
        named["similarity"] = losses.similarity.model
    return named


def networks_used(losses: LossSettings) -> dict[str, str]:
    """`networks_named` with their fingerprints, for records. No weight is loaded.

    Raises UserError if one of them cannot be found.
    """

    def used(part: str, name: str) -> str:
        if (part, name) == ("distance", "lpips"):
            return describe_lpips()
        return f"{name} {(describe_clip if part == 'similarity' else describe)(name).fingerprint}"

    return {part: used(part, name) for part, name in networks_named(losses).items()}


def load_networks(losses: LossSettings, teacher: Features, device: torch.device | str = "cpu") -> FeatureNetworks:
    """Load the feature networks of losses, each model once. Raises UserError."""

    @cache
    def named(name: str) -> Features:
        return teacher if name == "teacher" else VisionFeatures(load_vision(name, device), teacher)

    features = named(losses.discriminator if losses.adversarial else "teacher")
    distance: Distance
    if losses.features and losses.distance == "lpips":
        distance = LpipsDistance(Lpips(device))
    else:
        distance = FeatureDistance(named(losses.distance if losses.features else "teacher"))
    wanted = losses.similarity
    similarity = ClipSimilarity(load_clip(wanted.model, device)) if wanted and wanted.weight else None
    return FeatureNetworks(features, distance, similarity)


class LpipsDistance:
    """LPIPS as a distance; it takes no condition and no crop."""

    def __init__(self, lpips: Lpips) -> None:
        self.lpips = lpips

    def __call__(self, images: Tensor, target: Tensor, cond: Cond, crop: Tensor) -> Tensor:
        return self.lpips(images, target)


class ClipSimilarity:
    """`similarity_loss` of images and captions, by the embeddings of a CLIP."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        return similarity_loss(self.clip.images(images), self.clip.texts(texts))

    def cut(self, texts: Sequence[str]) -> Cut:
        """Which of some distinct captions are longer than the CLIP reads."""
        return cut_in(self.clip.tokenizer, texts, self.clip.longest)
