"""What the theory of one-step distillation promises, on problems whose answers are known (PaGoDA, arXiv 2405.14822)."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pixelgrow.diffusion.sampling import karras_grid
from pixelgrow.diffusion.solvers import invert, solve
from pixelgrow.onestep.losses import hinge_discriminator, hinge_generator

ROOT = Path(__file__).parents[2]

# --- inversion of Gaussian data, from one narrow direction to one as wide as the data range ---------------------------

MEAN = torch.tensor([-0.8, 0.3, 0.0, 0.5], dtype=torch.float64)
SD = torch.tensor([0.05, 0.3, 0.5, 1.0], dtype=torch.float64)
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


def denoise(x: Tensor, sigma: float) -> Tensor:
    """The ideal denoiser of N(MEAN, SD^2)."""
    return (x * SD**2 + MEAN * sigma**2) / (SD**2 + sigma**2)


@pytest.fixture
def points() -> Tensor:
    return MEAN + SD * torch.randn(64, 4, dtype=torch.float64)


def latents(points: Tensor, steps: int, method: str) -> Tensor:
    """By inversion, of about unit variance."""
    return invert(denoise, points, karras_grid(steps, SIGMA_MIN, SIGMA_MAX), method) / SIGMA_MAX


def exact_latents(points: Tensor) -> Tensor:
    """x_T = m + (x_t - m) sqrt((s^2 + T^2) / (s^2 + t^2)), the points being the state at t = sigma_min."""
    flow = MEAN + (points - MEAN) * ((SD**2 + SIGMA_MAX**2) / (SD**2 + SIGMA_MIN**2)).sqrt()
    return flow / SIGMA_MAX


@pytest.mark.parametrize(("method", "order", "steps"), [("ddim", 1, 1000), ("heun", 2, 700)])
def test_inversion_converges_to_the_closed_form_with_its_order(
    points: Tensor, method: str, order: int, steps: int
) -> None:
    exact = exact_latents(points)
    found = [latents(points, n, method) for n in (steps // 2, steps, 2 * steps)]
    errors = [float((z - exact).abs().max()) for z in found]
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([order, order], abs=0.02)
    # Richardson: without the leading term of its error, which the order tells, what is left of the limit.
    limit = (2**order * found[2] - found[1]) / (2**order - 1)
    torch.testing.assert_close(limit, exact, atol=1e-4, rtol=0)
    if method == "heun":
        torch.testing.assert_close(found[2], exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("heun", 3)])
def test_the_round_trip_converges_faster_than_heun_itself(points: Tensor, method: str, order: int) -> None:
    """Heun there and back on the same grid: the leading terms of both errors, of order 2, cancel."""
    errors = []
    for steps in (100, 200, 400):
        grid = karras_grid(steps, SIGMA_MIN, SIGMA_MAX)
        latent = invert(denoise, points, grid, method)
        errors.append(float((solve(denoise, latent, grid[:-1], method) - points).abs().max()))
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([order, order], abs=0.1)


def test_the_papers_40_levels_are_enough(points: Tensor) -> None:
    grid = karras_grid(40, SIGMA_MIN, SIGMA_MAX)
    calls: list[float] = []

    def counted(x: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return denoise(x, sigma)

    latent = invert(counted, points, grid, "heun")
    back = solve(counted, latent, grid, "heun")
    assert len(calls) == 78 + 79  # the step from sigma 0 costs none, the step to it one
    assert 10 * math.log10(4 / float((back - points).square().mean())) > 60  # PSNR in dB of data in [-1, 1]


# --- Dirac-GAN with a reconstruction loss -----------------------------------------------------------------------------
# Data at 0, generator G = theta, discriminator D(x) = psi x (Mescheder et al., arXiv 1801.04406), and the
# reconstruction loss eta theta^2 with adv's weight 1. With an adversarial loss whose slope at logit 0 is k, the field
# (-dL_G/dtheta, -dL_D/dpsi) has the Jacobian ((-2 eta, k), (-k, 0)) at the equilibrium: eigenvalues
# -eta +- sqrt(eta^2 - k^2). PaGoDA's eta^2 - 1/4 is the logistic loss, whose slope there is sigmoid(0) = 1/2; the
# linear (Wasserstein) loss has k = 1 everywhere, and so has our hinge while logits are within its margin.


def linear(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    return (fake - real).mean(), -fake.mean()


def logistic(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Not saturating, as in the first GAN (arXiv 1406.2661)."""
    return (F.softplus(-real) + F.softplus(fake)).mean(), F.softplus(-fake).mean()


