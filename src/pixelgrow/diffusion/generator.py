"""The one-step generator: `generator(z, cond) -> x0` in one network evaluation (PaGoDA, arXiv 2405.14822)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pixelgrow import rng
from pixelgrow.diffusion.denoiser import Denoiser, DiffusionConfig, RungOutput
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import Space, exact_sides
from pixelgrow.models.layers import details, up_nearest
from pixelgrow.models.uvit import UViT


class Generator(nn.Module):
    """A denoiser asked once, at its highest noise level, with decoder halves on top where it was grown.

        G(z, c) = D(sigma_max * z, sigma_max, c)

    It starts as a copy of its teacher (section 3.1 of the paper). A rung that it was grown by draws on the features of
    the rung below: with `attach: image` it adds to the image from there, zero at the start, so that
    G_high(z) == up(G_low(z)), and where it is `exact` box_down(G_high(z)) == G_low(z) for every weight (`preserve`,
    ours); with `attach: features` it is the image (`random`, the paper's).

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
        """What its images are, and the channels of its latents."""
        return self.net.config.space

    @property
    def resolution(self) -> int:
        """Image side that it draws at."""
        return self.net.config.resolution

    @property
    def exact_factors(self) -> list[int]:
        """The growths, innermost first, that its image averages down over exactly: how many times each enlarges."""
        return [b // a for a, b in pairwise(exact_sides(self.net.config.rungs))]

    @property
    def latent_resolution(self) -> int:
        """Side of its latents: of the teacher that it was distilled from."""
        return self.net.config.latent_resolution

    @property
    def guided(self) -> bool:
        """Whether it is told a guidance weight."""
        return self.net.config.guided

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the output layer, which the two losses are balanced by."""
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
        """Size (h, w) of the latents for pictures of `size`. Raises UserError if it does not fit the grid."""
        self.net.config.check_size(size)
        k = self.resolution // self.latent_resolution
        return size[0] // k, size[1] // k

    def forward(self, z: Tensor, cond: Cond, guidance: Tensor | None = None) -> Tensor:
        """z (B, 3, h, w) -> images (B, 3, H, W). `guidance` (B,): the weight omega, for a network that is `guided`."""
        *_, last = self.rungs(z, cond, guidance)
        return last.image

    def preview(self, z: Tensor, cond: Cond, guidance: Tensor | None = None) -> Tensor:
        """The image of the lowest resolution that the generator is exact over: what `forward`'s averages down to."""
        below = len(self.net.config.rungs) - 1 - len(self.exact_factors)
        return next(islice(self.rungs(z, cond, guidance), below, None)).image

    def rungs(self, z: Tensor, cond: Cond, guidance: Tensor | None = None) -> Iterator[RungOutput]:
        """What each rung draws at its own resolution, innermost first; the last is the generator's."""
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
            below, low = RungOutput(image, out.features, below.ctx), rung.resolution
            yield below


def with_guidance(net: UViT, seed: int) -> UViT:
    """`net` as a network that is told the guidance weight too (PaGoDA). Its embedding ends in zeros, so that nothing
    changes at the start; what is new is a function of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of(seed, "guidance"))
        made = UViT(net.config.model_copy(update={"guided": True})).to(next(net.parameters()))
    made.load_state_dict(made.state_dict() | net.state_dict(), strict=True)
    return made
