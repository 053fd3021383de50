"""The order of training samples: a pure function of (seed, position), whatever was asked before."""

from __future__ import annotations

import pytest

from pixelgrow.data.order import Draw, Order
from pixelgrow.errors import UserError

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
