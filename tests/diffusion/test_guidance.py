"""Guidance against closed forms for Gaussian data, and what each setting costs in evaluations."""

import pytest
import torch
from torch import Tensor

from pixelgrow.diffusion.guidance import Guided, dynamic_threshold
from pixelgrow.diffusion.sampling import karras_grid
from pixelgrow.diffusion.solvers import solve
from pixelgrow.errors import UserError
from pixelgrow.models.cond import Cond

MU = 0.7  # the conditional mean
S_COND, S_NULL = 0.3, 0.8  # the deviations with and without the condition


def labels(n: int) -> Cond:
    return Cond(None, None, None, torch.zeros(n, dtype=torch.bool), torch.arange(n))


class GaussianPair:
    """The ideal denoiser of N(mean, s_cond^2) under a condition and N(0, s_null^2) without; records its calls."""

    def __init__(self, mean: float = MU, s_cond: float = S_COND, s_null: float = S_NULL) -> None:
        self.mean, self.s_cond, self.s_null = mean, s_cond, s_null
        self.rows: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        self.rows.append(len(x))
        assert len(x) == len(sigma) == len(cond)
        null = cond.null.view(-1, 1, 1, 1)
        mean = torch.where(null, 0.0, self.mean).to(x.dtype)
        var = torch.where(null, self.s_null, self.s_cond).to(x.dtype) ** 2
        s2 = sigma.view(-1, 1, 1, 1) ** 2
        return (x * var + mean * s2) / (var + s2)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_weight_one_is_the_conditional_denoiser_in_one_evaluation(x: Tensor) -> None:
    net = GaussianPair()
    denoise = Guided(net, labels(3))
    expected = net(x, x.new_full((3,), 0.5), labels(3))
    assert torch.equal(denoise(x, 0.5), expected)
    assert denoise.nfe == 1


def test_weight_zero_is_the_unconditional_denoiser(x: Tensor) -> None:
    net = GaussianPair()
    expected = net(x, x.new_full((3,), 0.5), labels(3).dropped())
    torch.testing.assert_close(Guided(net, labels(3), guidance=0.0)(x, 0.5), expected)


def test_classifier_free_guidance_is_one_call_of_twice_the_rows(x: Tensor) -> None:
    net = GaussianPair()
    denoise = Guided(net, labels(3), guidance=2.5)
    got = denoise(x, 0.5)
    assert net.rows == [6]
    assert denoise.nfe == 2
    sigma = x.new_full((3,), 0.5)
    cond, null = net(x, sigma, labels(3)), net(x, sigma, labels(3).dropped())
    torch.testing.assert_close(got, null + 2.5 * (cond - null))


def test_condition_already_null_stays_null(x: Tensor) -> None:
    net = GaussianPair()
    null = labels(3).dropped()
    expected = net(x, x.new_full((3,), 0.5), null)
    torch.testing.assert_close(Guided(net, null, guidance=4.0)(x, 0.5), expected)


