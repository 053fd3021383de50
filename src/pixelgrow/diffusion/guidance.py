"""Guidance: from `denoiser(x, sigma, cond)` to the `denoise(x, sigma) -> x0` that a solver integrates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.errors import UserError
from pixelgrow.models.cond import Cond
from pixelgrow.models.layers import box_down, up_nearest

Network = Callable[[Tensor, Tensor, Cond], Tensor]
"""`(x (B,3,H,W), sigma (B,), cond) -> x0 (B,3,H,W)`: a denoiser, or a grown denoiser's `base`."""


def exact_factors(model: object) -> Sequence[int]:
    """The `exact_factors` of a denoiser or a generator; none if it has no such attribute."""
    factors = getattr(model, "exact_factors", ())
    assert isinstance(factors, Sequence)
    return factors


class Guided:
    """`denoise(x, sigma) -> x0` for one batch of conditions, guided by a weaker prediction.

        D = D_weak + guidance * (D_cond - D_weak)

    `guidance` = 1 is no guidance and costs one evaluation. A tensor (B,) gives each image its own weight and always
    costs two. The weak prediction is
    - the same denoiser under the null condition (classifier-free guidance, Ho & Salimans, arXiv 2207.12598), evaluated
      with the conditional one in a single call of 2B rows; or
    - `guide` under the same condition (autoguidance, Karras et al., arXiv 2406.02507): a smaller or earlier denoiser
      of the same resolution, or the `base` of a `preserve`-grown denoiser.
    `interval` (lo, hi), in sigma: guide only where lo < sigma <= hi, one evaluation elsewhere (Kynkaanniemi et al.,
    arXiv 2404.07724). `guide_details` False: guide only the core and evaluate the rungs above it once (ours); this
    halves their cost and weakens details. `threshold`: percentile in (0, 1] of `dynamic_threshold`, applied to every
    prediction; in an exact model, to the image at the lowest resolution only.
    `nfe` counts the network evaluations per image so far, the guide's included.

    Raises UserError for an invalid weight, interval or percentile, and for a guide that would not be used.
    """

    def __init__(
        self,
        denoiser: Network,
        cond: Cond,
        *,
        guidance: float | Tensor = 1.0,
        interval: tuple[float, float] | None = None,
        guide: Network | None = None,
        threshold: float | None = None,
        guide_details: bool = True,
    ) -> None:
        weights = guidance.tolist() if isinstance(guidance, Tensor) else [guidance]
        assert len(weights) in (1, len(cond)), "a weight for all images, or one for each"
        if wrong := [w for w in weights if not (math.isfinite(w) and w >= 0)]:
            raise UserError(f"guidance={wrong[0]}: expected a finite weight >= 0; 1 means none, 1.5 to 5 are usual")
        none = not isinstance(guidance, Tensor) and guidance == 1
        if guide is not None and none:
            raise UserError("guidance=1 with a guide: 1 means no guidance, the guide goes unused; raise or drop it")
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise UserError(f"interval={interval}: expected (lo, hi) with 0 <= lo < hi, in sigma; swap or drop it")
        if threshold is not None and not 0 < threshold <= 1:
            raise UserError(f"threshold={threshold}: expected a percentile in (0, 1]; 0.995 is usual")
        self.denoiser, self.cond, self.guide = denoiser, cond, guide
        self.guidance, self.interval, self.threshold = guidance, interval, threshold
        self.guide_details = guide_details
        self._none = none
        self._core_alone: Denoiser | None = None
        if not guide_details and not none:
            if guide is not None or not isinstance(denoiser, Denoiser):
                raise UserError(
                    "guide_details=False guides the core of a denoiser by the null condition; drop it, or the guide"
                )
            self._core_alone = denoiser
        self._factor = math.prod(exact_factors(denoiser))
        self._weight = guidance.to(cond.null.device)[:, None, None, None] if isinstance(guidance, Tensor) else guidance
        self._both: Cond | None = None
        self.nfe = 0
        if guide is None and not none:
            row = torch.arange(2 * len(cond), device=cond.null.device)
            self._both = cond[row % len(cond)].dropped(row >= len(cond))

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """x (B,3,H,W) at noise level sigma -> x0 (B,3,H,W) in x's dtype."""
        lo, hi = self.interval or (0.0, math.inf)
        if self._none or not lo < sigma <= hi:
            x0 = self._evaluate(self.denoiser, x, sigma, self.cond)
        elif self._core_alone is not None and self._both is not None:
            self.nfe += 2
            level = x.new_full((len(x),), sigma)
            x0 = self._core_alone.guided_core(x, level, self._both, self._mixed).to(x.dtype)
        elif self._both is not None:
            x0_cond, x0_weak = self._evaluate(self.denoiser, torch.cat([x, x]), sigma, self._both).chunk(2)
            self.nfe += 1  # two evaluations for each image, in one call
            x0 = self._mixed(x0_weak, x0_cond)
        else:
            assert self.guide is not None
            x0_cond = self._evaluate(self.denoiser, x, sigma, self.cond)
            x0_weak = self._evaluate(self.guide, x, sigma, self.cond)
            x0 = self._mixed(x0_weak, x0_cond)
        return x0 if self.threshold is None else self._thresholded(x0, self.threshold)

    def _thresholded(self, x0: Tensor, percentile: float) -> Tensor:
        """`x0` with its average over all exact growths thresholded, and its details unchanged. Thresholding is not
        linear: applied to the whole image it would break exactness."""
        if self._factor == 1:
            return dynamic_threshold(x0, percentile)
        low = box_down(x0, self._factor)
        return x0 + up_nearest(dynamic_threshold(low, percentile) - low, self._factor)

    def _mixed(self, weak: Tensor, cond: Tensor) -> Tensor:
        weight = self._weight
        return torch.lerp(weak, cond, weight.to(weak.dtype) if isinstance(weight, Tensor) else weight)

    def _evaluate(self, network: Network, x: Tensor, sigma: float, cond: Cond) -> Tensor:
        self.nfe += 1
        return network(x, x.new_full((len(x),), sigma), cond).to(x.dtype)


def dynamic_threshold(x0: Tensor, percentile: float) -> Tensor:
    """Dynamic thresholding, x0 (B,...) -> (B,...) in [-1, 1] (Saharia et al., arXiv 2205.11487, section 2.3).

    Each image is clamped to +-s and divided by s: the percentile, in (0, 1], of its |x0|, but at least 1.
    """
    magnitude = x0.abs().flatten(1)  # (B, C*H*W)
    n = magnitude.shape[1]
    rank = n - max(1, math.ceil(percentile * n)) + 1  # from the top: topk beats a full sort many times over
    s = magnitude.topk(rank, dim=1).values[:, -1].clamp_min(1.0).reshape(-1, *[1] * (x0.ndim - 1))  # (B,1,1,1)
    return x0.clamp(-s, s) / s
