"""Preconditioning, noise distributions, weights: closed forms, and safety at both ends of sigma."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from pixelgrow.diffusion.denoiser import (
    Denoiser,
    DiffusionConfig,
    NoiseConfig,
    NoiseSchedule,
    Prediction,
    coefficients,
    column,
)
from pixelgrow.diffusion.loss import MAX_WEIGHT, Weighting, loss, weight
from pixelgrow.errors import UserError
from pixelgrow.growth import Init, freeze, grow_network, grown_config
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import CoreConfig
from pixelgrow.models.layers import box_down, up_nearest
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.models.uvit import UViT

CORE = CoreConfig(width=32, depth=1, heads=2, text_dim=8, pooled_dim=8)
SIGMA = torch.logspace(-6, 6, 49, dtype=torch.float64)


def denoiser(prediction: Prediction = "edm") -> Denoiser:
    torch.manual_seed(0)
    net = UViT(shallow_uvit("tiny", 16, core=CORE))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return Denoiser(net, DiffusionConfig(prediction=prediction))


def cond(n: int) -> Cond:
    g = torch.Generator().manual_seed(1)
    return Cond(
        torch.randn(n, 4, 8, generator=g),
        torch.ones(n, 4, dtype=torch.bool),
        torch.randn(n, 8, generator=g),
        torch.zeros(n, dtype=torch.bool),
    )


def test_edm_coefficients_keep_input_and_target_at_unit_variance() -> None:
    std = 0.5
    c_skip, c_out, c_in = coefficients("edm", SIGMA, std)
    torch.testing.assert_close(c_in**2 * (std**2 + SIGMA**2), torch.ones_like(SIGMA))
    # Variance of the target (x0 - c_skip x) / c_out for x = x0 + sigma eps; arXiv 2206.00364, eqs. 120-123.
    target = ((1 - c_skip) ** 2 * std**2 + (c_skip * SIGMA) ** 2) / c_out**2
    torch.testing.assert_close(target, torch.ones_like(SIGMA))


def test_v_prediction_is_the_v_of_the_vp_process() -> None:
    """With alpha^2 + s^2 = 1, s/alpha = sigma, z = alpha x_sigma: F = alpha eps - s x0 gives D = x0 exactly."""
    x0, eps = torch.randn(2, 49, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha = torch.rsqrt(1 + SIGMA**2)
    s = SIGMA * alpha
    c_skip, c_out, c_in = coefficients("v", SIGMA, 0.5)
    torch.testing.assert_close(c_in, alpha)
    torch.testing.assert_close(c_skip * (x0 + SIGMA * eps) + c_out * (alpha * eps - s * x0), x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", get_args(Weighting))
def test_weights_are_finite_positive_and_bounded(kind: Weighting) -> None:
    w = weight(kind, SIGMA, 0.5, density=torch.tensor(0.1))
    assert w.isfinite().all() and (w > 0).all() and (w <= MAX_WEIGHT).all()
    torch.testing.assert_close(weight(kind, 4 * SIGMA, 0.5, scale=4.0, density=torch.tensor(0.1)), w)


def test_weights_are_the_losses_they_are_named_after() -> None:
    sigma = torch.logspace(-1.5, 1.5, 13, dtype=torch.float64)
    for prediction in ("edm", "v"):
        _, c_out, _ = coefficients(prediction, sigma, 0.5)
        torch.testing.assert_close(weight(prediction, sigma, 0.5).double(), 1 / c_out**2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight("eps", sigma, 0.5).double(), 1 / sigma**2, rtol=1e-5, atol=1e-5)


def seen_by_first_rung(d: Denoiser, sigma: torch.Tensor) -> torch.Tensor:
    """The sigma that the preconditioning of a denoiser's first rung takes, from its input: c_in is F's input divided by
    the noisy image, which is 1 everywhere."""
    taken = []
    hook = d.net.entry[str(d.net.config.rungs[0].resolution)].register_forward_pre_hook(
        lambda _, args: taken.append(args[0][:, 0, 0, 0])
    )
    d(torch.ones(len(sigma), 3, d.resolution, d.resolution), sigma, cond(len(sigma)))
    hook.remove()
    return (taken[0] ** -2 - d.config.sigma_data**2).sqrt()


@pytest.mark.parametrize("init", [None, "random", "scratch", "preserve"])
def test_weights_see_the_sigma_of_the_first_preconditioning(init: Init | None) -> None:
    """For `edm`: w c_out^2 = 1 at every sigma, 0.4 among them, in a grown network too (k = 4)."""
    d = denoiser()
    if init:
        d = Denoiser(UViT(grown_config(d.net.config, 64, init)))
    sigma = torch.tensor([0.1, 0.4, 1.0, 30.0])
    _, c_out, _ = coefficients("edm", seen_by_first_rung(d, sigma), 0.5)
    w = weight("edm", sigma, *d.preconditioned)
    torch.testing.assert_close(w * c_out**2, torch.ones(4), rtol=1e-3, atol=0)
    assert d.preconditioned == (0.5, 4 if init == "preserve" else 1)  # preserve: as before the growth, at sigma / 4


@pytest.mark.parametrize(
    ("frozen", "exact", "expected"),
    [
        (["core"], True, (0.5, 4)),  # the first rung's level is trained
        (["core", "16"], True, (0.2, 2)),
        (["core", "16", "32"], True, (0.1, 1)),
        (["core", "16"], False, (0.5, 4)),  # F also changes the averaged image
    ],
)
def test_weights_are_of_the_lowest_exact_rung_that_is_trained(
    frozen: list[str], exact: bool, expected: tuple[float, float]
) -> None:
    """A 16 px core with rungs of 32 and 64 px whose details have deviations of 0.2 and 0.1."""
    config = shallow_uvit("nano", 16, core=CORE)
    for side, std in ((32, 0.2), (64, 0.1)):
        config = grown_config(config, side, "preserve", detail_std=std, exact=exact)
    d = Denoiser(UViT(config))
    freeze(d.net, [name for name, _ in d.net.named_parameters() if set(name.split(".")[:2]) & set(frozen)])
    assert d.preconditioned == expected


def test_a_rung_trained_alone_learns_equally_from_all_noise() -> None:
    """w c_out^2 = 1 with the c_out of its details, whose deviation is 0.2."""
    _, d = grown(exact=True)
    freeze(d.net, [name for name, _ in d.net.named_parameters() if "32" not in name.split(".")])
    sigma = torch.tensor([0.05, 0.2, 1.0, 4.0])
    _, c_out, _ = coefficients("edm", sigma, 0.2)
    torch.testing.assert_close(weight("edm", sigma, *d.preconditioned) * c_out**2, torch.ones(4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction", get_args(Prediction))
@pytest.mark.parametrize("kind", get_args(Weighting))
def test_loss_and_gradient_are_finite_at_both_ends(prediction: Prediction, kind: Weighting) -> None:
    d = denoiser(prediction)
    sigma = torch.tensor([1e-8, 0.002, 80.0, 1e6])
    x0 = torch.rand(4, 3, 16, 16) * 2 - 1
    losses = loss(
        d, x0, sigma, torch.randn_like(x0), cond(4), weight(kind, sigma, 0.5, density=torch.tensor(0.1)), multiscale=1
    )
    assert losses.shape == (4,) and losses.isfinite().all()
    losses.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in d.parameters())


def test_clean_inputs_pass_and_pure_noise_is_ignored() -> None:
    d = denoiser().double()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    c = Cond(
        *(t.double() if t.is_floating_point() else t for t in (cond(2).tokens, cond(2).mask, cond(2).pooled)),
        cond(2).null,
    )  # type: ignore[union-attr]
    torch.testing.assert_close(d(x, torch.full((2,), 1e-7, dtype=torch.float64), c), x, rtol=1e-5, atol=1e-5)
    big = torch.full((2,), 1e6, dtype=torch.float64)
    assert d(1e6 * torch.randn_like(x), big, c).abs().max() < 100


def grown(exact: bool, until: float = math.inf) -> tuple[Denoiser, Denoiser]:
    """A denoiser of 16 px and what `preserve` made of it at 32 px, all of whose weights are random."""
    low = denoiser()
    config = grown_config(low.net.config, 32, "preserve", detail_std=0.2, exact=exact, until=until)
    net, _ = grow_network(low.net, config, "preserve")
    for name, p in net.named_parameters():
        if name not in low.net.state_dict():
            torch.nn.init.normal_(p, std=0.1)
    return low, Denoiser(net)


def spread_out(x: torch.Tensor) -> torch.Tensor:
    """Each pixel replaced by the mean of its block of 2 x 2 pixels."""
    return torch.nn.functional.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize("exact", [True, False])
def test_a_rung_adds_to_the_image_from_below(exact: bool) -> None:
    """D(x, s) = up(D_low(box_down(x), s/k)) + gain c_skip P x + c_out F with P = 1 - up(box_down(.)), P of both in an
    exact rung, a gain for each pixel, and EDM's coefficients of data whose deviation is that of the details; F sees the
    noisy image and the one from below at unit variance."""
    low, high = grown(exact)
    x, sigma, c = torch.randn(3, 3, 32, 48), torch.tensor([0.05, 0.5, 7.0]), cond(3)
    s, std = sigma[:, None, None, None], 0.2
    below = next(low.rungs(box_down(x, 2), sigma / 2, c))
    up = below.image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    seen = torch.cat([x / (s**2 + 0.5**2).sqrt(), up / 0.5], 1)
    out = high.net.rung(high.net.config.rungs[1], seen, below.ctx, below.features)
    c_skip, c_out = std**2 / (s**2 + std**2), s * std / (s**2 + std**2).sqrt()
    assert out.gain is not None and out.gain.shape == (3, 1, 32, 48) and out.gain[0].std() > 0.01
    added = out.gain * c_skip * (x - spread_out(x)) + c_out * out.image
    want = up + (added - spread_out(added) if exact else added)
    torch.testing.assert_close(high(x, sigma, c), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(high.base(x, sigma, c), up)
    with pytest.raises(UserError, match="no base path"):
        low.base(x, sigma, c)


@torch.no_grad()
def test_a_plain_rung_adds_in_the_order_of_earlier_versions() -> None:
    """So checkpoints of then generate the same images, bit for bit."""
    _, high = grown(exact=False)
    rung, x, sigma = high.net.config.rungs[1], torch.randn(3, 3, 32, 32), torch.tensor([0.05, 0.5, 7.0])
    below = next(high.rungs(x, sigma, cond(3)))
    up = up_nearest(below.image, 2)
    c_in = column(coefficients("edm", sigma, 0.5)[2])
    c_skip, c_out = map(column, coefficients("edm", sigma, 0.2)[:2])
    out = high.net.rung(rung, torch.cat([c_in * x, up / 0.5], 1), below.ctx, below.features)
    want = (up + (out.gain * c_skip) * (x - up_nearest(box_down(x, 2), 2))) + c_out * out.image
    assert torch.equal(high(x, sigma, cond(3)), want)


def test_a_gate_is_open_at_its_own_level_however_that_is_rounded() -> None:
    _, high = grown(exact=True, until=0.7)
    rung = high.net.config.rungs[1]
    levels = torch.tensor([0.1, 2 * 0.7, 2 * 0.7 * (1 + 1e-7), 2 * 0.7 * 1.001, 80.0])
    assert high.gate(rung) == pytest.approx(1.4) and high.gate(high.net.config.rungs[0]) == math.inf
    for dtype in (torch.float32, torch.float64):
        open_ = high.open(rung, levels.to(dtype))
        assert open_ is not None and open_.tolist() == [True, True, True, False, False]


def test_every_rung_sees_the_noise_level_at_the_core() -> None:
    """c_noise = ln(sigma) / 4 (arXiv 2206.00364, Table 1) of the sigma that the core was trained with."""
    _, high = grown(exact=True)
    taken: list[torch.Tensor] = []
    high.net.core.noise.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    sigma = torch.tensor([0.05, 3.0])
    high(torch.randn(2, 3, 32, 32), sigma, cond(2))
    assert len(taken) == 1  # embedded once for all rungs
    torch.testing.assert_close(taken[0], torch.log(sigma / 2) / 4)


def test_the_loss_is_the_weighted_error_of_what_the_noisy_image_becomes() -> None:
    """At each scale of a pyramid the mean squared error, each as heavy; the noisy image is x0 + sigma eps."""
    x0, eps = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    sigma, weights, c = torch.tensor([0.5, 2.0]), torch.tensor([3.0, 10.0]), cond(2)

    class Cubic(torch.nn.Module):
        def forward(self, x: torch.Tensor, level: torch.Tensor, given: Cond) -> torch.Tensor:
            assert given is c and torch.equal(level, sigma)
            return x**3

    error = (x0 + sigma[:, None, None, None] * eps) ** 3 - x0
    pyramid = [error, torch.nn.functional.avg_pool2d(error, 2), torch.nn.functional.avg_pool2d(error, 4)]
    for halvings in (0, 1, 2):
        mean = sum(e.square().mean((1, 2, 3)) for e in pyramid[: halvings + 1]) / (halvings + 1)
        torch.testing.assert_close(loss(Cubic(), x0, sigma, eps, c, weights, halvings), weights * mean)


def test_lognormal_quantiles_and_range() -> None:
    d = denoiser()
    schedule = NoiseSchedule(NoiseConfig(mean=-0.5, std=0.7), d)
    u = torch.arange(1, 2000, dtype=torch.float64) / 2000
    log_sigma = schedule.sigma(u).log()
    assert log_sigma.mean().item() == pytest.approx(-0.5, abs=0.01)
    assert log_sigma.std().item() == pytest.approx(0.7, abs=0.01)
    ends = schedule.sigma(torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64))
    assert d.sigma_min <= ends[0] and ends[1] <= d.sigma_max


@pytest.mark.parametrize("kind", ["cosine", "interpolated"])
def test_cosine_schedules(kind: str) -> None:
    """log-SNR = -2 log tan(pi t/2) in core units; interpolated is one doubling cleaner, only at the clean end."""
    d = denoiser()
    schedule = NoiseSchedule(NoiseConfig(kind=kind), d)  # type: ignore[arg-type]
    u = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    log_snr = -2 * schedule.sigma(u).log()
    want = -2 * torch.log(torch.tan(math.pi * u / 2))
    shift = 0.0 if kind == "cosine" else 2 * math.log(2)
    torch.testing.assert_close(log_snr, want + shift * (1 - u))
    assert (schedule.sigma(u).diff() > 0).all()


SCHEDULES = [
    NoiseConfig(mean=-0.5, std=1.7),
    NoiseConfig(kind="cosine"),
    NoiseConfig(kind="interpolated", finest=2.0),
]


@pytest.mark.parametrize("until", [math.inf, 0.7])
@pytest.mark.parametrize("init", [None, "preserve"])
@pytest.mark.parametrize("noise", SCHEDULES, ids=lambda noise: noise.kind)
def test_density_of_log_snr(noise: NoiseConfig, init: Init | None, until: float) -> None:
    """Against a histogram of many quantiles; infinite where sigma is clamped to a limit."""
    d = denoiser()
    if init:
        d = Denoiser(UViT(grown_config(d.net.config, 64, init)))
    schedule = NoiseSchedule(noise, d, until)
    u = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
    sigma, density = schedule.sigma(u), schedule.density(u)
    clamped = (sigma == d.sigma_min) | (sigma == d.sigma_max)
    assert clamped.any() and torch.equal(density.isinf(), clamped)
    log_snr = -2 * sigma.log()
    counts, edges = torch.histogram(log_snr[~clamped], bins=200)
    middle = (edges[1:] + edges[:-1]) / 2
    at = schedule.density(u[torch.searchsorted(-log_snr, -middle)])
    often = (counts > 2000) & at.isfinite()
    assert often.sum() > 60
    torch.testing.assert_close(at[often], (counts / len(u) / edges.diff())[often], rtol=0.02, atol=0)


@pytest.mark.parametrize("bias", [-3.0, 1.0])
@pytest.mark.parametrize("noise", [NoiseConfig(std=2.5), *SCHEDULES[1:]], ids=lambda noise: noise.kind)
def test_sigmoid_weighs_every_log_snr_as_if_it_were_as_frequent(noise: NoiseConfig, bias: float) -> None:
    """Kingma & Gao: the mean of w |x0 - x0_hat|^2 is the integral of sigmoid(bias - lambda) |eps - eps_hat|^2 over
    lambda = log-SNR, whatever the distribution; here |eps - eps_hat| is 1, and the integral a difference of softplus.
    """
    d = denoiser()
    schedule = NoiseSchedule(noise, d)
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    sigma = schedule.sigma(u)
    w = weight("sigmoid", sigma, 0.5, bias=bias, density=schedule.density(u))
    found = (w.double() * sigma**2).mean()
    high, low = (bias + 2 * math.log(s) for s in (d.sigma_max, d.sigma_min))  # bias - lambda
    want = math.log1p(math.exp(high)) - math.log1p(math.exp(low))
    assert found.item() == pytest.approx(want, rel=2e-3)


def test_a_grown_model_is_trained_at_k_times_the_noise() -> None:
    d = denoiser()
    high = Denoiser(UViT(grown_config(d.net.config, 64, "preserve")))
    u = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    for kind in ("lognormal", "cosine"):
        low_s, high_s = (NoiseSchedule(NoiseConfig(kind=kind), m).sigma(u) for m in (d, high))  # type: ignore[arg-type]
        torch.testing.assert_close(high_s, 4 * low_s)
    assert (high.sigma_min, high.sigma_max) == (4 * d.sigma_min, 4 * d.sigma_max)
