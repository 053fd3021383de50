"""Lanes: a pure order in which each sample comes once an epoch, and a lane needs few shards at a time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.test_sources import an_image, write_tar
from pixelgrow.data import Loader, heldout_split, open_source
from pixelgrow.data.lanes import LaneDraw, LaneOfShards, LaneOrder
from pixelgrow.data.order import Order
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.data.sources.base import Lanes
from pixelgrow.data.sources.index import FileSource
from pixelgrow.data.sources.selection import Selection
from pixelgrow.errors import UserError

SIZES = (7, 0, 12, 5, 9, 9, 0, 3, 11, 8)
STEP, LANES = 12, 4


def cuts(sizes: Sequence[int] = SIZES) -> np.ndarray:
    return np.cumsum([0, *sizes])


def an_order(sizes: Sequence[int] = SIZES, window: int = 2, seed: int = 3) -> LaneOrder:
    return LaneOrder([sum(sizes)], None, seed, STEP, LANES, [cuts(sizes)], [window])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 4))
def test_each_sample_comes_once_an_epoch_whatever_the_shards_have(sizes: list[int], count: int, window: int) -> None:
    total = sum(sizes)
    if total < count:
        return
    order = LaneOfShards(cuts(sizes), count, window, "k")
    lengths = [(lane + 1) * total // count - lane * total // count for lane in range(count)]
    assert max(lengths) - min(lengths) <= 1
    epochs = []
    for epoch in range(2):
        turns = [(lane, epoch * n + i) for lane, n in enumerate(lengths) for i in range(n)]
        epochs.append([order.window(lane, turn).at(turn) for lane, turn in turns])
        assert sorted(epochs[-1]) == list(range(total))
    assert len({tuple(epoch) for epoch in epochs}) == 2 or total < 4 * count


def test_a_position_is_a_function_of_the_seed_whatever_was_asked_before() -> None:
    order = an_order()
    found = [order.at(p).item for p in range(400)]
    asked = [399, 0, 201, 64, 63, 65, 1, 399]
    assert [an_order().at(p).item for p in asked] == [found[p] for p in asked]
    one = an_order()
    assert [one.at(p).item for p in asked] == [found[p] for p in asked]
    assert [an_order(seed=4).at(p).item for p in range(400)] != found


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_lane_needs_a_window_of_shards_at_a_time_and_shuffles_within_it(window: int) -> None:
    sizes = (10,) * 16
    order = an_order(sizes, window)
    part = STEP // LANES
    for lane in range(LANES):
        mine = [step * STEP + lane * part + i for step in range(40) for i in range(part)][:40]  # of 160 / 4 in an epoch
        items = [order.at(p).item for p in mine]
        seen = [[item // 10 for item in items[i : i + 10 * window]] for i in range(0, 40, 10 * window)]
        assert [len(set(shards)) for shards in seen] == [len(shards) // 10 for shards in seen]
        assert items != sorted(items)
        if window > 1:
            assert len(set(seen[0][:10])) > 1
        for position, item in zip(mine, items, strict=True):
            ((now, ahead),) = order.needs([position]).values()
            assert item // 10 in now and len(now) <= window and not set(now) & set(ahead)


def test_what_is_said_to_come_next_comes_next() -> None:
    order, part = an_order((10,) * 16, 2), STEP // LANES
    mine = [step * STEP + i for step in range(40) for i in range(part)]  # of the first lane, more than two epochs
    said = [needs[0] for needs in map(order.needs, ([p] for p in mine))]
    changes = [k for k in range(1, len(said)) if said[k][0] != said[k - 1][0]]
    assert changes == list(range(20, 120, 20))
    assert all(set(said[k][0]) - set(said[k - 1][0]) == set(said[k - 1][1]) for k in changes)
    both = order.needs([mine[0], mine[0] + part])[0][0]
    assert set(both) == {*order.needs([mine[0]])[0][0], *order.needs([mine[0] + part])[0][0]}


def test_other_samples_of_the_window_stand_in_for_a_bad_one_then_any() -> None:
    order = an_order((10,) * 16, 2)
    draw = order.at(5)
    assert isinstance(draw, LaneDraw)
    found = [order.instead(draw, attempt) for attempt in range(60)]
    assert {d.item // 10 for d in found[:16]} <= set(draw.window.shards)
    assert len({d.item // 10 for d in found[16:]}) > 8
    again = an_order((10,) * 16, 2)
    assert [d.item for d in found] == [again.instead(again.at(5), attempt).item for attempt in range(60)]


def test_a_mixture_keeps_its_shares_and_what_has_no_lanes_comes_once_an_epoch() -> None:
    order = LaneOrder([64, 36], [3.0, 1.0], 3, STEP, LANES, [cuts((8,) * 8), None], [2, 1])
    draws = [order.at(p) for p in range(12 * STEP)]
    assert Counter(d.source for d in draws) == {0: 108, 1: 36}
    assert sorted(d.item for d in draws if d.source == 1) == list(range(36))
    assert len({(d.source, d.turn) for d in draws}) == len(draws)
    assert set(order.needs(range(STEP))) == {0}


@given(st.lists(st.booleans(), min_size=1, max_size=2000))
def test_ranks_are_counts(chosen: list[bool]) -> None:
    selection = Selection(len(chosen), [np.array(chosen)])
    numbers = np.array([0, 1, len(chosen) // 2, len(chosen) - 1, len(chosen)])
    assert selection.rank(numbers).tolist() == [sum(chosen[:n]) for n in numbers]


# --- loaders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lanes")
    number = 0
    for shard in range(8):
        members = []
        for _ in range(4 + shard % 3):
            side = 16 if number % 7 == 3 else 40
            members += [(f"{number:04}.png", an_image(side, side, number)), (f"{number:04}.txt", b"%d" % number)]
            number += 1
        write_tar(root / f"{shard}.tar", members)
    return root


def a_loader(folder: Path, batch: int = 8, lanes: int = 4, window: int = 2, step: int | None = 16) -> Loader:
    source = open_source({"source": str(folder), "lanes": lanes, "window": window})
    return Loader(heldout_split(source, at_least=4)[0], size=(32, 32), batch=batch, group=step, seed=5)


def texts(loader: Loader, steps: int = 4) -> list[str]:
    batches = loader.batches()
    found = [next(batches).text for _ in range(16 * steps // loader.batch)]
    batches.close()
    return [text for texts in found for text in texts]


def test_the_order_does_not_depend_on_micro_batches(folder: Path) -> None:
    found = texts(a_loader(folder))
    assert found == texts(a_loader(folder, batch=4)) == texts(a_loader(folder, batch=16))
    assert found != texts(a_loader(folder, lanes=2))
    assert found != texts(a_loader(folder, window=1))


def test_an_epoch_in_lanes_has_what_is_large_enough_and_not_held_out(folder: Path) -> None:
    loader = a_loader(folder, lanes=1)
    found = texts(loader)[: len(loader)]
    source = loader.sources[0]
    expected = [source.text(i) for i in range(len(source)) if min(source.size(i)) >= 32]
    assert sorted(found) == sorted(expected) and 20 < len(found) < len(source)


def test_without_a_step_there_are_no_lanes(folder: Path) -> None:
    loader = a_loader(folder, step=None)
    assert type(loader.order) is Order
    assert texts(loader) == texts(a_loader(folder, lanes=2, window=1, step=None))


def test_lanes_that_do_not_fit(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert texts(a_loader(folder, lanes=6)) == texts(a_loader(folder, lanes=2))
    assert f"{folder} (train): 6 lanes do not divide a batch of 16 images: 2 are used" in caplog.text
    with pytest.raises(UserError, match="images for 64 lanes: write lanes: 1"):
        Loader(open_source({"source": str(folder), "lanes": 64}), size=(40, 40), batch=1, group=64)
    both = [open_source({"source": str(folder), "lanes": n}) for n in (2, 4)]
    with pytest.raises(UserError, match=r"different numbers of lanes .* 2 and .* 4.: give all the same"):
        Loader(both, size=(16, 16), batch=4, group=4)
    scenes = Scenes(n=20, captions=4)
    Loader([scenes, both[0]], size=(16, 16), batch=4, group=4)  # a mixture of both kinds


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lanes": 0}, "lanes is 0, expected a whole number from 1 on"),
        ({"window": 1.5}, "window is 1.5, expected a whole number from 1 on"),
        ({"lanes": True}, "lanes is True, expected"),
        ({"cache": 5}, "cache belongs to the URL of tar shards, which this is not; drop it"),
    ],
)
def test_settings_of_shards(folder: Path, settings: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_source({"source": str(folder), **settings})


def test_lanes_are_of_shards(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(an_image())
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="lanes belongs to tar shards, which this is not; drop it"):
        open_source({"source": str(tmp_path), "lanes": 4})


def test_lanes_of_a_folder_of_shards(folder: Path) -> None:
    source = open_source({"source": str(folder), "window": 3})
    assert isinstance(source, FileSource) and source.lanes == Lanes(8, 3)
    plain = open_source(str(folder))
    assert isinstance(plain, FileSource) and plain.lanes is None and plain.fingerprint == source.fingerprint
