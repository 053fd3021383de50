"""Samplers against closed-form flows, the diffusers library, and their own promises on randomness."""

import importlib
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixelgrow.diffusion.sampling import ancestral_noise, initial_noise, karras_grid, native_grid, sample, slices
from pixelgrow.diffusion.solvers import SAMPLERS, invert, solve, trajectory
from pixelgrow.errors import UserError
from pixelgrow.models.cond import Cond

MEAN, SD = 0.3, 0.5
ODE = ["ddim", "heun", "dpm++2m"]


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """The ideal denoiser of N(MEAN, SD^2)."""
    return (x * SD**2 + MEAN * sigma**2) / (SD**2 + sigma**2)


def gaussian_flow(x: Tensor, s0: float, s1: float) -> Tensor:
    """The probability-flow ODE of N(MEAN, SD^2), solved from s0 to s1."""
    return MEAN + (x - MEAN) * math.sqrt((SD**2 + s1**2) / (SD**2 + s0**2))


def mixture(x: Tensor, sigma: float) -> Tensor:
    """The ideal denoiser of 0.5 N(-0.6, 0.3^2) + 0.5 N(0.6, 0.3^2) for each pixel: not linear."""
    m, var = 0.6, 0.3**2 + sigma**2
    return (x * 0.3**2 + sigma**2 * m * torch.tanh(x * m / var)) / var


def labels(n: int, first: int = 0) -> Cond:
    return Cond(None, None, None, torch.zeros(n, dtype=torch.bool), torch.arange(first, first + n))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class ConvDenoiser(nn.Module):
    """A small real network that looks at its noise level and label."""

    sigma_min, sigma_max = 0.01, 40.0

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.enter, self.leave = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 3, 3, padding=1)
            self.label = nn.Embedding(11, 24)
        self.rows: list[int] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        self.rows.append(len(x))
        s = sigma.view(-1, 1, 1, 1)
        assert cond.labels is not None
        label = self.label(torch.where(cond.null, 10, cond.labels % 10))[:, :, None, None]
        h = torch.nn.functional.silu(self.enter(x / (s**2 + 0.25).sqrt()) + label + s.log() / 4)
        c_skip, c_out = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt()
        return c_skip * x + c_out * self.leave(h)


# --- order of convergence ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("heun", 2), ("dpm++2m", 2)])
@pytest.mark.parametrize("rising", [False, True], ids=["sampling", "inverting"])
def test_order_of_convergence(x: Tensor, method: str, order: int, rising: bool) -> None:
    lo, hi = 0.02, 20.0
    s0, s1 = (lo, hi) if rising else (hi, lo)
    start = x if rising else hi * x
    exact = gaussian_flow(start, s0, s1)
    errors = []
    for n in (64, 128, 256):
        sigmas = karras_grid(n + 1, lo, hi)[:-1]  # n steps, ending at sigma_min
        end = solve(gaussian, start, sigmas.flip(0) if rising else sigmas, method)
        errors.append(float((end - exact).abs().max() / exact.abs().max()))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.2), (errors, orders)
    assert errors[-1] < {1: 2e-2, 2: 5e-4}[order], errors


@pytest.mark.parametrize("method", ODE)
def test_a_grid_down_to_zero_ends_on_the_exact_flow(x: Tensor, method: str) -> None:
    exact = gaussian_flow(80 * x, 80.0, 0.0)
    end = solve(gaussian, 80 * x, karras_grid(256, 0.002, 80.0), method)
    torch.testing.assert_close(end, exact, atol={"ddim": 2e-2}.get(method, 1e-3), rtol=0)


def test_methods_agree_on_a_denoiser_that_is_not_linear(x: Tensor) -> None:
    reference = solve(mixture, 20 * x, karras_grid(2000, 0.002, 20.0), "heun")
    for method, steps in (("heun", 64), ("dpm++2m", 64), ("ddim", 2000)):
        end = solve(mixture, 20 * x, karras_grid(steps, 0.002, 20.0), method)
        torch.testing.assert_close(end, reference, atol=0.02, rtol=0, msg=lambda m, method=method: f"{method}: {m}")


@pytest.mark.parametrize("method", ODE)
def test_a_constant_prediction_is_reached_exactly_in_any_number_of_steps(x: Tensor, method: str) -> None:
    target = torch.full_like(x, 0.25)
    for steps in (1, 2, 3, 7):
        assert torch.equal(solve(lambda x, sigma: target, 10 * x, karras_grid(steps, 0.1, 10.0), method), target)


