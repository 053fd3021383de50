"""Frechet distance, Inception Score, CLIPScore, ratios and intervals against closed forms, loops and libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore as TorchmetricsInceptionScore

from pixelgrow.errors import UserError
from pixelgrow.evaluation import metrics
from pixelgrow.evaluation.metrics import (
    clip_score,
    extrapolated,
    fd_ratio,
    frechet,
    frechet_interval,
    inception_score,
    interval,
    named,
)
from pixelgrow.evaluation.statistics import Marginals, Moments


class Pixels(nn.Module):
    """The first six pixels as features: what the library takes in place of an Inception network."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :6]


def draw(n: int, seed: int, width: int = 6) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=g) @ torch.randn(width, width, generator=g) + seed


def moments(features: Tensor) -> Moments:
    made = Moments(features.shape[1])
    made.add(features)
    return made


def normal(mean: Tensor, covariance: Tensor, count: int = 1000) -> Moments:
    """Moments of a normal distribution, exactly."""
    return Moments.from_arrays({"count": torch.tensor(count), "mean": mean, "scatter": covariance * (count - 1)})


def rotation(width: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64)).Q


def test_frechet_of_normals_that_share_axes() -> None:
    # W2 of N(m, s^2) in each axis: (m_a - m_b)^2 + (s_a - s_b)^2.
    axes, g = rotation(5, 0), torch.Generator().manual_seed(1)
    m, s = torch.randn(2, 5, generator=g, dtype=torch.float64), torch.rand(2, 5, generator=g, dtype=torch.float64)
    a, b = (normal(axes @ m[i], axes @ torch.diag(s[i] ** 2) @ axes.T) for i in range(2))
    assert frechet(a, b) == pytest.approx(((m[0] - m[1]) ** 2 + (s[0] - s[1]) ** 2).sum().item(), rel=1e-12)


def test_frechet_of_normals_without_shared_axes() -> None:
    # In two dimensions tr sqrt(AB) = sqrt(tr AB + 2 sqrt(det A det B)).
    a, b = (moments(draw(50, seed, 2)) for seed in (1, 2))
    x, y = a.covariance, b.covariance
    fidelity = (torch.trace(x @ y) + 2 * (x.det() * y.det()).sqrt()).sqrt()
    expected = (a.mean - b.mean).square().sum() + x.trace() + y.trace() - 2 * fidelity
    assert frechet(a, b) == pytest.approx(expected.item(), rel=1e-12)


def test_frechet_as_scipy_and_torchmetrics() -> None:
    x, y = draw(60, 1), draw(80, 2)
    a, b = moments(x), moments(y)
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    apart = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    assert frechet(a, b) == pytest.approx(apart.item() - 2 * np.trace(root), rel=1e-9)
    library = FrechetInceptionDistance(feature=Pixels()).set_dtype(torch.float64)
    library.update(x[:, :, None, None].double(), real=True)
    library.update(y[:, :, None, None].double(), real=False)
    assert frechet(a, b) == pytest.approx(library.compute().item(), rel=1e-8)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 50))
def test_frechet_is_symmetric_and_blind_to_rotation(n: int, m: int, seed: int) -> None:
    x, y, q = draw(n, seed).double(), draw(m, seed + 1).double(), rotation(6, seed)
    found = frechet(moments(x), moments(y))
    assert found == pytest.approx(frechet(moments(y), moments(x)), rel=1e-8)
    assert found == pytest.approx(frechet(moments(x @ q), moments(y @ q)), rel=1e-8)
    assert found == pytest.approx(frechet(moments(x + 3), moments(y + 3)), rel=1e-8)
    assert frechet(moments(2 * x), moments(2 * y)) == pytest.approx(4 * found, rel=1e-8)