@pytest.mark.parametrize("guidance", [0.5, 1.0, 1.75, 4.0])
def test_guided_flow_of_equal_deviations_shifts_the_mean(x: Tensor, guidance: float) -> None:
    """With one deviation s, guidance is the ideal denoiser of the mean w*mu: the flow's end is known."""
    s, start = 0.4, 80.0
    denoise = Guided(GaussianPair(s_cond=s, s_null=s), labels(3), guidance=guidance)
    end = solve(denoise, start * x, karras_grid(200, 0.002, start), "heun")
    mean = guidance * MU
    expected = mean + (start * x - mean) * s / (s**2 + start**2) ** 0.5
    torch.testing.assert_close(end, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("guidance", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("interval", [None, (0.2, 2.0)])
def test_guided_flow_of_unequal_deviations(x: Tensor, guidance: float, interval: tuple[float, float] | None) -> None:
    """Zero means: dx/dsigma is linear in x, so x(s1)/x(s0) = r_cond^w r_null^(1-w), r^2 = (s^2 + s1^2)/(s^2 + s0^2)."""

    def growth(s: float, s0: float, s1: float) -> float:
        return float((s**2 + s1**2) / (s**2 + s0**2)) ** 0.5

    def flow(w: float, s0: float, s1: float) -> float:
        return growth(S_COND, s0, s1) ** w * growth(S_NULL, s0, s1) ** (1 - w)

    denoise = Guided(GaussianPair(mean=0.0), labels(3), guidance=guidance, interval=interval)
    # The grid has both limits on it, twice over: the solver must not step across the discontinuity.
    cuts = [20.0, 2.0, 0.2, 0.01]
    w = [guidance if interval is None else v for v in (1.0, guidance, 1.0)]
    end, factor = x, 1.0
    for s0, s1, weight in zip(cuts[:-1], cuts[1:], w, strict=True):
        inside = torch.linspace(0, 1, 101, dtype=torch.float64)
        sigmas = s0 ** (1 - inside) * s1**inside
        # Heun evaluates at both ends, and (lo, hi] is guided at hi and not at lo: step off the limits by a hair.
        sigmas[0], sigmas[-1] = s0 * (1 - 1e-9), s1 * (1 + 1e-9)
        end, factor = solve(denoise, end, sigmas, "heun"), factor * flow(weight, s0, s1)
    torch.testing.assert_close(end, x * factor, atol=1e-3 * factor, rtol=1e-3)


def test_interval_is_open_below_closed_above_and_single_outside(x: Tensor) -> None:
    net = GaussianPair()
    denoise = Guided(net, labels(3), guidance=3.0, interval=(0.2, 2.0))
    for sigma in (5.0, 2.0, 0.5, 0.2, 0.1):
        denoise(x, sigma)
    assert net.rows == [3, 6, 6, 3, 3]
    assert denoise.nfe == 7


def test_autoguidance_by_a_second_denoiser_under_the_same_condition(x: Tensor) -> None:
    strong, weak = GaussianPair(), GaussianPair(mean=0.5, s_cond=0.5)
    denoise = Guided(strong, labels(3), guidance=2.0, guide=weak, interval=(0.1, 1.0))
    sigma = x.new_full((3,), 0.5)
    d, d_weak = strong(x, sigma, labels(3)), weak(x, sigma, labels(3))
    torch.testing.assert_close(denoise(x, 0.5), d_weak + 2.0 * (d - d_weak))
    torch.testing.assert_close(denoise(x, 3.0), strong(x, x.new_full((3,), 3.0), labels(3)))
    assert denoise.nfe == 3


def test_autoguidance_by_a_method_of_the_denoiser(x: Tensor) -> None:
    class Grown(GaussianPair):
        def base(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            return 0.5 * self(x, sigma, cond)

    grown = Grown()
    d = grown(x, x.new_full((3,), 0.5), labels(3))
    torch.testing.assert_close(Guided(grown, labels(3), guidance=2.0, guide=grown.base)(x, 0.5), 1.5 * d)


def test_a_guide_that_goes_unused_is_refused() -> None:
    with pytest.raises(UserError, match="guidance=1 with a guide"):
        Guided(GaussianPair(), labels(3), guidance=1.0, guide=GaussianPair())


def test_low_precision_predictions_come_back_in_the_precision_of_x() -> None:
    denoise = Guided(lambda x, sigma, cond: x.bfloat16(), labels(2), guidance=3.0)
    assert denoise(torch.ones(2, 3, 2, 2), 1.0).dtype == torch.float32


def test_dynamic_threshold_against_the_quantile() -> None:
    x0 = torch.randn(5, 3, 10, 10, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [0.1, 0.5, 1.0, 2.0, 9.0]
    ).view(-1, 1, 1, 1)
    got = dynamic_threshold(x0, 0.995)
    for image, result in zip(x0, got, strict=True):
        s = max(1.0, float(image.abs().flatten().quantile(0.995, interpolation="higher")))
        assert abs(s - float(image.abs().flatten().sort().values[299 - 1])) < 1e-6 or s == 1.0
        torch.testing.assert_close(result, image.clamp(-s, s) / s)
    assert got.abs().max() <= 1


def test_dynamic_threshold_at_its_ends() -> None:
    x0 = torch.tensor([0.1, -4.0, 2.0, 1.0]).view(1, 1, 2, 2)
    torch.testing.assert_close(dynamic_threshold(x0, 1.0), x0 / 4)  # the largest magnitude
    torch.testing.assert_close(dynamic_threshold(x0, 1e-9), x0.clamp(-1, 1))  # the smallest, so s = 1


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_threshold_holds_with_and_without_guidance(x: Tensor, guidance: float) -> None:
    denoise = Guided(GaussianPair(mean=5.0), labels(3), guidance=guidance, threshold=0.9)
    assert denoise(x, 0.5).abs().max() <= 1


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"guidance": -1.0}, "guidance=-1"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"guidance": 2.0, "interval": (2.0, 1.0)}, "lo < hi"),
        ({"guidance": 2.0, "interval": (-1.0, 1.0)}, "lo < hi"),
        ({"threshold": 0.0}, "percentile"),
        ({"threshold": 99.5}, "percentile"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Guided(GaussianPair(), labels(2), **settings)  # type: ignore[arg-type]