# --- inversion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "tolerance"), [("heun", 2e-3), ("dpm++2m", 2e-3), ("ddim", 8e-2)])
def test_inverting_and_sampling_again_gives_the_image_back(method: str, tolerance: float) -> None:
    g = torch.Generator().manual_seed(0)
    mode = torch.randint(0, 2, (64, 3, 8, 8), generator=g) * 1.2 - 0.6
    image = mode + 0.3 * torch.randn(mode.shape, generator=g, dtype=torch.float64)  # data that `mixture` is ideal for
    sigmas = karras_grid(128, 0.002, 20.0)
    latent = invert(mixture, image, sigmas, method)
    assert float((latent / 20).std()) == pytest.approx(
        1, abs=0.05
    )  # prior noise, as 20^2 is far above the data's variance
    torch.testing.assert_close(solve(mixture, latent, sigmas, method), image, atol=tolerance, rtol=0)


@pytest.mark.parametrize("method", ODE)
def test_the_step_from_sigma_zero_needs_no_evaluation(x: Tensor, method: str) -> None:
    seen: list[float] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        return gaussian(x, sigma)

    first = next(trajectory(denoise, x, [0.0, 0.002, 1.0], method))
    assert torch.equal(first, x)
    assert seen == []


def test_ancestral_sampling_cannot_be_inverted(x: Tensor) -> None:
    with pytest.raises(UserError, match="rising sigmas"):
        solve(gaussian, x, [0.01, 0.1, 1.0], "ddpm", lambda step: x)


# --- ancestral --------------------------------------------------------------------------------------------------------


def test_ancestral_variance_is_that_of_the_recursion_and_of_the_data() -> None:
    """Linear denoiser: each step's variance follows from the last one's; many steps give the data's."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(30_000, generator=g) * 20.0
    sigmas = karras_grid(400, 0.01, 20.0)
    end = solve(gaussian, start, sigmas, "ddpm", lambda step: torch.randn(len(start), generator=g))
    var = 20.0**2
    for s0, s1 in pairwise(sigmas.tolist()):
        a, r = SD**2 / (SD**2 + s0**2), (s1 / s0) ** 2
        var = (a + r * (1 - a)) ** 2 * var + s1**2 * (1 - r)
    assert float(end.var()) == pytest.approx(var, rel=0.033)  # four standard errors of 30,000 draws
    assert float(end.var()) == pytest.approx(SD**2, rel=0.06)
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.012)


def test_ancestral_variance_converges_to_the_data_without_noise_in_the_measurement() -> None:
    errors = []
    for steps in (32, 64, 128, 256):
        var = 20.0**2
        for s0, s1 in pairwise(karras_grid(steps, 0.01, 20.0).tolist()):
            unit = torch.ones(1, dtype=torch.float64)
            # One step of the sampler itself on a unit impulse gives its gain; on unit noise, its own deviation.
            zero = torch.zeros_like(unit)
            gain = solve(gaussian, MEAN + unit, [s0, s1], "ddpm", lambda step, z=zero: z) - MEAN
            own = solve(gaussian, MEAN + zero, [s0, s1], "ddpm", lambda step, u=unit: u) - MEAN
            var = float(gain) ** 2 * var + float(own) ** 2
        errors.append(abs(var - SD**2))
    assert all(b < 0.6 * a for a, b in pairwise(errors)), errors


def test_ancestral_without_noise_to_draw_from(x: Tensor) -> None:
    with pytest.raises(UserError, match="noise"):
        solve(gaussian, x, [1.0, 0.0], "ddpm")


# --- grids ------------------------------------------------------------------------------------------------------------


class LogNormal:
    def sigma(self, u: Tensor) -> Tensor:
        return torch.exp(-1.2 + 1.2 * math.sqrt(2) * torch.erfinv(2 * u - 1))


class ShiftedCosine:
    def sigma(self, u: Tensor) -> Tensor:
        return 2 * torch.tan(math.pi * u / 2)  # log-SNR = -2 log tan(pi u / 2) + 2 log(1 / 2)


class Clamped(ShiftedCosine):
    """As a schedule that keeps within its denoiser's limits."""

    def __init__(self, lo: float, hi: float) -> None:
        self.lo, self.hi = lo, hi

    def sigma(self, u: Tensor) -> Tensor:
        return super().sigma(u).clamp(self.lo, self.hi)


