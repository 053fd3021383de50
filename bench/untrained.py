"""Networks that were never trained, with random conditions: to time the work of trained ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from bench.sampling_overhead import conditions

from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.growth import freeze, inherited
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import CoreConfig, NetConfig
from pixelgrow.models.uvit import UViT

TOKENS = 24  # of a batch of scenes' captions, which is as long as its longest, rounded up to 8


class RandomText:
    """In the place of a text cache: random conditions for any captions, made once: a cache costs next to nothing."""

    def __init__(self, core: CoreConfig, count: int) -> None:
        self.made = conditions(core, count, torch.device("cpu"), TOKENS)

    def cond(self, texts: Sequence[str]) -> Cond:
        """One condition for each text, `count` of them at most."""
        return self.made[: len(texts)]


def denoiser(net: NetConfig, frozen: NetConfig | None = None) -> Denoiser:
    """A network; the tensors that it has from `frozen`, which it grew out of, do not train."""
    made = Denoiser(UViT(net))
    if frozen is not None:
        freeze(made.net, inherited(made.net.state_dict(), net, frozen))
    return made
