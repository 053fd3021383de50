"""The denoiser D(x, sigma, cond) -> x0, its preconditioning, and the distribution of sigma in training.

Convention at every boundary: x_sigma = x0 + sigma * eps (variance exploding), sigma in units of the data range [-1, 1].
VP and cosine processes differ only in the distribution of sigma, the weight of the loss and the preconditioning (EDM,
Karras et al., arXiv 2206.00364, Table 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pixelgrow.errors import UserError
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import Frozen, RungConfig, Space, exact_sides
from pixelgrow.models.core import Context
from pixelgrow.models.layers import box_down, details, up_nearest
from pixelgrow.models.uvit import UViT

Prediction = Literal["edm", "v", "x"]


class DiffusionConfig(Frozen):
    """Preconditioning and noise range of a denoiser. `sigma_min` and `sigma_max` are in core units, sigma at the core's
    resolution: a model grown k times denoises k*sigma_min to k*sigma_max at its own resolution (arXiv 2301.11093:
    log-SNR shifts by 2 log k)."""

    prediction: Prediction = "edm"
    sigma_data: float = Field(0.5, gt=0)
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)

    @model_validator(mode="after")
    def _range(self) -> DiffusionConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min: got {self.sigma_min:g}, expected less than sigma_max ({self.sigma_max:g})")
        return self


def column(v: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return v[:, None, None, None]


def coefficients(prediction: Prediction, sigma: Tensor, std: float) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in, each shaped like `sigma`, in D(x) = c_skip x + c_out F(c_in x) for data of deviation `std`.

    `edm`: arXiv 2206.00364, Table 1. `v`: F = alpha eps - sigma' x0 of the VP process with the same signal-to-noise
    ratio, for data scaled to `std` = 1. `x`: F is the image itself.
    """
    s2 = sigma**2
    if prediction == "v":
        std = 1.0
    norm = torch.rsqrt(s2 + std**2)
    if prediction == "x":
        return torch.zeros_like(sigma), torch.ones_like(sigma), norm
    c_skip, c_out = std**2 * norm**2, sigma * std * norm
    return c_skip, -c_out if prediction == "v" else c_out, norm


@dataclass(frozen=True)
class RungImage:
    """What a rung predicts: `image` (B, 3, H, W) at its resolution, the `features` (B, C, h, w) that the image was made
    from, and `ctx`, the context that all rungs of an evaluation share."""

    image: Tensor
    features: Tensor
    ctx: Context


