"""A teacher from outside: a diffusers UNet in pixel space as a denoiser, as a one-step generator, and as features.

    pipeline = diffusers.DiffusionPipeline.from_pretrained(...)
    teacher = OutsideDenoiser(pipeline.unet, pipeline.scheduler)
    objective = DistillObjective(OutsideGenerator(teacher), OutsideFeatures(teacher), ...)

Samplers, guidance and `onestep.pairs.Ode` take the teacher as any denoiser. Nothing of diffusers is imported here: any
network with the interface of its `UNet2DModel` or `UNet2DConditionModel` will do.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pixelgrow.diffusion.denoiser import column
from pixelgrow.errors import UserError
from pixelgrow.models.cond import Cond
from pixelgrow.models.layers import to_tokens
from pixelgrow.onestep.features import SIGMA, FeatureOutput

SIGMA_MAX = 80.0  # EDM's. A cosine schedule ends at thousands, where rounding drowns x0 = x - sigma eps
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class OutsideDenoiser(nn.Module):
    """`denoiser(x, sigma, cond) -> x0` around a `unet(x_t, t, ...)` of a variance-preserving process.

    x = x0 + sigma eps equals x_t / sqrt(abar_t) for sigma = sqrt((1 - abar_t) / abar_t). So the network receives
    x / sqrt(1 + sigma^2), and the t whose noise level is sigma; log sigma is interpolated linearly between the
    schedule's steps (EDM, Karras et al., arXiv 2206.00364, Table 1, "VP" and "iDDPM").

    unet        a module of diffusers, or one with the same interface
    scheduler   of diffusers, for its `alphas_cumprod` and prediction type
    null        the condition, one row, for unconditional evaluations; without one, guidance is not possible
    sigma_max   the highest noise level, if the schedule goes further

    Labels are passed as `class_labels`, text tokens as `encoder_hidden_states` with their mask. Output channels after
    the third, a learned variance, are dropped. Raises UserError for other processes.
    """

    log_sigmas: Tensor  # (T,) float64, rising

    def __init__(self, unet: Any, scheduler: Any, null: Cond | None = None, sigma_max: float = SIGMA_MAX) -> None:
        super().__init__()
        self.unet = unet
        self.null = null
        self.prediction = scheduler.config.get("prediction_type", "epsilon")
        if not hasattr(scheduler, "alphas_cumprod") or self.prediction not in PREDICTIONS:
            raise UserError(
                f"a scheduler {type(scheduler).__name__} of prediction type {self.prediction!r}: expected one with "
                f"alphas_cumprod and one of {', '.join(PREDICTIONS)}; give that which the network was trained with"
            )
        alpha_bar = scheduler.alphas_cumprod.double()
        alpha_bar = alpha_bar[alpha_bar > 0]  # the last is 0 where the schedule ends at pure noise
        self.register_buffer("log_sigmas", torch.log((1 - alpha_bar) / alpha_bar) / 2, persistent=False)
        size = self.unet.config.sample_size
        if size is None:
            raise UserError("the network's config has no sample_size; expected the side that it was trained at; set it")
        self.resolution = size if isinstance(size, int) else int(size[0])
        self.sigma_min = float(self.log_sigmas[0].exp())
        self.sigma_max = min(sigma_max, float(self.log_sigmas[-1].exp()))

    def time(self, sigma: Tensor) -> Tensor:
        """sigma (B,) -> t (B,) float32 in [0, T - 1]."""
        wanted, known = sigma.double().log(), self.log_sigmas
        at = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
        low, high = known[at - 1], known[at]
        return (at - 1 + ((wanted - low) / (high - low)).clamp(0, 1)).float()

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """x (B, 3, H, W) at noise level sigma (B,) -> the expected clean image (B, 3, H, W)."""
        s = column(sigma)
        norm = torch.rsqrt(1 + s**2)  # sqrt(abar)
        out = self.unet(norm * x, self.time(sigma), **self.arguments(cond)).sample[:, :3]
        if self.prediction == "epsilon":
            return x - s * out
        return norm**2 * x - s * norm * out if self.prediction == "v_prediction" else out

    def arguments(self, cond: Cond) -> dict[str, Tensor]:
        """The network's arguments for conditions (B rows), by name; none if it is unconditional.

        Raises UserError if the conditions are of another kind, or if one is dropped and there is no `null`.
        """
        config = self.unet.config
        text, classes = config.get("cross_attention_dim") is not None, config.get("num_class_embeds") is not None
        if not (text or classes):
            return {}
        if (cond.tokens if text else cond.labels) is None:
            raise UserError(
                f"this network reads {'text' if text else 'class labels'}, the conditions are "
                f"{'class labels' if text else 'text'}; give the encoder that it was trained with"
            )
        if bool(cond.null.any()):
            if self.null is None:
                raise UserError(
                    "guidance needs an unconditional evaluation, and this network has no null condition; give null=, "
                    "or no guidance"
                )
            cond = _replaced(cond, self.null.to(cond.null.device))
        if not text:
            assert cond.labels is not None
            return {"class_labels": cond.labels}
        assert cond.tokens is not None and cond.mask is not None
        return {"encoder_hidden_states": cond.tokens, "encoder_attention_mask": cond.mask}

    @property
    def vec_width(self) -> int:
        """Channels of `vec`."""
        config = self.unet.config
        if config.get("cross_attention_dim") is not None:
            return int(config.get("encoder_hid_dim") or config.cross_attention_dim)
        return 1 if config.get("num_class_embeds") is None else self.unet.class_embedding.weight.shape[1]

    def vec(self, cond: Cond) -> Tensor:
        """Conditions as vectors (B, vec_width), for a discriminator: the network's class embedding, the mean of the
        text tokens, or 0."""
        given = self.arguments(cond)
        if "class_labels" in given:
            return self.unet.class_embedding(given["class_labels"])
        if not given:
            return torch.zeros(len(cond), 1, device=cond.null.device)
        mask = given["encoder_attention_mask"][..., None]
        return (given["encoder_hidden_states"] * mask).sum(1) / mask.sum(1)


def _replaced(cond: Cond, null: Cond) -> Cond:
    """`cond` with its dropped rows replaced by `null`, one row."""
    rows = cond.null
    if cond.labels is not None and null.labels is not None:
        return Cond(None, None, None, torch.zeros_like(rows), torch.where(rows, null.labels, cond.labels))
    assert cond.tokens is not None and null.tokens is not None and cond.mask is not None and null.mask is not None
    length = max(cond.tokens.shape[1], null.tokens.shape[1])

    def padded(t: Tensor) -> Tensor:
        return torch.cat([t, t.new_zeros(len(t), length - t.shape[1], *t.shape[2:])], 1)

    tokens = torch.where(rows[:, None, None], padded(null.tokens), padded(cond.tokens))
    mask = torch.where(rows[:, None], padded(null.mask), padded(cond.mask))
    return Cond(tokens, mask, cond.pooled, torch.zeros_like(rows))


class OutsideGenerator(nn.Module):
    """A one-step generator: a copy of a teacher from outside, evaluated once at its highest noise level.

    The output of an `epsilon` network is multiplied by sigma_max in the image. It needs a far lower learning rate than
    the other predictions, or a teacher with a lower `sigma_max`. Save `denoiser.unet` with its own `save_pretrained`.
    """

    def __init__(self, teacher: OutsideDenoiser) -> None:
        super().__init__()
        self.denoiser = copy.deepcopy(teacher).requires_grad_(True)

    @property
    def resolution(self) -> int:
        return self.denoiser.resolution

    @property
    def latent_resolution(self) -> int:
        return self.denoiser.resolution

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the output layer, by whose gradients two losses are balanced."""
        weight = self.denoiser.unet.get_parameter("conv_out.weight")
        assert isinstance(weight, nn.Parameter)
        return weight

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks alone, so that the output layer stays outside; see `Generator.compile`."""
        unet = self.denoiser.unet
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            block.compile(*args, **kwargs)

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size (h, w) of the latents for images of `size`: the same. Raises UserError if it does not fit."""
        stride = 2 ** (len(self.denoiser.unet.config.block_out_channels) - 1)
        if size[0] % stride or size[1] % stride:
            raise UserError(f"size {size[0]}x{size[1]}: expected multiples of {stride}, the network's stride")
        return size

    @property
    def guided(self) -> bool:
        """Whether it is conditioned on a guidance weight: never."""
        return False

    def forward(self, z: Tensor, cond: Cond, guidance: None = None) -> Tensor:
        """z (B, 3, h, w) -> images (B, 3, h, w)."""
        sigma_max = self.denoiser.sigma_max
        return self.denoiser(sigma_max * z, z.new_full((len(z),), sigma_max), cond)


class OutsideFeatures:
    """Maps of an outside teacher's down and middle blocks, as features of images at its resolution. Ours.

    As for a teacher of our own, the noise level is `features.SIGMA`.
    """

    def __init__(self, teacher: OutsideDenoiser) -> None:
        self.teacher = teacher.eval().requires_grad_(False)

    @property
    def vec_width(self) -> int:
        return self.teacher.vec_width

    def widths(self, resolution: int) -> list[int]:
        assert resolution == self.teacher.resolution
        channels = list(self.teacher.unet.config.block_out_channels)
        return [*channels, channels[-1]]

    def vec(self, cond: Cond) -> Tensor:
        return self.teacher.vec(cond)

    def __call__(self, images: Tensor, cond: Cond, crop: Tensor) -> FeatureOutput:
        maps: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            maps.append(output[0] if isinstance(output, tuple) else output)

        unet = self.teacher.unet
        hooks = [module.register_forward_hook(keep) for module in (*unet.down_blocks, unet.mid_block)]
        try:
            self.teacher(images, images.new_full((len(images),), SIGMA), cond)
        finally:
            for hook in hooks:
                hook.remove()
        return FeatureOutput([to_tokens(h) for h in maps], self.vec(cond))
