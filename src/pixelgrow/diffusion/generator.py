"""The one-step generator: `generator(z, cond) -> x0` in one network evaluation (PaGoDA, arXiv 2405.14822)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pixelgrow import rng
from pixelgrow.diffusion.denoiser import Denoiser, DiffusionConfig, RungImage
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import Space, exact_sides
from pixelgrow.models.layers import details, up_nearest
from pixelgrow.models.uvit import UViT


class Generator(nn.Module):
    """A denoiser evaluated once, at its highest noise level, with decoder halves on top if it was grown.

        G(z, c) = D(sigma_max * z, sigma_max, c)

    It starts as a copy of its teacher (section 3.1 of the paper). A rung of its growth receives the features of the
    rung below. With `attach: image` (`preserve`, ours) it adds to the image from below, zero at the start, so
    G_high(z) == up(G_low(z)); if it is `exact`, box_down(G_high(z)) == G_low(z) for all weights. With
    `attach: features` (`random`, the paper's) its output is the image.

    Latents z (B, 3, h, w) are standard normal, at `latent_resolution`.
    """

    def __init__(self, net: UViT, config: DiffusionConfig | None = None) -> None:
        super().__init__()
        self.denoiser = Denoiser(net, config)
        self.denoiser.gated = False

    @property
    def net(self) -> UViT:
        return self.denoiser.net

    @property
    def config(self) -> DiffusionConfig:
        return self.denoiser.config

    @property
    def space(self) -> Space:
        """Channels and range of its images; its latents have as many channels."""
        return self.net.config.space

    @property
    def resolution(self) -> int:
        """Image side."""
        return self.net.config.resolution

    @property
    def exact_factors(self) -> list[int]:
        """Factors k, innermost first, of the growths over which box_down(G_high) is exactly G_low."""
        return [b // a for a, b in pairwise(exact_sides(self.net.config.rungs))]

    @property
    def latent_resolution(self) -> int:
        """Side of its latents: the resolution of the teacher that it was distilled from."""
        return self.net.config.latent_resolution

    @property
    def guided(self) -> bool:
        """Whether it is conditioned on a guidance weight."""
        return self.net.config.guided

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the output layer: the two losses are balanced by their gradients in it."""
        weight = self.net.get_parameter(f"exit.{self.resolution}.conv.weight")
        assert isinstance(weight, nn.Parameter)
        return weight

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile all modules but the output layer.

        Autograd sees a compiled module as one node, so a gradient in one of its weights costs its whole backward pass.
        The balance of the two losses takes two gradients in the output layer (`onestep.losses.balanced`).
        """
        net = self.net
        last = net.exit[str(self.resolution)]
        for module in (net.core, *net.entry.values(), *net.encoder.values(), *net.decoder.values(), *net.exit.values()):
            if module is not last:
                module.compile(*args, **kwargs)

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size (h, w) of the latents for images of `size`. Raises UserError if it does not fit the grid."""
        self.net.config.check_size(size)
        k = self.resolution // self.latent_resolution
        return size[0] // k, size[1] // k

    def forward(self, z: Tensor, cond: Cond, guidance: Tensor | None = None) -> Tensor:
        """z (B, 3, h, w) -> images (B, 3, H, W). `guidance` (B,): the weight omega, for a network that is `guided`."""
        *_, last = self.rungs(z, cond, guidance)
        return last.image

    def preview(self, z: Tensor, cond: Cond, guidance: Tensor | None = None) -> Tensor:
        """The image at the lowest resolution that the generator is exact over: the average of `forward`'s image."""
        below = len(self.net.config.rungs) - 1 - len(self.exact_factors)
        return next(islice(self.rungs(z, cond, guidance), below, None)).image

    def rungs(self, z: Tensor, cond: Cond, guidance: Tensor | None = None) -> Iterator[RungImage]:
        """The prediction of each rung at its own resolution, innermost first; the last image is the generator's."""
        sigma = z.new_full((len(z),), self.denoiser.sigma_max)
        for below in self.denoiser.rungs(z * self.denoiser.sigma_max, sigma, cond, guidance):
            yield below
        low = self.latent_resolution
        for rung in self.net.config.rungs:
            if not rung.decodes:
                continue
            out = self.net.decode(rung, below.ctx, below.features)
            if rung.attach == "image":
                k = rung.resolution // low
                added = details(out.image.to(z.dtype), k) if rung.exact else out.image
                image = up_nearest(below.image, k) + rung.detail_std * added
            else:
                image = self.config.sigma_data * out.image.to(z.dtype)
            below, low = RungImage(image, out.features, below.ctx), rung.resolution
            yield below


def with_guidance(net: UViT, seed: int) -> UViT:
    """`net` with the guidance weight as a further condition (PaGoDA). The last layer of its embedding is zero, so the
    output is unchanged at the start; new tensors are a function of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of(seed, "guidance"))
        made = UViT(net.config.model_copy(update={"guided": True})).to(next(net.parameters()))
    made.load_state_dict(made.state_dict() | net.state_dict(), strict=True)
    return made
