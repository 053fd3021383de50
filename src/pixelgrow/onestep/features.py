"""Features and distances of images: the frozen teacher's own tokens, the default that needs nothing from outside, or
those of a vision model."""

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

SIGMA = 0.3  # noise level, as the core sees it, that the teacher is told of images that have none


@dataclass(frozen=True)
class Seen:
    """`tokens`: features (B, N, C) of each view and layer; `vec` (B, C): the condition as the teacher embeds it."""

    tokens: list[Tensor]
    vec: Tensor


class Embeds(Protocol):
    """Embeds conditions: a teacher."""

    @property
    def vec_width(self) -> int: ...
    def vec(self, cond: Cond, /) -> Tensor: ...


class Features(Embeds, Protocol):
    """What a discriminator, a distance or a watch asks of features.

    widths: channels of each of the token tensors that images of a resolution give. A call takes images (B, 3, H, W) in
    [-1, 1], their conditions, and crop (B, 2) in [0, 1): where a part begins, of the slack in y and x.
    """

    def widths(self, resolution: int, /) -> list[int]: ...
    def __call__(self, images: Tensor, cond: Cond, crop: Tensor, /) -> Seen: ...


class TeacherFeatures:
    """Tokens of a teacher's core as features of images, for distances and for a discriminator.

    Ours, where the papers use DeiT, EfficientNet, DINO or LPIPS: no other network is needed, and the tokens attend to
    the caption (as in latent adversarial diffusion distillation, arXiv 2403.12015). Images larger than the teacher's
    core was made for are seen twice: box-downed as a whole, and a part of it at full resolution, wherever `crop` says.
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

    def __call__(self, images: Tensor, cond: Cond, crop: Tensor) -> Seen:
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
        return Seen(tokens, ctx.vec)


class VisionFeatures:
    """Hidden states of a vision model from outside (DINOv2, CLIP, any of transformers') as features of images.

    PaGoDA (arXiv 2405.14822) has DINO and others; which layers is ours. The model knows no captions: a discriminator
    is told the condition as the teacher embeds it. Images larger than the model was made for are seen twice, as by
    `TeacherFeatures`; the whole is resized with antialiasing, and smaller ones are enlarged.
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

    def __call__(self, images: Tensor, cond: Cond, crop: Tensor) -> Seen:
        tokens = self.vision(images)
        if images.shape[-1] > self.side:
            tokens += self.vision(cropped(images, self.side, crop))
        return Seen(tokens, self.vec(cond))


def cropped(images: Tensor, side: int, at: Tensor) -> Tensor:
    """A part (B, C, side, side) of each image, beginning at fraction `at` (B, 2) of the slack in y and x."""
    for dim, u in ((2, at[:, 0]), (3, at[:, 1])):
        corner = integers(u, images.shape[dim] - side + 1)
        rows = corner[:, None] + torch.arange(side, device=corner.device)  # (B, side)
        images = images.take_along_dim(rows[:, None, :, None] if dim == 2 else rows[:, None, None, :], dim)
    return images


class Distance(Protocol):
    """`(images, target, cond, crop) -> (B,)`: how far images (B, 3, H, W) are from others of the same conditions."""

    def __call__(self, images: Tensor, target: Tensor, cond: Cond, crop: Tensor, /) -> Tensor: ...


class FeatureDistance:
    """The distance of images by their features, differentiable in the first images."""

    def __init__(self, features: Features) -> None:
        self.features = features

    def __call__(self, images: Tensor, target: Tensor, cond: Cond, crop: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(target, cond, crop).tokens
        return feature_distance(self.features(images, cond, crop).tokens, wanted)
