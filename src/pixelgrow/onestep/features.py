"""Features of images: the frozen teacher's own tokens, the default that needs nothing from outside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pixelgrow.diffusion import Denoiser, coefficients, column
from pixelgrow.models.cond import Cond
from pixelgrow.models.layers import box_down

SIGMA = 0.3  # noise level, as the core sees it, that the teacher is told of images that have none
DEPTHS = (1 / 3, 2 / 3, 1.0)  # of the core's blocks whose tokens are features


@dataclass(frozen=True)
class Seen:
    """`tokens`: features (B, N, C) of each view and layer; `vec` (B, C): the condition as the teacher embeds it."""

    tokens: list[Tensor]
    vec: Tensor


class TeacherFeatures:
    """Tokens of a teacher's core as features of images, for distances and for a discriminator.

    Ours, where the papers use DeiT, EfficientNet, DINO or LPIPS: no other network is needed, and the tokens attend to
    the caption (as in latent adversarial diffusion distillation, arXiv 2403.12015). Images larger than the teacher's
    core was made for are seen twice: box-downed as a whole, and a part of it at full resolution, wherever `crop` says.
    """

    def __init__(self, teacher: Denoiser) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        depth = teacher.net.config.core.depth
        self.layers = sorted({max(1, round(part * depth)) for part in DEPTHS})
        self.side = teacher.net.config.rungs[0].resolution

    @property
    def width(self) -> int:
        return self.teacher.net.config.core.width

    def count(self, resolution: int) -> int:
        """How many token tensors images of a resolution give."""
        return len(self.layers) * (1 if resolution == self.side else 2)

    def __call__(self, images: Tensor, cond: Cond, crop: Tensor) -> Seen:
        """images (B, 3, H, W) in [-1, 1]; crop (B, 2) in [0, 1): where the part begins, of the slack in y and x."""
        net, config = self.teacher.net, self.teacher.config
        rung = net.config.rungs[0]
        k = images.shape[-1] // self.side
        views = [box_down(images, k)] + ([cropped(images, self.side, crop)] if k > 1 else [])
        sigma = images.new_full((len(images),), SIGMA)
        ctx = net.embed(torch.log(sigma) / 4, cond)
        scale = self.side / net.config.core_resolution
        c_in = column(coefficients(config.prediction, sigma * scale, config.sigma_data)[2])
        tokens = []
        for view in views:
            h, _ = net.encode(rung, c_in * view, ctx)
            size = (h.shape[-2], h.shape[-1])
            after = net.core.layers(h.permute(0, 2, 3, 1).flatten(1, 2), size, ctx)
            tokens += [t for number, t in enumerate(after, 1) if number in self.layers]
        return Seen(tokens, ctx.vec)


def cropped(images: Tensor, side: int, at: Tensor) -> Tensor:
    """A part (B, C, side, side) of each image, beginning at fraction `at` (B, 2) of the slack in y and x."""
    slack = torch.tensor([images.shape[-2] - side + 1, images.shape[-1] - side + 1])
    corners = (at.cpu() * slack).long().tolist()
    return torch.stack([x[:, y : y + side, z : z + side] for x, (y, z) in zip(images, corners, strict=True)])
