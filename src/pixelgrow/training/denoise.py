"""The denoising objective: add noise to an image, predict the image."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pixelgrow import rng
from pixelgrow.diffusion.denoiser import Denoiser, NoiseSchedule
from pixelgrow.diffusion.heldout import Images, denoising_error
from pixelgrow.diffusion.loss import SIGMOID_BIAS, loss, weight
from pixelgrow.models.cond import Cond, to_device
from pixelgrow.models.uvit import UViT
from pixelgrow.pictures import to_float
from pixelgrow.training.monitor import Hook
from pixelgrow.training.objective import Terms
from pixelgrow.training.settings import Checkpointing, TrainSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pixelgrow.data.loader import Batch


class Conditions(Protocol):
    """Gives the conditions of captions that come without; `text.cache.TextCache` and `text.online.OnlineText` do."""

    def cond(self, texts: Sequence[str]) -> Cond:
        """The conditions of captions, on any device."""
        ...


class DenoiseObjective:
    """Weighted squared error of the denoised image; noise level, noise and dropped conditions keyed by (seed, index).

    The one part is "denoiser": its tensors with `requires_grad` train. Noise levels above the gates of all of them are
    cut off the training distribution. Logs the loss of each third of it as `loss_low`, `loss_middle`, `loss_high`.
    """

    def __init__(self, denoiser: Denoiser, text: Conditions, settings: TrainSettings, seed: int) -> None:
        self.modules: dict[str, nn.Module] = {"denoiser": denoiser}
        self.rates: Mapping[str, float] = {"denoiser": 1.0}
        self.denoiser, self.text, self.settings, self.seed = denoiser, text, settings, seed
        self.schedule = NoiseSchedule(settings.noise, denoiser, denoiser.trained_until)
        self.preconditioned = denoiser.preconditioned
        self.device = next(denoiser.parameters()).device
        # simple diffusion, arXiv 2301.11093, section 3.4: down to 32 px
        self.halvings = max(0, (denoiser.resolution // 32).bit_length() - 1) if settings.multiscale else 0
        denoiser.train()
        recompute_blocks(denoiser.net, settings.activation_checkpointing)

    def loss(self, batch: Batch, part: str = "denoiser") -> Terms:
        """The mean weighted error of a batch; see the class."""
        s, seed, device = self.settings, self.seed, self.device
        u = rng.uniform(seed, "sigma", batch.index)
        third = (u * 3).long()
        # All copies to the device come before the forward pass: the first one after it would wait for its end.
        by_third = to_device(third.argsort(stable=True), device).split(third.bincount(minlength=3).tolist())
        sigma = to_device(self.schedule.sigma(u).float(), device)  # (B,)
        density = to_device(self.schedule.density(u), device) if s.weighting == "sigmoid" else None
        x0 = to_float(to_device(batch.image, device))  # (B, 3, H, W)
        eps = rng.normal(x0.shape[1:], seed, "noise", batch.index, device)
        cond = (self.text.cond(batch.text) if batch.cond is None else batch.cond).to(device)
        cond = cond.dropped(to_device(rng.uniform(seed, "dropout", batch.index) < s.cond_dropout, device))
        weights = weight(
            s.weighting,
            sigma,
            *self.preconditioned,
            bias=SIGMOID_BIAS if s.weighting_bias is None else s.weighting_bias,
            density=density,
        )
        losses = loss(self.denoiser, x0, sigma, eps, cond, weights, self.halvings)  # (B,)
        logs: dict[str, Tensor | float] = {}
        for name, rows in zip(("loss_low", "loss_middle", "loss_high"), by_third, strict=True):
            if len(rows):
                logs[name] = losses.detach()[rows]
        return Terms(losses.mean(), logs, sigma, losses.detach())


# What selective checkpointing keeps: products, convolutions, and attention on every kind of device.
PRODUCTS = [
    *(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "convolution")),
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def recompute_blocks(net: UViT, how: Checkpointing) -> None:
    """Checkpoint activations of each transformer block and level half, in place.

    True keeps a block's input and computes all else again in the backward pass. "selective" also keeps the results of
    products, convolutions and attention, and computes again what is cheap: norms, modulation, nonlinearities.
    """
    if not how:
        return
    given: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        given |= {"context_fn": functools.partial(create_selective_checkpoint_contexts, PRODUCTS)}
    for block in net.blocks:
        block.forward = functools.partial(checkpoint, block.forward, **given)


def validation_hook(
    denoiser: Denoiser, images: Images, cond: Cond, every: int, *, seed: int = 0, batch: int = 64
) -> Hook:
    """Log the error of held-out images, N of (3, h, w), by noise level at the core (`validation/0.5`), and its mean.

    Images, noise levels and noise are the same each time (`heldout.denoising_error`). Also runs before the first step.
    """
    device = next(denoiser.parameters()).device
    images, cond = [image.to(device) for image in images], cond.to(device)

    def run(_: int) -> Mapping[str, float]:
        errors = denoising_error(denoiser, images, cond, scale=denoiser.noise_scale, seed=seed, batch=batch)
        return {"mean": sum(errors.values()) / len(errors)} | {f"{sigma:g}": e for sigma, e in errors.items()}

    return Hook("validation", every, run, at_start=True)