def test_karras_grid_is_the_formula() -> None:
    sigmas = karras_grid(18, 0.002, 80.0)
    assert sigmas.shape == (19,)
    assert sigmas[0] == 80.0
    assert sigmas[17] == pytest.approx(0.002)
    assert sigmas[18] == 0
    assert float(sigmas[5]) == pytest.approx((80 ** (1 / 7) + 5 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)


def test_native_grid_is_even_in_the_time_of_a_cosine_schedule() -> None:
    sigmas = native_grid(ShiftedCosine(), 32, 1e-4, 1e4)
    time = torch.atan(sigmas / 2) * 2 / math.pi
    torch.testing.assert_close(time[:-1].diff(), torch.full((31,), -1 / 32, dtype=torch.float64), atol=1e-4, rtol=0)
    assert sigmas[-1] == 0


@pytest.mark.parametrize("schedule", [LogNormal(), ShiftedCosine()])
@pytest.mark.parametrize(("lo", "hi"), [(0.002, 80.0), (0.2, 0.9), (1e-6, 1e6)])
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1000])
def test_native_grid_falls_strictly_within_its_limits(schedule: Any, lo: float, hi: float, steps: int) -> None:
    sigmas = native_grid(schedule, steps, lo, hi)
    assert len(sigmas) == steps + 1
    if isinstance(schedule, ShiftedCosine):
        torch.testing.assert_close(native_grid(Clamped(lo, hi), steps, lo, hi), sigmas)
    assert sigmas.isfinite().all()
    assert (sigmas.diff() < 0).all()
    assert sigmas[0] == hi
    assert sigmas[-2] >= lo
    assert sigmas[-1] == 0


def test_native_grid_samples(x: Tensor) -> None:
    start = 80 * x
    end = solve(gaussian, start, native_grid(ShiftedCosine(), 200, 0.002, 80.0), "heun")
    torch.testing.assert_close(end, gaussian_flow(start, 80.0, 0.0), atol=5e-3, rtol=0)


# --- diffusers --------------------------------------------------------------------------------------------------------


