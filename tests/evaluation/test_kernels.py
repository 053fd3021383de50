"""KID, MMD and CMMD against loops over pairs, torchmetrics and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from pixelgrow.errors import UserError
from pixelgrow.evaluation import pairwise
from pixelgrow.evaluation.kernels import cmmd, kid, mmd


class Pixels(nn.Module):
    num_features = 5

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def draw(n: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.fixture(params=[3, 2048])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Pairs in blocks of 3, of which many are cut off at an edge, and all at once."""
    monkeypatch.setattr(pairwise, "BLOCK", request.param)
    return request.param


def test_every_pair_comes_once(block: int) -> None:
    x, y = draw(10, 0), draw(7, 1)
    seen = torch.zeros(10, 7)
    for i, j, found in pairwise.products(x, y):
        seen[i, j] += 1
        assert found.dtype == torch.float64 and found.numel() <= block**2  # what bounds the memory
        assert torch.allclose(found, x[i].double() @ y[j].double().T)
    assert torch.equal(seen, torch.ones(10, 7))
    seen = torch.zeros(10, 10)
    for i, j, _ in pairwise.products(x):
        seen[i, j] += 1
        if i != j:
            seen[j, i] += 1
    assert torch.equal(seen, torch.ones(10, 10))


def test_distances_are_exact_zeros_for_copies_far_from_the_origin() -> None:
    x = (draw(6, 0) + 1000)[[0, 1, 2, 0, 1, 2]]
    (found,) = [d for _, _, d in pairwise.squared_distances(x)]
    assert torch.equal(found == 0, torch.eye(3).repeat(2, 2) == 1)
    expected = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    assert torch.allclose(found, expected, rtol=1e-7)


def test_mmd_as_loops(block: int) -> None:
    x, y = draw(11, 0), draw(8, 1, 0.5)

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a.double() @ b.double()) / 5 + 1) ** 3

    xx = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert mmd(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


@pytest.mark.filterwarnings("ignore:Metric:UserWarning")  # of the library
def test_kid_as_torchmetrics() -> None:
    x, y = draw(40, 0), draw(40, 1, 0.5)
    library = KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=40).set_dtype(torch.float64)
    library.update(x.double()[:, :, None, None], real=True)
    library.update(y.double()[:, :, None, None], real=False)
    expected = library.compute()[0].item()  # one block of all images: no choice is left
    assert mmd(x, y) == pytest.approx(expected, rel=1e-9)
    found = kid(x, y, blocks=2, size=40)
    assert found.mean == pytest.approx(expected, rel=1e-9) and found.std == pytest.approx(0, abs=1e-12)


def test_kid_averages_over_blocks_of_its_own() -> None:
    x, y = draw(200, 0), draw(300, 1, 0.5)
    found = kid(x, y, blocks=60, size=40)
    whole = mmd(x, y)
    assert found.std > 0 and abs(found.mean - whole) < 4 * found.std / math.sqrt(60)
    assert kid(x, y, blocks=60, size=40) == found
    # Blocks of the two sets are drawn apart: of two equal sets no block is compared with itself.
    assert kid(x, x, blocks=3, size=40).std > 0


def test_kid_takes_a_block_of_images() -> None:
    with pytest.raises(UserError, match="blocks of 1,000 images: got 30 real and 20 generated") as got:
        kid(draw(30, 0), draw(20, 1))
    assert "\n" not in str(got.value)
    with pytest.raises(UserError, match="got 30 real and 1 generated"):
        mmd(draw(30, 0), draw(1, 1))


def test_mmd_of_points() -> None:
    # Two at the origin, two at e: k = 1 at the origin and between, (1/5 + 1)^3 at e.
    x, y = torch.zeros(2, 5), torch.zeros(2, 5)
    y[:, 0] = 1
    assert mmd(x, y) == pytest.approx(1.2**3 - 1, rel=1e-12)
    assert mmd(x, x) == 0


def test_cmmd_as_loops(block: int) -> None:
    x, y = draw(11, 0), draw(8, 1, 0.5)

    def k(a: Tensor, b: Tensor) -> float:
        a, b = a.double() / a.double().norm(), b.double() / b.double().norm()
        return math.exp(-float((a - b).square().sum()) / (2 * 10**2))

    mean = [np.mean([k(a, b) for a in one for b in other]) for one, other in ((x, x), (y, y), (x, y))]
    assert cmmd(x, y) == pytest.approx(1000 * (mean[0] + mean[1] - 2 * mean[2]), rel=1e-9)


def test_cmmd_closed_forms() -> None:
    right, up = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert cmmd(right, up) == pytest.approx(2000 * (1 - math.exp(-2 / 200)), rel=1e-12)
    assert cmmd(right.repeat(9, 1), 3 * right.repeat(4, 1)) == 0
    assert abs(cmmd(draw(50, 0), draw(50, 0)[torch.randperm(50)])) < 1e-12


def test_cmmd_is_nearly_the_distance_of_means() -> None:
    """With sigma 10 the kernel of unit vectors is nearly linear: docs/metrics.md says what this hides."""
    x, y = draw(200, 0), draw(200, 1, 0.5)
    apart = (x / x.norm(dim=1, keepdim=True)).mean(0) - (y / y.norm(dim=1, keepdim=True)).mean(0)
    assert cmmd(x, y) == pytest.approx(10 * apart.square().sum().item(), rel=0.02)


def test_cmmd_hardly_sees_what_leaves_the_mean_alone() -> None:
    """The most that two sets with one mean can differ by: docs/metrics.md."""
    one = torch.tensor([[1.0, 0, 0], [-1, 0, 0]])
    other = torch.tensor([[0, 1.0, 0], [0, -1, 0]])
    assert cmmd(one, other) == pytest.approx(1000 * (1 - math.exp(-0.01)) ** 2, rel=1e-9)
    assert cmmd(one, other) < 0.1


def test_cmmd_compares_directions() -> None:
    x = draw(5, 0)
    x[3] = 0
    with pytest.raises(UserError, match="generated embedding 3 is all zeros"):
        cmmd(draw(5, 1), x)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(9)), st.integers(0, 20))
def test_order_and_rotation_do_not_matter(order: list[int], seed: int) -> None:
    x, y = draw(9, seed).double(), draw(12, seed + 1, 0.3).double()
    q = torch.linalg.qr(draw(5, seed).double()).Q
    for metric in (mmd, cmmd):
        assert metric(x[order], y) == pytest.approx(metric(x, y), rel=1e-8, abs=1e-12)
        assert metric(x @ q, y @ q) == pytest.approx(metric(x, y), rel=1e-8, abs=1e-10)
        assert metric(x, y) == pytest.approx(metric(y, x), rel=1e-8, abs=1e-12)
