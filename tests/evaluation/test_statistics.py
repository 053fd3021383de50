"""Streaming statistics against one pass over everything; invariances; what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.evaluation.metrics import frechet, inception_score
from pixelgrow.evaluation.statistics import Gathered, Marginals, Moments

WIDTH = 6


def draw(n: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    """Correlated features with a mean far from 0."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=g) @ torch.randn(width, width, generator=g) + 100


def moments(features: Tensor) -> Moments:
    made = Moments(features.shape[1])
    made.add(features)
    return made


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@st.composite
def deals(draw_: st.DrawFn) -> tuple[Tensor, list[list[Tensor]]]:
    """Features, and their row numbers dealt in any order to processes, and there to batches."""
    n = draw_(st.integers(2, 40))
    order = torch.tensor(draw_(st.permutations(range(n))))
    cuts = sorted(draw_(st.lists(st.integers(0, n), max_size=6)))
    batches = [b for b in torch.tensor_split(order, cuts) if len(b)]
    owner = draw_(st.lists(st.integers(0, 2), min_size=len(batches), max_size=len(batches)))
    return draw(n, draw_(st.integers(0, 99))), [
        [b for b, o in zip(batches, owner, strict=True) if o == process] for process in range(3)
    ]


@settings(deadline=None, max_examples=60)
@given(deals())
def test_order_batches_and_processes_do_not_matter(deal: tuple[Tensor, list[list[Tensor]]]) -> None:
    features, processes = deal
    n, whole = len(features), moments(features)
    all_rows = Gathered(n, WIDTH)
    all_rows.add(range(n), features)
    all_classes = Marginals(n, WIDTH, splits=2)
    all_classes.add(range(n), features)
    merged, rows, classes = Moments(WIDTH), Gathered(n, WIDTH), Marginals(n, WIDTH, splits=2)
    for batches in processes:
        part, part_rows, part_classes = Moments(WIDTH), Gathered(n, WIDTH), Marginals(n, WIDTH, splits=2)
        for index in batches:
            part.add(features[index])
            part_rows.add(index, features[index])
            part_classes.add(index, features[index])
        merged.merge(Moments.from_arrays(part.to_arrays()))
        rows.merge(Gathered.from_arrays(part_rows.to_arrays()))
        classes.merge(Marginals.from_arrays(part_classes.to_arrays()))
    assert merged.count == n
    assert relative(merged.mean, whole.mean) < 1e-14 and relative(merged.covariance, whole.covariance) < 1e-11
    assert torch.equal(rows.features, features) and torch.equal(rows.features, all_rows.features)
    one, other = inception_score(all_classes), inception_score(classes)
    assert other.mean == pytest.approx(one.mean, rel=1e-10) and other.std == pytest.approx(one.std, abs=1e-10)
    target = moments(draw(50, 7))
    assert frechet(merged, target) == pytest.approx(frechet(whole, target), rel=1e-8)


def test_moments_against_numpy_and_far_from_zero() -> None:
    features = draw(200).double() + 1e6  # sums of squares about 0 would keep 4 digits
    made = Moments(WIDTH)
    for batch in features.split(7):
        made.add(batch)
    centred = features.numpy() - 1e6
    assert relative(made.mean - 1e6, torch.from_numpy(centred.mean(0))) < 1e-10
    assert relative(made.covariance, torch.from_numpy(np.cov(centred, rowvar=False))) < 1e-8


def test_adding_does_not_change_what_others_hold() -> None:
    first = moments(draw(10))
    kept = Moments.from_arrays(first.to_arrays())
    first.add(draw(10, 1))
    assert kept.count == 10 and relative(kept.covariance, moments(draw(10)).covariance) == 0


def test_gathered_gives_what_is_there_by_number() -> None:
    made = Gathered(5, WIDTH)
    features = draw(3)
    made.add([4, 0], features[:2])
    made.add([2], features[2:])
    assert len(made) == 3
    assert torch.equal(made.features, features[[1, 2, 0]])
    again = Gathered.from_arrays(made.to_arrays())
    again.add([1, 3], draw(2, 1))
    assert len(again) == 5 and len(made) == 3
    assert torch.equal(again.features[[0, 2, 4]], features[[1, 2, 0]])


def test_gathered_keeps_one_copy() -> None:
    made = Gathered(4, WIDTH)
    made.add(range(4), draw(4))
    assert made.features.data_ptr() == made.features.data_ptr() == made._rows.data_ptr()
    assert made.features.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_one_line(bad: float) -> None:
    features = draw(4)
    features[2, 1] = features[3, 0] = bad
    index = range(10, 14)
    for add, which in (
        (lambda: Moments(WIDTH).add(features), ""),
        (lambda: Gathered(20, WIDTH).add(index, features), ", the first is image 12"),
        (lambda: Marginals(20, WIDTH).add(index, features), ", the first is image 12"),
    ):
        with pytest.raises(UserError) as got:
            add()
        assert str(got.value) == (
            f"features of 2 of 4 images hold NaN or infinity{which}; look at these images, or compute their features "
            "in float32"
        )


def test_nothing_of_a_bad_batch_is_counted() -> None:
    made, features = moments(draw(4)), draw(4, 1)
    features[0, 0] = torch.nan
    with pytest.raises(UserError):
        made.add(features)
    assert made.count == 4 and relative(made.mean, moments(draw(4)).mean) == 0


@pytest.mark.parametrize("images", [0, 1])
def test_a_covariance_takes_two_images(images: int) -> None:
    with pytest.raises(UserError, match=f"got {images} image.*expected at least 2") as got:
        moments(draw(images)).covariance  # noqa: B018
    assert "\n" not in str(got.value)


def test_splits_are_even_and_do_not_follow_the_order() -> None:
    made = Marginals(103, 2, splits=10)
    made.add(range(103), torch.zeros(103, 2))
    assert sorted(made.counts.tolist()) == [10] * 7 + [11] * 3
    block = Marginals(103, 2, splits=10)
    block.add(range(10), torch.zeros(10, 2))
    assert block.counts.max() < 6
    cycle = Marginals(100, 2, splits=10)
    cycle.add(range(0, 100, 10), torch.zeros(10, 2))
    assert cycle.counts.max() < 6
