"""The order of training samples: a pure function of (seed, position), whatever was asked before."""

from __future__ import annotations

import time

import numpy as np
import pytest

from pixelgrow.data import order as module
from pixelgrow.data.order import Draw, Order, Permutation
from pixelgrow.errors import UserError
from pixelgrow.rng import seed_of

POSITIONS = [0, 1, 2, 59, 60, 61, 1000, 7, 0]


def test_a_position_is_a_function_of_the_seed_whatever_was_asked_before() -> None:
    first = Order([7, 12], seed=3)
    found = [first.at(p) for p in POSITIONS]
    assert found == [Order([7, 12], seed=3).at(p) for p in POSITIONS]
    assert found != [Order([7, 12], seed=4).at(p) for p in POSITIONS]


def test_every_epoch_of_a_source_has_each_sample_once_in_an_order_of_its_own() -> None:
    order = Order([7, 12], seed=1)
    drawn = [order.at(p) for p in range(3 * 19)]
    for source, count in ((0, 7), (1, 12)):
        mine = [d for d in drawn if d.source == source]
        assert [d.turn for d in mine] == list(range(len(mine)))
        epochs = [[d.item for d in mine[e * count : (e + 1) * count]] for e in range(3)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_replacement_is_any_sample_of_the_same_source_keyed_by_seed_turn_and_attempt() -> None:
    order, draw = Order([7, 1000], seed=3), Draw(1, 5, 40)
    found = [order.instead(draw, attempt) for attempt in range(50)]
    assert {(d.source, d.turn) for d in found} == {(1, 40)}
    assert all(0 <= d.item < 1000 for d in found) and len({d.item for d in found}) > 40
    assert found == [Order([7, 1000], seed=3).instead(draw, attempt) for attempt in range(50)]
    others = [
        [Order([7, 1000], seed=4).instead(draw, a) for a in range(50)],
        [order.instead(Draw(1, 5, 41), a) for a in range(50)],
        [Order([1000, 1000], seed=3).instead(Draw(0, 5, 40), a) for a in range(50)],
    ]
    for other in others:
        assert sum(a.item == b.item for a, b in zip(found, other, strict=True)) < 5
    assert {order.instead(Draw(0, 5, 40), attempt).item for attempt in range(200)} == set(range(7))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0], "got 1 weights for 2 sources; give one each"),
        ([1.0, 0.0], r"got weights \[1.0, 0.0\], expected numbers above 0"),
        ([1.0, float("inf")], "expected numbers above 0"),
        ([1.0, float("nan")], "expected numbers above 0"),
    ],
)
def test_weights_that_mean_nothing(weights: list[float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Order([7, 12], weights)


def test_up_to_a_million_numbers_are_sorted_by_random_bits() -> None:
    """As ever: a run that goes on sees the same samples."""
    expected = np.argsort(np.random.PCG64(seed_of(3, "order")).random_raw(1000), kind="stable")
    assert list(Permutation(1000, 3, "order")) == expected.tolist()


@pytest.mark.parametrize("count", [2, 9, 10, 99, 1000, 30_000])
def test_a_network_permutes(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SORTED", 1)
    found = list(Permutation(count, "a", 1))
    assert sorted(found) == list(range(count)) and len(Permutation(count, "a", 1)) == count
    assert [Permutation(count, "a", 1)[place] for place in (count - 1, 0)] == [found[-1], found[0]]
    with pytest.raises(IndexError):
        Permutation(count, "a", 1)[count]


def test_a_network_leaves_no_trace_of_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places, neighbours and other keys are not correlated, and each tenth goes evenly to all tenths."""
    monkeypatch.setattr(module, "SORTED", 1)
    count = 40_000
    found, other = (np.array(list(Permutation(count, "b", key))) for key in (1, 2))
    for a, b in ((found, np.arange(count)), (found[1:], found[:-1]), (found, other)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / count**0.5
    tenths = np.histogram2d(np.arange(count), found, bins=10)[0]
    assert ((tenths - count / 100) ** 2 / (count / 100)).sum() < 81 + 5 * (2 * 81) ** 0.5  # chi-square, 81 degrees
    assert 0 <= (found == np.arange(count)).sum() < 12  # one on average


def test_the_order_of_a_hundred_million_begins_at_once() -> None:
    began = time.process_time()
    order = Order([100_000_000, 7], [3, 1], seed=5)
    found = [order.at(position).item for position in range(10**9, 10**9 + 300)]
    assert time.process_time() - began < 0.5
    assert len(set(found)) > 200
