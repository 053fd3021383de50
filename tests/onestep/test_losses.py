"""The losses of one-step distillation against closed forms, brute force, scipy and plain autograd."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from pixelgrow.onestep.losses import (
    DRAWS,
    OutputLoss,
    adaptive_weight,
    at_output,
    balanced,
    diff_augment,
    feature_distance,
    guidance_weights,
    hinge_discriminator,
    hinge_generator,
)

ALL: Any = ("colour", "translation", "cutout")


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- distances and adversarial losses ---------------------------------------------------------------------------------


def test_feature_distance_is_the_angle_between_tokens() -> None:
    a, b = [doubles(3, 5, 8), doubles(3, 2, 4)], [doubles(3, 5, 8), doubles(3, 2, 4)]
    expected = sum((2 - 2 * F.cosine_similarity(p, q, dim=-1)).mean(1) for p, q in zip(a, b, strict=True)) / 2
    torch.testing.assert_close(feature_distance(a, b), expected)
    opposite = [-7 * p for p in a]
    torch.testing.assert_close(feature_distance(a, opposite), torch.full((3,), 4.0, dtype=torch.float64))


def test_feature_distance_has_a_gradient_at_tokens_of_zero() -> None:
    a = torch.zeros(2, 3, 4, requires_grad=True)
    feature_distance([a], [torch.zeros(2, 3, 4)]).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all()


def test_hinge_is_the_formula_and_heads_weigh_the_same() -> None:
    real, fake = [doubles(2, 3), doubles(2, 7)], [doubles(2, 3), doubles(2, 7)]
    expected = np.mean(
        [
            np.mean([max(0, 1 - float(v)) for v in r.flatten()]) + np.mean([max(0, 1 + float(v)) for v in f.flatten()])
            for r, f in zip(real, fake, strict=True)
        ]
    )
    assert float(hinge_discriminator(real, fake)) == pytest.approx(expected)
    assert float(hinge_generator(fake)) == pytest.approx(-np.mean([float(f.mean()) for f in fake]))
    certain = [torch.full((2, 3), 1.5)]
    assert hinge_discriminator(certain, [-c for c in certain]) == 0


# --- the adaptive weight ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norms", "expected"), [("plain", 0.6), ("squared", 1.8)])
def test_adaptive_weight_of_both_norms(norms: Any, expected: float) -> None:
    rec, adv = torch.tensor(6.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    weight = adaptive_weight(rec, adv, norms)
    assert float(weight) == pytest.approx(expected)
    assert not weight.requires_grad


@pytest.mark.parametrize("norms", ["plain", "squared"])
@pytest.mark.parametrize(("rec", "adv", "expected"), [(1.0, 0.0, 10.0), (0.0, 1.0, 0.01), (0.0, 0.0, 0.01)])
def test_adaptive_weight_is_finite_where_a_gradient_is_zero(
    norms: Any, rec: float, adv: float, expected: float
) -> None:
    assert float(adaptive_weight(torch.tensor(rec), torch.tensor(adv), norms)) == pytest.approx(expected)


class Net(nn.Module):
    """A small generator whose last layer lies under a skip, as under preconditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 1)
        self.passes = 0

    def _count(self, _: Tensor) -> None:
        self.passes += 1

    def forward(self, z: Tensor) -> Tensor:
        h = self.body(z)
        h.register_hook(self._count)
        return 0.1 * z + self.last(F.silu(h))


@pytest.mark.parametrize("norms", ["plain", "squared"])
@pytest.mark.parametrize("adv_scale", [1.0, 0.0, 1e-4], ids=["free", "no adv gradient", "clipped"])
def test_balanced_is_the_naive_gradient_in_one_backward(norms: Any, adv_scale: float) -> None:
    net = Net().double()
    naive = copy.deepcopy(net)
    x, z = doubles(4, 3, 5, 5), doubles(8, 3, 5, 5)
    critic = nn.Conv2d(3, 4, 3).double()

    def rec_loss(y: Tensor) -> Tensor:
        return (y - x).square().mean()

    def adv_loss(y: Tensor) -> Tensor:
        return adv_scale * hinge_generator([critic(y).flatten(1).tanh()])

    y_rec, y_adv = net(z).chunk(2)  # one batch, one graph
    rec, adv = at_output(y_rec, rec_loss), at_output(y_adv, adv_loss)
    got = balanced(rec, adv, net.last.weight, norms)
    assert net.passes == 0  # lambda cost no pass through the body
    got.loss.backward()
    assert net.passes == 1
    assert all(p.grad is None for p in critic.parameters())

    y_rec, y_adv = naive(z).chunk(2)
    losses = rec_loss(y_rec), adv_loss(y_adv)
    norm_rec, norm_adv = (torch.autograd.grad(v, naive.last.weight, retain_graph=True)[0].norm() for v in losses)
    ratio = float(norm_rec / norm_adv) if adv_scale else math.inf
    weight = min(max(0.2 * (ratio**2 if norms == "squared" else ratio), 0.01), 10.0)
    total = losses[0] + weight * losses[1]
    total.backward()
    assert float(got.weight) == pytest.approx(weight, rel=1e-9)
    torch.testing.assert_close(got.loss, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.stack([rec.value, adv.value]), torch.stack(losses).detach())
    for p, q in zip(net.parameters(), naive.parameters(), strict=True):
        assert q.grad is not None and q.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-6 * float(q.grad.abs().max()))


