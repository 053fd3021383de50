"""The training loss of a denoiser: the squared error of the image, weighted by noise level."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pixelgrow.diffusion.denoiser import column
from pixelgrow.models.cond import Cond
from pixelgrow.models.layers import box_down

Weighting = Literal["edm", "v", "eps", "sigmoid"]
SIGMOID_BIAS = -3.0  # ours
MAX_WEIGHT = 1e4  # ours: bounds the weight at low noise, where 1/sigma^2 grows without limit


def weight(
    kind: Weighting,
    sigma: Tensor,
    sigma_data: float,
    scale: float = 1.0,
    *,
    bias: float = SIGMOID_BIAS,
    density: Tensor | None = None,
) -> Tensor:
    """Weight of the squared error of x0, (B,) float32; bounded by MAX_WEIGHT towards sigma = 0.

    `edm`: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2. `v`: 1 + 1/sigma^2. `eps`: 1/sigma^2.
    `sigmoid`: sigmoid(bias - log-SNR) / density / sigma^2, where log-SNR = -2 ln sigma.

    The first three give the loss that they are named after, averaged over the training distribution of sigma.
    `sigmoid` (Kingma & Gao, arXiv 2303.00848; used by SiD2, arXiv 2410.19324) defines the loss as an integral,

        integral of sigmoid(bias - lambda) |eps - eps_hat|^2 d lambda        with lambda = log-SNR,

    whatever the training distribution of sigma: a sample counts 1 / `density` (B,), `NoiseSchedule.density`, as in
    importance sampling. |eps - eps_hat|^2 is |x0 - x0_hat|^2 / sigma^2. A sample whose sigma is clamped to a limit has
    infinite density and weighs nothing: the integral ends there.

    `sigma_data` and `scale` are those of `Denoiser.preconditioned`, and all take sigma / scale, the sigma that this
    preconditioning takes. So `edm` is 1/c_out^2 of the lowest rung that is trained, of the first one at least. A
    `random`-grown network is one rung, at the resolution of the image. In a `preserve`-grown one the first rung is
    the lowest. While that is trained, the weight stays what it was before the growth, and the new rung's own w
    c_out^2 falls from k^2 at low noise to (detail_std / sigma_data)^2 at high noise. A rung that is trained alone
    would hardly learn from the noise at which its edges are decided: hence its own 1/c_out^2 (ours).
    """
    s2 = (sigma.float() / scale) ** 2
    match kind:
        case "edm":
            w = 1 / s2 + 1 / sigma_data**2
        case "v":
            w = 1 + 1 / s2
        case "eps":
            w = 1 / s2
        case "sigmoid":
            assert density is not None
            w = torch.sigmoid(bias + torch.log(s2)) / (s2 * density.to(s2))
    return w.clamp(max=MAX_WEIGHT)


def loss(
    denoiser: nn.Module,
    x0: Tensor,
    sigma: Tensor,
    eps: Tensor,
    cond: Cond,
    weights: Tensor,
    multiscale: int = 0,
) -> Tensor:
    """Weighted squared error of the denoised image, (B,): mean over pixels, times `weights` (B,).

    `multiscale` > 0 adds the errors of that many successively halved images, each weighted like the full one (simple
    diffusion, arXiv 2301.11093, section 3.4; the weights are ours).
    """
    error = denoiser(x0 + column(sigma) * eps, sigma, cond).float() - x0
    total = error.square().mean(dim=(1, 2, 3))
    for _ in range(multiscale):
        error = box_down(error, 2)
        total = total + error.square().mean(dim=(1, 2, 3))
    return weights * total / (1 + multiscale)
