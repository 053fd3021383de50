"""Precision, recall, density and coverage against loops and prdc; what lost modes and copies do to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prdc import compute_prdc
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.evaluation import pairwise
from pixelgrow.evaluation.neighbours import Neighbours, neighbours

G = torch.Generator().manual_seed(0)
CENTRES = 10 * torch.randn(10, 16, generator=G)


def draw(n: int, seed: int, width: int = 5) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def modes(n: int, seed: int, kept: int = 10) -> Tensor:
    """Images of the first `kept` of ten modes, in features that hold them well apart."""
    mode = torch.arange(n) % kept
    return CENTRES[mode] + draw(n, seed, 16)


def by_loops(real: Tensor, generated: Tensor, manifold: int, ball: int) -> Neighbours:
    def distance(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).square().sum())

    def radius(x: Tensor, i: int, k: int) -> float:
        return sorted(distance(x[i], x[j]) for j in range(len(x)) if j != i)[k - 1]

    cross = [[distance(r, g) for g in generated] for r in real]
    n, m = len(real), len(generated)
    real_manifold = [radius(real, i, manifold) for i in range(n)]
    generated_manifold = [radius(generated, j, manifold) for j in range(m)]
    real_ball = [radius(real, i, ball) for i in range(n)]
    return Neighbours(
        precision=sum(any(cross[i][j] <= real_manifold[i] for i in range(n)) for j in range(m)) / m,
        recall=sum(any(cross[i][j] <= generated_manifold[j] for j in range(m)) for i in range(n)) / n,
        density=sum(cross[i][j] <= real_ball[i] for i in range(n) for j in range(m)) / (ball * m),
        coverage=sum(any(cross[i][j] <= real_ball[i] for j in range(m)) for i in range(n)) / n,
    )


@pytest.mark.parametrize("block", [4, 2048])
def test_as_loops(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "BLOCK", block)
    for seed in range(3):
        real, generated = draw(17, seed), 1.3 * draw(13, seed + 10)
        assert neighbours(real, generated, manifold=2, ball=3) == by_loops(real, generated, 2, 3)
        assert neighbours(real, generated) == by_loops(real, generated, 3, 5)


def test_ties_and_copies_as_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "BLOCK", 5)
    real, generated = draw(20, 0).round(), draw(24, 1).round()  # whole numbers: many distances are the same
    generated[12:] = generated[:12]
    real[:3] = generated[:3]
    assert neighbours(real, generated, manifold=1, ball=2) == by_loops(real, generated, 1, 2)


@pytest.mark.parametrize("k", [3, 5])
def test_as_prdc(k: int) -> None:
    real, generated = draw(300, 0, 8), 1.1 * draw(250, 1, 8)
    expected = compute_prdc(real.double().numpy(), generated.double().numpy(), nearest_k=k)
    found = neighbours(real, generated, manifold=k, ball=k)
    assert vars(found) == pytest.approx({name: float(v) for name, v in expected.items()}, rel=1e-12)


def test_density_and_coverage_of_equal_distributions() -> None:
    """Their expected values hold for every distribution (Naeem et al., lemmas 1 and 2)."""
    n, m, k, trials = 40, 30, 5, 150
    found = [neighbours(draw(n, 2 * t), draw(m, 2 * t + 1)) for t in range(trials)]
    missed = 1.0
    for i in range(1, k + 1):
        missed *= (n - i) / (n + m - i)
    for values, expected in (([f.density for f in found], 1.0), ([f.coverage for f in found], 1 - missed)):
        x = torch.tensor(values)
        assert abs(x.mean().item() - expected) < 4 * x.std().item() / trials**0.5


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(12)), st.integers(0, 30), st.floats(0.1, 10))
def test_order_rotation_and_scale_do_not_matter(order: list[int], seed: int, scale: float) -> None:
    real, generated = draw(15, seed).double(), 1.2 * draw(12, seed + 1).double()
    q = torch.linalg.qr(draw(5, seed).double()).Q
    found = neighbours(real, generated)
    assert neighbours(real, generated[order]) == found
    assert neighbours(scale * real @ q, scale * generated @ q) == found


def test_swapping_the_sets_swaps_precision_and_recall() -> None:
    real, generated = draw(60, 0), 1.3 * draw(50, 1)
    there, back = neighbours(real, generated), neighbours(generated, real)
    assert (there.precision, there.recall) == (back.recall, back.precision)


def test_copies_of_the_real_images_are_perfect() -> None:
    """What none of the four can tell from a good model: docs/metrics.md."""
    real = draw(50, 0)
    found = neighbours(real, real.clone())
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert found.density == pytest.approx(6 / 5)  # the image itself and, on average, five others' balls


def test_lost_modes_move_recall_and_coverage_and_not_precision_and_density() -> None:
    real = modes(500, 1)
    whole, half = neighbours(real, modes(500, 2)), neighbours(real, modes(500, 3, kept=5))
    assert abs(half.precision - whole.precision) < 0.05 and abs(half.density - whole.density) < 0.15
    assert half.recall < 0.6 * whole.recall and half.coverage < 0.6 * whole.coverage
    assert half.coverage <= 0.5


def test_copies_among_generated_images_do_the_same() -> None:
    real, generated = modes(500, 1), modes(500, 2)
    whole = neighbours(real, generated)
    twice, four = (neighbours(real, generated[: 500 // c].repeat(c, 1)) for c in (2, 4))
    assert abs(twice.precision - whole.precision) < 0.05 and abs(four.precision - whole.precision) < 0.1
    assert abs(four.density - whole.density) < 0.2
    assert 0.9 * whole.recall > twice.recall > four.recall == 0  # k = 3: balls of radius 0
    assert 0.95 * whole.coverage > twice.coverage > four.coverage


def test_copies_among_real_images_do_the_reverse() -> None:
    real, generated = modes(500, 1), modes(500, 2)
    whole = neighbours(real, generated)
    copied = neighbours(real[:125].repeat(4, 1), generated)
    assert copied.precision == 0
    assert abs(copied.recall - whole.recall) < 0.1


@pytest.mark.parametrize(("n", "m", "which"), [(5, 20, "5 real"), (20, 1, "1 generated")])
def test_takes_more_images_than_neighbours(n: int, m: int, which: str) -> None:
    with pytest.raises(UserError, match=f"look at 5 neighbours: got {which} image.*at least 6") as got:
        neighbours(draw(n, 0), draw(m, 1))
    assert "\n" not in str(got.value)