def test_a_loss_at_the_output_alone_is_its_plain_gradient() -> None:
    net = Net().double()
    y = net(doubles(2, 3, 5, 5))
    part: OutputLoss = at_output(y, lambda y: y.pow(4).mean())
    weights = list(net.parameters())
    got = torch.autograd.grad(part.loss, weights, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(y.pow(4).mean(), weights), strict=True):
        torch.testing.assert_close(a, b)


# --- differentiable augmentation --------------------------------------------------------------------------------------


def reference(image: Tensor, draws: list[float]) -> Tensor:
    """DiffAugment of one image (3,H,W), pixel by pixel after the authors' code."""
    b, s, c, ty, tx, cy, cx = draws
    image = image + b - 0.5
    grey = image.mean(0)
    image = (image - grey) * 2 * s + grey
    image = (image - image.mean()) * (c + 0.5) + image.mean()
    _, h, w = image.shape
    sy, sx = int(h * 0.125 + 0.5), int(w * 0.125 + 0.5)
    dy, dx = int(ty * (2 * sy + 1)) - sy, int(tx * (2 * sx + 1)) - sx
    box_y, box_x = int(h * 0.5 + 0.5), int(w * 0.5 + 0.5)
    top, left = int(cy * (h + 1 - box_y % 2)) - box_y // 2, int(cx * (w + 1 - box_x % 2)) - box_x // 2
    out = torch.zeros_like(image)
    for i in range(h):
        for j in range(w):
            cut = top <= i < top + box_y and left <= j < left + box_x
            if 0 <= i - dy < h and 0 <= j - dx < w and not cut:
                out[:, i, j] = image[:, i - dy, j - dx]
    return out


@pytest.mark.parametrize("size", [(8, 12), (9, 20)])
def test_diff_augment_is_the_authors_pixel_by_pixel(size: tuple[int, int]) -> None:
    x, draws = doubles(24, 3, *size), torch.rand(24, DRAWS, dtype=torch.float64)
    draws[0], draws[1] = 0, 1 - 2**-53
    expected = torch.stack([reference(image, row) for image, row in zip(x, draws.tolist(), strict=True)])
    torch.testing.assert_close(diff_augment(x, draws, ALL), expected)
    torch.testing.assert_close(diff_augment(x[[7, 3]], draws[[7, 3]], ALL), expected[[7, 3]])


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_diff_augment_keeps_part_of_every_image_at_the_ends_of_its_draws(edge: float) -> None:
    """1.0 is what rounding to float32 can make of a number in [0, 1)."""
    got = diff_augment(torch.ones(1, 3, 16, 16), torch.full((1, DRAWS), edge), ("translation", "cutout"))
    assert int(got[0, 0].sum()) == 14 * 14 - 4 * 4  # 2 of 16 rows and columns moved out; a quarter of the box
    assert torch.equal(diff_augment(got, torch.rand(1, DRAWS), ()), got)


def test_diff_augment_is_differentiable_to_the_image() -> None:
    draws = torch.rand(2, DRAWS, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, draws, ALL), doubles(2, 3, 8, 8).requires_grad_())


# --- guidance weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [("captions", stats.uniform(2, 8)), ("recaptions", stats.truncnorm((1 - 2) / 3, (10 - 2) / 3, loc=2, scale=3))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guidance_weights_are_the_papers(distribution: Any, expected: Any, dtype: torch.dtype) -> None:
    u = torch.linspace(0, 1, 1001, dtype=dtype)
    got = guidance_weights(u, distribution)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, expected.ppf(u.double()), rtol=1e-6 if dtype == torch.float32 else 1e-9)
    assert (
        stats.kstest(guidance_weights(torch.rand(2000, dtype=dtype), distribution).double(), expected.cdf).pvalue > 1e-3
    )
    assert expected.support()[0] <= got.min() and got.max() <= expected.support()[1]  # to the bit
    mixed = guidance_weights(u, "mixed", torch.full((1001,), int(distribution == "recaptions")))
    assert torch.equal(mixed, got)