def hinge(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    return hinge_discriminator([real], [fake]), hinge_generator([fake])


LOSSES = {"linear": (linear, 1.0), "logistic": (logistic, 0.5), "hinge": (hinge, 1.0)}


def field(state: Tensor, loss: str, eta: float) -> Tensor:
    """The direction (2,) in which state = (theta, psi) moves: both networks descend their own loss at once."""
    theta, psi = state
    of_d, of_g = LOSSES[loss][0](psi * torch.zeros(1, 1, dtype=state.dtype), (psi * theta).view(1, 1))
    of_g = of_g + eta * theta**2
    by_theta = torch.autograd.grad(of_g, state, create_graph=True)[0][0]
    return -torch.stack([by_theta, torch.autograd.grad(of_d, state, create_graph=True)[0][1]])


def flow(loss: str, eta: float, time: float, step: float) -> Tensor:
    """States (steps + 1, 2) along the field from (0.02, 0), by the classical Runge-Kutta method."""

    def slope(state: Tensor) -> Tensor:
        return field(state.detach().requires_grad_(), loss, eta).detach()

    states = [torch.tensor([0.02, 0.0], dtype=torch.float64)]
    for _ in range(round(time / step)):
        state = states[-1]
        a = slope(state)
        b = slope(state + step / 2 * a)
        c = slope(state + step / 2 * b)
        states.append(state + step / 6 * (a + 2 * b + 2 * c + slope(state + step * c)))
    return torch.stack(states)


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 0.7, 1.0, 2.0])
def test_dirac_gan_eigenvalues(loss: str, eta: float) -> None:
    """The logistic loss gives exactly PaGoDA's -eta +- sqrt(eta^2 - 1/4); linear and hinge -eta +- sqrt(eta^2 - 1)."""
    origin = torch.zeros(2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda s: field(s, loss, eta), origin)
    assert isinstance(jacobian, Tensor)
    k = LOSSES[loss][1]
    root = torch.tensor(eta**2 - k**2, dtype=torch.complex128).sqrt()
    torch.testing.assert_close(jacobian, torch.tensor([[-2 * eta, k], [-k, 0]], dtype=torch.float64))
    found = torch.linalg.eigvals(jacobian)
    order = (found.real + found.imag).argsort()
    expected = torch.stack([-eta - root, -eta + root])
    torch.testing.assert_close(found[order], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_dirac_gan_turns_forever_without_reconstruction_and_converges_with_any(loss: str) -> None:
    k = LOSSES[loss][1]
    turn = flow(loss, 0.0, 2 * math.pi / k, step=0.02 * math.pi / k)
    torch.testing.assert_close(turn.norm(dim=1), torch.full((101,), 0.02, dtype=torch.float64), rtol=5e-3, atol=0)
    torch.testing.assert_close(turn[-1], turn[0], rtol=0, atol=1e-4)
    ends = {}
    for share in (0.2, 0.5, 1.0, 2.0, 4.0):
        eta = share * k  # times in units of 1/k: the same motion for every loss
        end = flow(loss, eta, 10 / k, step=0.1 / k)[-1]
        jacobian = torch.tensor([[-2 * eta, k], [-k, 0]], dtype=torch.float64)
        torch.testing.assert_close(end, torch.linalg.matrix_exp(10 / k * jacobian) @ turn[0], rtol=0, atol=1e-6)
        ends[share] = float(end.norm() / turn[0].norm())
    assert max(ends.values()) < 0.4
    assert min(ends, key=lambda share: ends[share]) == 1.0  # critical damping at eta = k: 1/2 for the logistic loss


# --- the biased teacher -----------------------------------------------------------------------------------------------


def test_a_quick_run_of_the_biased_teacher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import biased_teacher

    biased_teacher.main(["--quick", "--figures", str(tmp_path)])
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert rows[0] == ["bias", "teacher", *biased_teacher.METHODS]
    assert [row[0] for row in rows[2:]] == ["0", "2"]
    exact, biased = ([float(cell) for cell in row[1:]] for row in rows[2:])
    assert 0 < exact[0] < 30  # the exact teacher's samples are data, but for the draw and the grid
    assert biased[0] == pytest.approx(400, abs=30)
    assert all(0 < a < 100 < b < 600 for a, b in zip(exact[1:], biased[1:], strict=True))  # few steps: all rise with it
    assert (tmp_path / "biased-teacher.png").stat().st_size > 1000


@pytest.mark.parametrize(("rec", "dstl", "expected"), [(0.1, 0.3, True), (0.1, 0.29, False), (-0.1, -0.01, False)])
def test_the_biased_teachers_claim_is_threefold_growth(
    monkeypatch: pytest.MonkeyPatch, rec: float, dstl: float, expected: bool
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import biased_teacher

    distances = {"rec+adv": [[0.1, 0.3], [9.0, 9.0], [0.1 + rec, 0.3 + rec]], "dstl+adv": [[0.2, 0.2], [0.0, 0.0]]}
    distances["dstl+adv"].append([0.2 + dstl + 1e-9, 0.2 + dstl + 1e-9])
    assert biased_teacher.holds(distances) is expected