def test_frechet_of_fewer_images_than_features() -> None:
    # Five points and the same five, moved: only the means differ, whatever the missing directions do.
    x = draw(5, 1, 64).double()
    assert frechet(moments(x), moments(x + 0.25)) == pytest.approx(64 / 16, rel=1e-10)
    # Sets that vary in directions of their own: tr C_a + tr C_b is left.
    y = torch.cat([torch.zeros(5, 64), x[:, :32].float()], 1).double()
    z = torch.cat([x[:, 32:].float(), torch.zeros(5, 64)], 1).double()
    a, b = moments(y - y.mean(0)), moments(z - z.mean(0))
    assert frechet(a, b) == pytest.approx((a.covariance.trace() + b.covariance.trace()).item(), rel=1e-12)


def test_frechet_of_the_same_images_is_zero() -> None:
    for n in (3, 100):
        a = moments(draw(n, 1, 32))
        b = Moments(32)
        for batch in draw(n, 1, 32).split(2):
            b.add(batch)
        assert 0 <= frechet(a, b) <= 1e-12 * a.covariance.trace().item()
    one = torch.ones(4, 6)  # the same image four times
    assert frechet(moments(one), moments(one)) == 0
    assert frechet(moments(one), moments(2 * one)) == pytest.approx(6)


def test_frechet_takes_two_images_and_one_width() -> None:
    with pytest.raises(UserError, match=r"got 1 image.*at least 2"):
        frechet(moments(draw(1, 1)), moments(draw(5, 1)))
    with pytest.raises(ValueError, match="6 and 5 wide"):
        frechet(moments(draw(5, 1)), moments(draw(5, 1, 5)))


def test_extrapolation_removes_the_bias_of_few_images() -> None:
    width = 24
    truth = normal(torch.zeros(width, dtype=torch.float64), torch.eye(width, dtype=torch.float64))
    images = torch.randn(1500, width, generator=torch.Generator().manual_seed(3))
    found = extrapolated(images, truth)
    assert found.sizes[0] == 150 and found.sizes[-1] == 1500 and len(found.sizes) == 15
    assert found.distances[-1] == pytest.approx(frechet(moments(images), truth), rel=1e-9)
    assert found.distances[0] > found.distances[-1] > 5 * abs(found.value)
    line = np.polyfit(1 / np.array(found.sizes), found.distances, 1)
    assert found.value == pytest.approx(line[1], abs=1e-9)
    assert extrapolated(images, truth) == found


def test_extrapolation_starts_at_5000_where_there_are_enough() -> None:
    images = torch.randn(60_000, 2, generator=torch.Generator().manual_seed(0))
    found = extrapolated(images, moments(images[:100]), points=3)
    assert found.sizes == (5000, 32500, 60000)
    with pytest.raises(UserError, match="got 39 images, expected at least 40"):
        extrapolated(images[:39], moments(images[:100]))


def test_fd_ratio_is_a_mean_of_ratios() -> None:
    assert fd_ratio({"a": 3.0, "b": 10.0}, {"b": 5.0, "a": 1.0}) == 2.5
    assert fd_ratio({"a": 0.25}, {"a": 0.25}) == 1
    with pytest.raises(UserError, match="distances of a for the model and of a, b for held-out"):
        fd_ratio({"a": 1.0}, {"a": 1.0, "b": 1.0})
    with pytest.raises(UserError, match="of no extractor for the model"):
        fd_ratio({}, {})
    with pytest.raises(UserError, match="held-out and training images are 0 apart by a"):
        fd_ratio({"a": 1.0}, {"a": 0.0})


def score(logits: Tensor, splits: int = 1) -> metrics.InceptionScore:
    made = Marginals(len(logits), logits.shape[1], splits)
    made.add(range(len(logits)), logits)
    return inception_score(made)