def diffusers_run(
    scheduler: Any, denoise: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int, vp: bool
) -> tuple[Tensor, Tensor]:
    """Drive a diffusers scheduler with predictions of the noise: (its sigmas without repeats, final x)."""
    scheduler.set_timesteps(steps)
    sigmas = torch.unique_consecutive(scheduler.sigmas).double()
    x = noise * sigmas[0]
    if vp:
        x = x / (1 + sigmas[0] ** 2).sqrt()
    generator = torch.Generator().manual_seed(5)
    keywords = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        sigma = float(scheduler.sigmas[scheduler.step_index or 0])
        x_ve = x * math.sqrt(1 + sigma**2) if vp else x
        x = scheduler.step((x_ve - denoise(x_ve, sigma)) / sigma, t, x, **keywords).prev_sample
    return sigmas, x


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy 2 on diffusers' own lines
@pytest.mark.parametrize("steps", [5, 24])
@pytest.mark.parametrize(
    ("method", "name", "settings"),
    [
        ("ddim", "EulerDiscreteScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "zero"}),
        ("heun", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("ddpm", "EulerAncestralDiscreteScheduler", {}),
        (
            "dpm++2m",
            "DPMSolverMultistepScheduler",
            {
                "use_karras_sigmas": True,
                "final_sigmas_type": "zero",
                "algorithm_type": "dpmsolver++",
                "solver_order": 2,
            },
        ),
    ],
)
def test_the_same_pictures_as_diffusers(method: str, name: str, settings: dict[str, Any], steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(**settings)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    sigmas, expected = diffusers_run(scheduler, mixture, noise, steps, vp=method == "dpm++2m")
    assert len(sigmas) == steps + 1
    if settings:
        ours = karras_grid(steps, float(sigmas[-2]), float(sigmas[0]))
        torch.testing.assert_close(ours, sigmas, rtol=2e-5, atol=0)
    g = torch.Generator().manual_seed(5)
    got = solve(mixture, noise * float(sigmas[0]), sigmas, method, lambda step: torch.randn(noise.shape, generator=g))
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)


# --- sample(): randomness, batches, limits ----------------------------------------------------------------------------


def test_initial_noise_is_keyed_by_seed_and_index_alone() -> None:
    whole = initial_noise((6, 4), 3, range(10))
    assert torch.equal(initial_noise((6, 4), 3, [7, 2]), whole[[7, 2]])
    assert not torch.equal(initial_noise((6, 4), 4, [7]), whole[[7]])
    assert whole.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_same_image_at_any_batch_size_and_order(sampler: str, guidance: float) -> None:
    net, cond = ConvDenoiser(), labels(7)
    settings: dict[str, Any] = {"size": (8, 6), "seed": 1, "steps": 6, "sampler": sampler, "guidance": guidance}
    whole = sample(net, cond, **settings)
    assert whole.images.shape == (7, 3, 8, 6)
    assert whole.images.abs().max() <= 1
    assert whole.images[0].std() > 0.01
    assert not torch.allclose(whole.images[0], whole.images[1], atol=0.01)
    for batch in (1, 3):
        torch.testing.assert_close(sample(net, cond, batch=batch, **settings).images, whole.images, atol=2e-5, rtol=0)
    order = torch.tensor([4, 0, 6])
    some = sample(net, cond[order], index=order, **settings)
    torch.testing.assert_close(some.images, whole.images[order], atol=2e-5, rtol=0)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_the_same_settings_give_the_same_bytes(sampler: str) -> None:
    net, cond = ConvDenoiser(), labels(3)
    a, b = (sample(net, cond, size=(8, 8), steps=5, sampler=sampler).images for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.allclose(a, sample(net, cond, size=(8, 8), steps=5, sampler=sampler, seed=1).images, atol=0.01)


def test_ancestral_noise_differs_by_step_and_index() -> None:
    class Zero:
        sigma_min, sigma_max = 0.01, 10.0
        seen: list[Tensor] = []  # noqa: RUF012

        def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            self.seen.append(x / sigma[0])
            return torch.zeros_like(x)

    sample(Zero(), labels(3), size=(16, 16), steps=6, sampler="ddpm")
    fresh = [b - a for a, b in pairwise(Zero.seen)]
    rows = torch.stack([x.flatten() for step in fresh[2:] for x in step])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    # Neighbouring steps share what the step between them undid; rows of different images share nothing.
    other = torch.arange(len(rows))[:, None] % 3 != torch.arange(len(rows)) % 3
    assert correlation[other].abs().max() < 0.15
    assert correlation.abs().max() < 0.8


def test_ancestral_noise_is_a_function_of_seed_step_and_index() -> None:
    noise = ancestral_noise((3, 4, 6), 1, [5, 2, 9], torch.device("cpu"))
    assert torch.equal(noise(3)[[2, 1]], ancestral_noise((3, 4, 6), 1, [9, 2], torch.device("cpu"))(3))
    for other in (ancestral_noise((3, 4, 6), 2, [5, 2, 9], torch.device("cpu"))(3), noise(4), noise(3).flip(0)):
        assert (noise(3) - other).abs().amin((1, 2, 3)).shape == (3,) and not torch.equal(noise(3)[0], other[0])
    net = ConvDenoiser()
    first, second = (sample(net, labels(2), size=(4, 4), seed=s, steps=3, sampler="ddpm").images for s in (0, 1))
    assert not torch.allclose(first, second, atol=1e-3)


def test_slices_cover_everything_once_and_in_order() -> None:
    for count, batch in ((0, 4), (1, 4), (8, 4), (9, 4), (3, 1)):
        found = slices(count, batch)
        assert [i for s in found for i in range(count)[s]] == list(range(count))
        assert all(0 < s.stop - s.start <= batch and s.stop <= count for s in found)
        assert len(found) == math.ceil(count / batch)
    with pytest.raises(UserError, match="batch=0: expected 1 or more"):
        slices(4, 0)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("grid", ["karras", LogNormal(), [40.0, 1.0, 0.1, 0.0]], ids=["karras", "native", "given"])
def test_few_steps_are_finite_and_cost_what_they_say(sampler: str, steps: int, grid: Any) -> None:
    net = ConvDenoiser()
    progress: list[tuple[int, int]] = []
    got = sample(
        net,
        labels(3),
        size=(4, 4),
        steps=steps,
        sampler=sampler,
        grid=grid,
        batch=2,
        progress=lambda done, total: progress.append((done, total)),
    )
    steps = 3 if isinstance(grid, list) else steps
    assert got.images.isfinite().all()
    assert got.nfe == (2 * steps - 1 if sampler == "heun" else steps)
    assert net.rows == [2] * got.nfe + [1] * got.nfe
    assert progress == [(i + 1, 2 * steps) for i in range(2 * steps)]


def test_one_step_is_the_prediction_from_pure_noise() -> None:
    net, cond = ConvDenoiser(), labels(3)
    x = net.sigma_max * initial_noise((4, 4), 0, range(3))
    with torch.no_grad():
        expected = net(x, torch.full((3,), net.sigma_max), cond)
    for sampler in SAMPLERS:
        assert torch.equal(sample(net, cond, size=(4, 4), steps=1, sampler=sampler).images, expected.clamp(-1, 1))


def test_guidance_settings_reach_the_network() -> None:
    net, cond = ConvDenoiser(), labels(2)
    plain = sample(net, cond, size=(4, 4), steps=4)
    assert plain.nfe == 4
    guided = sample(net, cond, size=(4, 4), steps=4, guidance=3.0)
    assert guided.nfe == 8
    assert not torch.allclose(plain.images, guided.images, atol=1e-3)
    interval = sample(net, cond, size=(4, 4), steps=4, guidance=3.0, interval=(0.0, 20.0))
    assert interval.nfe == 7  # the first level is above the interval
    itself = sample(net, cond, size=(4, 4), steps=4, guidance=3.0, guide=net)
    assert itself.nfe == 8
    torch.testing.assert_close(itself.images, plain.images, atol=2e-5, rtol=0)


def test_a_threshold_scales_what_would_be_clamped() -> None:
    class Ramp(ConvDenoiser):
        def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            return torch.linspace(0, 4, x[0].numel()).view(1, *x.shape[1:]).expand_as(x)

    ramp = torch.linspace(0, 4, 48).view(1, 3, 4, 4)
    for threshold, want in ((None, ramp.clamp(max=1)), (1.0, ramp / 4)):
        images = sample(Ramp(), labels(1), size=(4, 4), steps=3, threshold=threshold).images
        torch.testing.assert_close(images, want)


def test_images_carry_no_gradient_and_can_be_trained_on() -> None:
    images = sample(ConvDenoiser(), labels(2), size=(4, 4), steps=2).images
    assert not images.requires_grad
    weight = torch.ones(1, requires_grad=True)
    (images * weight).sum().backward()  # would fail on an inference tensor
    assert weight.grad is not None


def test_solve_is_differentiable(x: Tensor) -> None:
    start = (10 * x).requires_grad_()
    solve(gaussian, start, karras_grid(4, 0.1, 10.0)).sum().backward()
    assert start.grad is not None
    assert start.grad.isfinite().all()


class Broken(ConvDenoiser):
    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return x * math.nan


class NoLimits(ConvDenoiser):
    sigma_min, sigma_max = 0.0, 80.0


@pytest.mark.parametrize(
    ("net", "settings", "words"),
    [
        (ConvDenoiser, {"sampler": "euler"}, "'euler' does not exist; expected one of dpm\\+\\+2m, heun, ddim, ddpm"),
        (ConvDenoiser, {"grid": "exponential"}, "expected 'karras'"),
        (ConvDenoiser, {"grid": [1.0]}, "two or more"),
        (ConvDenoiser, {"grid": [0.1, 1.0]}, "that fall"),
        (ConvDenoiser, {"grid": [1.0, 0.1]}, "the last of them 0"),
        (ConvDenoiser, {"grid": [1.0, 1.0, 0.0]}, "only fall"),
        (ConvDenoiser, {"grid": [math.inf, 1.0, 0.0]}, "finite"),
        (ConvDenoiser, {"steps": 0}, "steps=0"),
        (ConvDenoiser, {"size": (0, 4)}, "size="),
        (ConvDenoiser, {"batch": 0}, "batch=0"),
        (ConvDenoiser, {"index": [1, 2, 3]}, "2 conditions and 3 indices"),
        (Broken, {}, "non-finite"),
        (NoLimits, {}, "0 < sigma_min < sigma_max"),
    ],
)
def test_mistakes_are_told_in_one_line(net: type[ConvDenoiser], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        sample(net(), labels(2), **{"size": (4, 4), "steps": 3} | settings)
    assert "\n" not in str(caught.value)


def test_an_image_may_be_one_pixel() -> None:
    assert sample(ConvDenoiser(), labels(1), size=(1, 1), steps=1).images.shape == (1, 3, 1, 1)


def test_no_conditions_at_all() -> None:
    with pytest.raises(UserError, match="0 conditions"):
        sample(ConvDenoiser(), labels(0), size=(4, 4))


def test_solvers_do_not_need_the_network_code() -> None:
    """Editing and inversion import the solvers; nothing of the models but the condition may come with them."""
    module = importlib.import_module("pixelgrow.diffusion.sampling")
    assert not any(hasattr(module, name) for name in ("Denoiser", "UViT", "NoiseSchedule"))
