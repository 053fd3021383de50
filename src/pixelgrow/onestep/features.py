"""Features of images and distances by them: tokens of the frozen teacher, the default, or of a vision model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pixelgrow.diffusion.denoiser import Denoiser, coefficients, column
from pixelgrow.external.vision import Vision, layers_of
from pixelgrow.models.cond import Cond
from pixelgrow.models.core import Context
from pixelgrow.models.layers import box_down
from pixelgrow.onestep.losses import feature_distance, integers

SIGMA = 0.3  # (core units) given to the teacher when it extracts features of clean images


@dataclass(frozen=True)
class FeatureOutput:
    """`tokens`: features (B, N, C) of each view and layer; `vec` (B, C): the condition, embedded by the teacher."""

    tokens: list[Tensor]
    vec: Tensor


class Embeds(Protocol):
    """A teacher, as the embedder of conditions."""

    @property
    def vec_width(self) -> int: ...
    def vec(self, cond: Cond, /) -> Tensor: ...


class Features(Embeds, Protocol):
    """A feature network, as discriminators and distances use it.

    widths: channels of each tensor of tokens, for images of a resolution. A call takes images (B, 3, H, W) in [-1, 1],
    their conditions, and `crop` (B, 2) in [0, 1): the place of a crop, see `cropped`.
    """

    def widths(self, resolution: int, /) -> list[int]: ...
    def __call__(self, images: Tensor, cond: Cond, crop: Tensor, /) -> FeatureOutput: ...


class TeacherFeatures:
    """Tokens of a teacher's core as features of images, for distances and for a discriminator.

    Ours, where the papers use DeiT, EfficientNet, DINO or LPIPS: no other network is needed, and the tokens attend to
    the caption (as in latent adversarial diffusion distillation, arXiv 2403.12015). Images larger than those of the
    core give two views: the whole image, box-downed, and a crop at full resolution.
    """

    def __init__(self, teacher: Denoiser) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.layers = layers_of(teacher.net.config.core.depth)
        self.side = teacher.net.config.rungs[0].resolution

    @property
    def vec_width(self) -> int:
        return self.teacher.net.config.core.width

    def widths(self, resolution: int) -> list[int]:
        return [self.vec_width] * len(self.layers) * (1 if resolution == self.side else 2)

    def vec(self, cond: Cond) -> Tensor:
        return self._context(cond).vec

    def _context(self, cond: Cond) -> Context:
        sigma = torch.full((len(cond),), SIGMA, device=cond.null.device)
        return self.teacher.net.embed(torch.log(sigma) / 4, cond)

    def __call__(self, images: Tensor, cond: Cond, crop: Tensor) -> FeatureOutput:
        net, config = self.teacher.net, self.teacher.config
        rung = net.config.rungs[0]
        k = images.shape[-1] // self.side
        views = [box_down(images, k)] + ([cropped(images, self.side, crop)] if k > 1 else [])
        ctx = self._context(cond)
        scale = self.side / net.config.core_resolution
        sigma = images.new_full((len(images),), SIGMA)
        c_in = column(coefficients(config.prediction, sigma * scale, config.sigma_data)[2])
        tokens = []
        for view in views:
            h, _ = net.encode(rung, c_in * view, ctx)
            size = (h.shape[-2], h.shape[-1])
            after = net.core.layers(h.permute(0, 2, 3, 1).flatten(1, 2), size, ctx)
            tokens += [t for number, t in enumerate(after, 1) if number in self.layers]
        return FeatureOutput(tokens, ctx.vec)


class VisionFeatures:
    """Hidden states of a vision model (EfficientNet-Lite0, DINOv2, CLIP, any of transformers') as features of images.

    PaGoDA (arXiv 2405.14822) uses DINO, DeiT and EfficientNet-Lite0; the choice of layers is ours. The model reads no
    captions: the discriminator receives the condition as the teacher embeds it. The whole image is resized to the
    model's size with antialiasing; a larger one gives a second view, a crop at full resolution.
    """

    def __init__(self, vision: Vision, teacher: Embeds) -> None:
        self.vision, self.teacher, self.side = vision, teacher, vision.spec.side

    @property
    def vec_width(self) -> int:
        return self.teacher.vec_width

    def widths(self, resolution: int) -> list[int]:
        return self.vision.widths * (1 if resolution <= self.side else 2)

    def vec(self, cond: Cond) -> Tensor:
        return self.teacher.vec(cond)

    def __call__(self, images: Tensor, cond: Cond, crop: Tensor) -> FeatureOutput:
        tokens = self.vision(images)
        if images.shape[-1] > self.side:
            tokens += self.vision(cropped(images, self.side, crop))
        return FeatureOutput(tokens, self.vec(cond))


def cropped(images: Tensor, side: int, at: Tensor) -> Tensor:
    """A crop (B, C, side, side) of each image; `at` (B, 2) in [0, 1) is its place: 0 top or left, 1 bottom or right."""
    for dim, u in ((2, at[:, 0]), (3, at[:, 1])):
        corner = integers(u, images.shape[dim] - side + 1)
        rows = corner[:, None] + torch.arange(side, device=corner.device)  # (B, side)
        images = images.take_along_dim(rows[:, None, :, None] if dim == 2 else rows[:, None, None, :], dim)
    return images


class Distance(Protocol):
    """`(images, target, cond, crop) -> (B,)`: how far images (B, 3, H, W) are from targets of the same conditions."""

    def __call__(self, images: Tensor, target: Tensor, cond: Cond, crop: Tensor, /) -> Tensor: ...


class FeatureDistance:
    """The distance of images by their features, differentiable in the images, not in the targets."""

    def __init__(self, features: Features) -> None:
        self.features = features

    def __call__(self, images: Tensor, target: Tensor, cond: Cond, crop: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(target, cond, crop).tokens
        return feature_distance(self.features(images, cond, crop).tokens, wanted)