def test_inception_score_closed_forms() -> None:
    sure = 200 * torch.eye(5).repeat(4, 1)  # certain of each of five classes in turn: 5, the highest
    assert score(sure).mean == pytest.approx(5, rel=1e-12)
    assert score(torch.zeros(20, 5)).mean == pytest.approx(1, rel=1e-12)  # says nothing
    assert score(sure[:1].repeat(20, 1)).mean == pytest.approx(1, rel=1e-12)  # always the same class
    assert score(2000 * torch.eye(5).repeat(4, 1)).mean == pytest.approx(5, rel=1e-12)  # p underflows to 0


@pytest.mark.filterwarnings("ignore:Metric:UserWarning", "ignore:std:UserWarning")  # of the library
def test_inception_score_as_loops_and_torchmetrics() -> None:
    logits = draw(57, 3, 6)
    p = logits.double().softmax(1).tolist()
    made = Marginals(57, 6, 3)
    made.add(range(57), logits)
    scores = []
    for split in range(3):
        rows = [row for row, s in zip(p, made._split.tolist(), strict=True) if s == split]
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        kl = [sum(v * math.log(v / m) for v, m in zip(row, mean, strict=True)) for row in rows]
        scores.append(math.exp(sum(kl) / len(kl)))
    found = inception_score(made)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-12) and found.std == pytest.approx(np.std(scores))
    library = TorchmetricsInceptionScore(feature=Pixels(), splits=1)
    library.update(logits[:, :, None, None])
    assert score(logits).mean == pytest.approx(library.compute()[0].item(), rel=1e-5)  # in fp32 there


def test_inception_score_takes_an_image_in_each_split() -> None:
    with pytest.raises(UserError, match="at least 10 images, got 9"):
        Marginals(9, 5)
    made = Marginals(20, 5)
    made.add([0], torch.zeros(1, 5))
    with pytest.raises(UserError, match=r"got 1 image\(s\), expected some in each of 10 splits"):
        inception_score(made)


def test_clip_score_is_a_hundred_cosines() -> None:
    images = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    texts = torch.tensor([[30.0, 40.0], [1.0, 1.0], [0.0, -1.0]])
    assert clip_score(images, texts).tolist() == pytest.approx([100, 100 / math.sqrt(2), 0])


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 31, 5000])
def test_interval_as_scipy(level: float, n: int) -> None:
    values = np.random.default_rng(n).normal(3, 2, n)
    found = interval(values.tolist(), level)
    low, high = scipy.stats.t.interval(level, n - 1, values.mean(), scipy.stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high), rel=1e-9)


def test_interval_takes_two_values() -> None:
    with pytest.raises(UserError, match="at least 2 values, got 1"):
        interval([3.0])
    assert interval([3.0, 3.0]) == metrics.Interval(3, 3, 3)


@pytest.mark.parametrize(
    ("images", "name"),
    [(2000, "FID-2,000"), (49_999, "FID-49,999"), (50_000, "FID-50k"), (60_000, "FID-60,000"), (7, "FID-7")],
)
def test_only_50000_images_are_50k(images: int, name: str) -> None:
    assert named("FID", images) == name


def test_the_jackknife_of_a_distance_is_as_wide_as_distances_scatter() -> None:
    def drawn(seed: int) -> list[Moments]:
        x = torch.randn(600, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.3 + 0.2
        parts = [Moments(3) for _ in range(10)]
        for k, part in enumerate(parts):
            part.add(x[k::10])
        return parts

    reference = Moments(3)
    reference.add(torch.randn(4000, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64))
    found = [frechet_interval(drawn(seed), reference) for seed in range(150)]
    distances = torch.tensor([f.mean for f in found])
    widths = torch.tensor([f.high - f.low for f in found]) / (2 * 2.262157)  # t of 9 degrees of freedom
    assert widths.mean().item() == pytest.approx(distances.std().item(), rel=0.2)
    inside = [f.low <= distances.mean() <= f.high for f in found]
    assert 0.89 <= sum(inside) / len(inside) <= 1
    whole = Moments(3)
    for part in drawn(0):
        whole.merge(part)
    assert found[0].mean == pytest.approx(frechet(whole, reference), rel=1e-12)
