"""The shipped core, grown by an exact rung with random weights: a model whose previews are worth something."""

from __future__ import annotations

from functools import cache

import numpy as np

from pixelgrow import checkpoint
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.growth import grow_network, grown_config, ungrown
from pixelgrow.model import Model, find


@cache
def exact_model() -> Model:
    denoiser, config = checkpoint.load(find("tiny"))
    core = denoiser if len(denoiser.net.config.rungs) == 1 else ungrown(denoiser)
    net, _ = grow_network(core.net, grown_config(core.net.config, 64, "preserve", detail_std=0.1), "preserve")
    for name, p in net.named_parameters():
        if name.split(".")[1] == "64":
            p.data.add_(0.05 * p.data.new_tensor(np.random.default_rng(p.numel()).standard_normal(p.shape)))
    return Model(Denoiser(net, core.config).eval(), config.model_copy(update={"network": net.config}))