class Denoiser(nn.Module):
    """`denoiser(x, sigma, cond) -> x0` around a network of one or more rungs.

    The first rung is preconditioned as usual. A `base` rung adds to the finished image of the rung below:

        D_high(x, sigma) = up(D_low(box_down(x), sigma/k)) + gain * c_skip * (x - up(box_down(x))) + c_out * F

    (ours). Averaging k x k pixels of x + sigma*eps gives box_down(x) + (sigma/k)*eps', so D_low receives sigma/k. F and
    the gain start at zero, hence box_down(D_high(x, sigma)) == D_low(box_down(x), sigma/k) before the first step. The
    network gives the gain for each pixel (`pixel_gain`): where an image is flat, the noise of the details is removed
    by a gain of 0, and F need not reproduce it.

    An `exact` rung adds P of these two terms, with P = 1 - up(box_down(.)), and the identity holds for all weights.
    Above its gate `until` an exact rung adds nothing: D_high is up(D_low), and without gradients it is not evaluated.

    `height`: use only this many rungs, innermost first; all of them if None (see `lower`).
    """

    def __init__(self, net: UViT, config: DiffusionConfig | None = None, height: int | None = None) -> None:
        super().__init__()
        self.net = net
        self.config = config or DiffusionConfig()
        self.height = len(net.config.rungs) if height is None else height
        self.gated = True  # whether rungs close above their gate; False in a one-step generator, which has one sigma

    @property
    def resolution(self) -> int:
        """Image side of its input and output; a generator's decoder halves, which see no noisy image, do not count."""
        return max(r.resolution for r in self.rung_configs if not r.decodes)

    @property
    def rung_configs(self) -> tuple[RungConfig, ...]:
        """The rungs in use, innermost first."""
        return self.net.config.rungs[: self.height]

    @property
    def exact_factors(self) -> list[int]:
        """Factors k, innermost first, of the growths over which box_down(D_high) is exactly D_low."""
        return [b // a for a, b in pairwise(exact_sides([r for r in self.rung_configs if not r.decodes]))]

    def lower(self, height: int) -> Denoiser:
        """The model of the lowest `height` rungs, which shares the weights: this model before its last growths."""
        made = Denoiser(self.net, self.config, height).train(self.training)
        made.gated = self.gated
        return made

    @property
    def space(self) -> Space:
        """Channels and range of its images."""
        return self.net.config.space

    @property
    def noise_scale(self) -> float:
        """sigma at this resolution over sigma in core units."""
        return self.resolution / self.net.config.core_resolution

    @property
    def sigma_min(self) -> float:
        return self.config.sigma_min * self.noise_scale

    @property
    def sigma_max(self) -> float:
        return self.config.sigma_max * self.noise_scale

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """x (B, 3, H, W) at noise level sigma (B,) -> the expected clean image (B, 3, H, W)."""
        *_, last = self.rungs(x, sigma, cond)
        return up_nearest(last.image, x.shape[-1] // last.image.shape[-1])

    def base(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """The prediction of the model before its last `preserve` growth, up-sampled: a weaker guide (autoguidance)."""
        if self.height < 2:
            raise UserError(
                "this model has no base path: it was not grown with init: preserve; give a checkpoint as the guide"
            )
        *_, last = islice(self.rungs(x, sigma, cond), self.height - 1)
        return up_nearest(last.image, x.shape[-1] // last.image.shape[-1])

    def rungs(self, x: Tensor, sigma: Tensor, cond: Cond, guidance: Tensor | None = None) -> Iterator[RungImage]:
        """The prediction of each rung, innermost first; the last image, up-sampled, is the denoiser's.

        Without gradients, rungs whose gate is closed for the whole batch are not evaluated.
        """
        made = self._start(x, sigma, cond, guidance)
        yield made
        yield from self._rest(x, sigma, made)

    def guided_core(self, x: Tensor, sigma: Tensor, both: Cond, mix: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The denoised image with guidance of the first rung only.

        `both`: B conditions, then B weaker ones, for the first rung; `mix(weak, image)` combines its images. The other
        rungs are evaluated once, under the B conditions.
        """
        first = self._start(torch.cat([x, x]), torch.cat([sigma, sigma]), both)
        image, weak = first.image.chunk(2)
        made = RungImage(mix(weak, image), first.features[: len(x)], first.ctx[: len(x)])
        *_, last = made, *self._rest(x, sigma, made)
        return up_nearest(last.image, x.shape[-1] // last.image.shape[-1])

    def _start(self, x: Tensor, sigma: Tensor, cond: Cond, guidance: Tensor | None = None) -> RungImage:
        """The prediction of the first rung."""
        self.net.config.check_size((x.shape[-2], x.shape[-1]), self.resolution)
        # All rungs are conditioned on sigma in core units. c_noise: arXiv 2206.00364, Table 1.
        ctx = self.net.embed(torch.log(sigma.float() / self.noise_scale) / 4, cond, guidance)
        rung = self.rung_configs[0]
        k = self.resolution // rung.resolution
        return self._first(rung, box_down(x, k), sigma / k, ctx)

    def _rest(self, x: Tensor, sigma: Tensor, made: RungImage) -> Iterator[RungImage]:
        """The predictions of the rungs above the first."""
        for rung in self.rung_configs[1:]:
            if rung.decodes:
                break
            open_ = self.open(rung, sigma)
            if open_ is not None and not torch.is_grad_enabled() and not bool(open_.any()):
                break
            k = self.resolution // rung.resolution
            made = self._refine(rung, box_down(x, k), sigma / k, made, open_)
            yield made

    def open(self, rung: RungConfig, sigma: Tensor) -> Tensor | None:
        """Whether a rung is open at each sigma (B,) of this resolution: (B,) bool, or None if it has no gate."""
        if rung.until is None or not self.gated:
            return None
        return sigma <= self.gate(rung)

    @property
    def trained_rungs(self) -> list[RungConfig]:
        """The rungs in use with trainable tensors, innermost first; the core's are the first rung's."""
        own = [{str(level.resolution) for level in rung.levels} for rung in self.rung_configs]
        sides = {name.split(".")[1] for name, p in self.net.named_parameters() if p.requires_grad}
        of_core = bool(sides.difference(*own))
        return [r for i, r in enumerate(self.rung_configs) if sides & own[i] or (of_core and i == 0)]

    @property
    def trained_until(self) -> float:
        """Sigma in core units above which no trainable tensor has an effect."""
        return max((rung.until or math.inf for rung in self.trained_rungs), default=math.inf)

    @property
    def preconditioned(self) -> tuple[float, float]:
        """The preconditioning that weights of the loss refer to: a deviation, and sigma here over the sigma it takes.

        It is that of the first rung or, if only exact rungs are trained, of the lowest of these, which predicts details
        of deviation `detail_std`; the error of the image from below is then a constant.
        """
        first, *_ = self.rung_configs
        lowest = next(iter(self.trained_rungs), first)
        if lowest.exact:
            return lowest.detail_std, self.resolution / lowest.resolution
        return self.config.sigma_data, self.resolution / first.resolution

    def gate(self, rung: RungConfig) -> float:
        """Sigma at this resolution up to which a rung is open."""
        return math.inf if rung.until is None else rung.until * self.noise_scale * (1 + 1e-6)  # tolerates rounding

    def _first(self, rung: RungConfig, x: Tensor, sigma: Tensor, ctx: Context) -> RungImage:
        c_skip, c_out, c_in = map(column, coefficients(self.config.prediction, sigma, self.config.sigma_data))
        out = self.net.rung(rung, c_in * x, ctx)
        return RungImage(c_skip * x + c_out * out.image, out.features, ctx)

    def _refine(
        self, rung: RungConfig, x: Tensor, sigma: Tensor, below: RungImage, open_: Tensor | None = None
    ) -> RungImage:
        low, ctx = below.image, below.ctx
        _, _, c_in = map(column, coefficients("edm", sigma, self.config.sigma_data))
        c_skip, c_out, _ = map(column, coefficients("edm", sigma, rung.detail_std))
        k = x.shape[-1] // low.shape[-1]
        image = up_nearest(low, k)
        detail = details(x, k)
        # Two inputs, each of about unit variance: the noisy image, and the image from below.
        out = self.net.rung(rung, torch.cat([c_in * x, image / self.config.sigma_data], 1), ctx, below.features)
        assert out.gain is not None
        f = out.image.to(x.dtype)
        if open_ is not None:
            c_skip, c_out = column(open_) * c_skip, column(open_) * c_out
        passed, added = (out.gain * c_skip) * detail, c_out * f
        image = image + details(passed + added, k) if rung.exact else (image + passed) + added
        return RungImage(image, out.features, ctx)


class NoiseConfig(Frozen):
    """Distribution of sigma in training, in core units (a grown model multiplies sigma by its growth).

    `lognormal`: ln sigma ~ N(mean, std^2) (arXiv 2206.00364). `cosine`: log-SNR = -2 log tan(pi t / 2), t uniform; for
    a grown model that is the *shifted* cosine schedule (arXiv 2301.11093, eq. 4). `interpolated`: between the shifted
    schedule, at the noisy end, and one shifted by `finest` doublings less, at the clean end (eq. 5 there).
    """

    kind: Literal["lognormal", "cosine", "interpolated"] = "lognormal"
    mean: float = -1.2
    std: float = Field(1.2, gt=0)
    finest: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _of_its_kind(self) -> NoiseConfig:
        for name, kind in (("mean", "lognormal"), ("std", "lognormal"), ("finest", "interpolated")):
            value, default = getattr(self, name), NoiseConfig.model_fields[name].default
            if self.kind != kind and value != default:
                raise ValueError(f"{name}: got {value} with kind {self.kind}, but it belongs to kind {kind}; drop it")
        return self


class NoiseSchedule:
    """`sigma(u)`: the noise level at quantile u in [0, 1) of the training distribution, at the model's resolution.

    `until`, in core units: the distribution is truncated above it. Raises UserError if nothing is left.
    """

    def __init__(self, config: NoiseConfig, denoiser: Denoiser, until: float = math.inf) -> None:
        self.config = config
        self.scale = denoiser.noise_scale
        self.low, self.high = denoiser.sigma_min, denoiser.sigma_max
        self.share = 1.0  # of the distribution that is kept
        if until < denoiser.config.sigma_max:
            self.share = self._quantile(until * self.scale)
            if self.share < 1e-3:
                raise UserError(
                    f"until: {until:g} is below 99.9% of the training noise, and a rung trains only below it: lower "
                    "noise.mean, or raise until"
                )

    def sigma(self, u: Tensor) -> Tensor:
        """u (B,) float64 -> sigma (B,) float64, rising with u, within [sigma_min, sigma_max]."""
        return self._unclamped(u).clamp(self.low, self.high)

    def density(self, u: Tensor) -> Tensor:
        """u (B,) float64 -> probability density (B,) float64 of log-SNR = -2 ln sigma at sigma(u): |du / d log-SNR|.

        It is infinite where sigma is clamped to a limit: a whole interval of u has the same log-SNR.
        """
        inner, config = self._inner(u), self.config
        if config.kind == "lognormal":
            slope = config.std * math.sqrt(2 * math.pi) * torch.exp(torch.special.ndtri(inner) ** 2 / 2)
        else:
            slope = math.pi / torch.sin(math.pi * inner)
            if config.kind == "interpolated":
                slope = slope + config.finest * math.log(2)
        sigma = self._unclamped(u)
        inside = (self.low < sigma) & (sigma < self.high)
        return torch.where(inside, 1 / (2 * self.share * slope), math.inf)  # share * slope: d ln sigma / du

    def _unclamped(self, u: Tensor) -> Tensor:
        u = self._inner(u)
        if self.config.kind == "lognormal":
            sigma = torch.exp(self.config.mean + self.config.std * torch.special.ndtri(u))
        else:
            log_sigma = torch.log(torch.tan(math.pi / 2 * u))  # log-SNR = -2 log sigma
            if self.config.kind == "interpolated":
                log_sigma = log_sigma - (1 - u) * self.config.finest * math.log(2)
            sigma = torch.exp(log_sigma)
        return sigma * self.scale

    def _inner(self, u: Tensor) -> Tensor:
        """Quantiles of the whole distribution in float64, away from 0 and 1, where sigma would be 0 or infinite."""
        return (u.double() * self.share).clamp(1e-9, 1 - 1e-9)

    def _quantile(self, sigma: float) -> float:
        """The u at which the distribution reaches `sigma`, by bisection."""
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            below = self.sigma(torch.tensor([middle], dtype=torch.float64)).item() < sigma
            low, high = (middle, high) if below else (low, middle)
        return low
