"""Buckets: images grouped by shape at one area. Little is cropped, nothing is left out unsaid, order stays pure."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import RunCli
from data.test_sources import an_image, write_tar
from pixelgrow.data import Loader, open_mixture, open_source
from pixelgrow.data import order as orders
from pixelgrow.data.account import Account, account_of
from pixelgrow.data.buckets import LONGEST, MOST, ODD, SMALL, Shapes, cropped, filled, size_of, usable
from pixelgrow.data.images import Frame
from pixelgrow.data.order import BucketOrder, Draw, Order
from pixelgrow.data.sources.base import Subset, in_buckets
from pixelgrow.errors import UserError

AT_64 = Shapes((64, 64), 4)


class Drawings:
    """A source in memory of images of some sizes; image i has the grey value i."""

    fingerprint = "drawings"
    name = "drawings"

    def __init__(self, sizes: Sequence[tuple[int, int]], buckets: bool = True) -> None:
        self.sizes, self.frame = list(sizes), Frame(buckets=buckets)

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, i: int) -> tuple[int, int]:
        return self.sizes[i]

    def text(self, i: int) -> str:
        return str(i)

    def image(self, i: int, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
        return np.full((*size, 3), i % 256, np.uint8)

    def key(self, i: int) -> str:
        return f"{i}.png"


def of_aspects(aspects: Sequence[float], area: int = 90_000) -> list[tuple[int, int]]:
    """Sizes (h, w) of some h / w and nearly one area."""
    return [(round((area * a) ** 0.5), round((area / a) ** 0.5)) for a in aspects]


@pytest.mark.parametrize("side", [4, 8, 12, 16, 31, 64])
def test_sizes_have_one_area_and_divide_the_grid(side: int) -> None:
    shapes = Shapes((4 * side, 4 * side), 4)
    assert shapes.size in shapes.sizes
    assert all(h % 4 == w % 4 == 0 for h, w in shapes.sizes)
    tokens = [h * w // 16 for h, w in shapes.sizes]
    assert max(tokens) == side**2 and min(tokens) >= side * (side - 1)
    aspects = [h / w for h, w in shapes.sizes]
    assert aspects == sorted(set(aspects)) and max(aspects) <= LONGEST
    assert {(w, h) for h, w in shapes.sizes} == set(shapes.sizes)
    assert len(shapes.sizes) <= 25
    gaps = [1 - (a / b) ** 0.5 for a, b in itertools.pairwise(aspects)]
    if side >= 8:  # an image of any shape up to the longest has a bucket
        assert max(gaps) < MOST and max(aspects) > 0.9 * LONGEST


def test_a_grown_models_sizes_are_its_cores_scaled() -> None:
    grown = Shapes((512, 512), 32)
    assert [(h // 8, w // 8) for h, w in grown.sizes] == list(AT_64.sizes)
    assert Shapes((32, 32), 2).times(2) == AT_64


def test_an_image_is_in_the_bucket_that_crops_least_of_it() -> None:
    rng = np.random.default_rng(0)
    sides = np.array(of_aspects(4 ** rng.uniform(-1.3, 1.3, 500)))
    sizes = np.array(AT_64.sizes)
    lost = np.array([cropped(sides, np.broadcast_to(size, sides.shape)) for size in sizes])  # by every size
    found = AT_64.numbers(sides, buckets=True)
    inside = found >= 0
    assert (found[inside] == lost.argmin(axis=0)[inside]).all()
    assert (found[~inside] == ODD).all() and (lost.min(axis=0)[~inside] > MOST).all()
    assert (lost.min(axis=0)[inside] <= MOST).all() and 0 < (~inside).sum() < 100
    kept = [
        (min(h, w * th / tw) * min(w, h * tw / th)) / (h * w)
        for (h, w), (th, tw) in zip(sides, sizes[found], strict=True)
    ]
    assert np.allclose(cropped(sides, sizes[found]), 1 - np.array(kept))


def test_no_image_is_enlarged() -> None:
    sides = np.array([(64, 64), (63, 64), (128, 32), (127, 32), (40, 100), (40, 100)])
    found = AT_64.numbers(sides, buckets=True)
    assert found.tolist()[1] == found.tolist()[3] == SMALL
    assert [AT_64.sizes[n] for n in found if n >= 0] == [(64, 64), (128, 32), (40, 100), (40, 100)]
    assert AT_64.numbers(sides, buckets=False).tolist() == [12, SMALL, SMALL, SMALL, SMALL, SMALL]


def test_an_order_of_one_bucket_is_that_of_no_buckets() -> None:
    plain, one = Order([7, 12], [1, 3], seed=4), BucketOrder([[7, 12]], [1, 3], 4, group=8)
    assert [plain.at(p) for p in range(100)] == [one.at(p) for p in range(100)]
    draw = plain.at(50)
    assert [plain.instead(draw, n) for n in range(9)] == [one.instead(draw, n) for n in range(9)]


COUNTS = [[5, 0], [40, 13], [0, 7]]  # of buckets, of sources


@pytest.mark.parametrize("weights", [None, [1.0, 1.0]])
def test_groups_have_one_bucket_and_every_sample_comes_equally_often(weights: list[float] | None) -> None:
    order = BucketOrder(COUNTS, weights, seed=3, group=4)
    positions = 4 * 65 * 20  # with weights, a group of twenty epochs
    drawn = [order.at(p) for p in range(positions)]
    assert all(len({d.bucket for d in drawn[at : at + 4]}) == 1 for at in range(0, positions, 4))
    assert {d.bucket for d in drawn[: 4 * 30]} == {0, 1, 2}  # spread, not one after the other
    for source, total in enumerate((45, 20)):
        share = (Fraction(total, 65) if weights is None else Fraction(1, 2)) * positions / total
        seen = Counter((d.bucket, d.item) for d in drawn if d.source == source)
        assert set(seen) == {(b, i) for b in range(3) for i in range(COUNTS[b][source])}
        assert all(abs(n - share) <= 2 for n in seen.values())
    for bucket in range(3):  # each sample once in each epoch of its bucket and source, whatever the groups
        mine = [d.item for d in drawn if (d.bucket, d.source) == (bucket, 0)]
        count = COUNTS[bucket][0]
        epochs = [mine[at : at + count] for at in range(0, len(mine) - count, count)] if count else []
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


def test_an_order_with_buckets_is_a_function_of_the_position(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = [0, 1, 59, 60, 1000, 7, 0, 10**9]
    first = BucketOrder(COUNTS, None, 3, 4)
    assert [first.at(p) for p in positions] == [BucketOrder(COUNTS, None, 3, 4).at(p) for p in positions]
    assert [first.at(p) for p in positions] != [BucketOrder(COUNTS, None, 5, 4).at(p) for p in positions]
    monkeypatch.setattr(orders, "SORTED", 50)  # none of the buckets is larger, all together are
    many = BucketOrder(COUNTS, None, 3, 4)
    assert [many.at(p) for p in range(100)] != [first.at(p) for p in range(100)]
    assert sorted(d.item for d in map(many.at, range(4 * 65 * 4)) if d.bucket == 2) == sorted([*range(7)] * 16)


def test_a_replacement_is_of_the_same_source_and_bucket() -> None:
    order = BucketOrder(COUNTS, None, 3, 4)
    found = [order.instead(Draw(1, 3, 9, bucket=2), attempt) for attempt in range(100)]
    assert {(d.source, d.turn, d.bucket) for d in found} == {(1, 9, 2)} and {d.item for d in found} == set(range(7))


def wide_tall_square() -> Drawings:
    return Drawings([(100, 304)] * 10 + [(304, 100)] * 3 + [(200, 200)] * 20 + [(20, 20), (1000, 90)])


def test_batches_have_one_size_from_any_start_with_any_workers() -> None:
    def loader(batch: int = 4, **settings: object) -> Loader:
        return Loader(wide_tall_square(), size=(64, 64), stride=4, batch=batch, group=8, **settings)  # type: ignore[arg-type]

    stream = list(itertools.islice(loader().batches(), 24))
    assert {b.image.shape[2:] for b in stream} == {(36, 108), (108, 36), (64, 64)}
    for first, second in zip(stream[::2], stream[1::2], strict=True):  # of one group
        assert first.image.shape == second.image.shape
    small = list(itertools.islice(loader(batch=2).batches(), 48))
    for at, batch in enumerate(stream):  # micro-batches of another size have the same images
        assert batch.text == small[2 * at].text + small[2 * at + 1].text
    for settings, start, step in (({}, 40, None), ({"workers": 2}, 0, None), ({}, 4, 8)):
        later = loader(**settings).batches(start, step)
        for batch, same in zip(stream[start // 4 :: (step or 4) // 4], itertools.islice(later, 9), strict=False):
            assert batch.image.equal(same.image) and batch.text == same.text and batch.index.equal(same.index)
        later.close()
    assert Counter(text for b in stream for text in b.text).keys() == {str(i) for i in range(33)}


def test_what_is_seen_and_cropped_is_accounted_for() -> None:
    source = wide_tall_square()
    account = account_of([source], AT_64)
    assert account.seen == 33 and account.total == 35
    assert account.others["too small"] == 1 and account.others["of no bucket's shape"] == 1
    assert {size: n for size, (n, _) in account.buckets.items()} == {"36x108": 10, "64x64": 20, "108x36": 3}
    assert account.cropped == pytest.approx(13 / 33 * (1 - 3 / 3.04), abs=1e-4)
    assert account.line().endswith("1 too small, 1 of no bucket's shape; 3 shapes, 0.5% cropped")
    assert Account.from_stored(account.stored()) == account
    squares = account_of([Drawings(source.sizes, buckets=False)], AT_64)
    assert (squares.seen, dict(squares.buckets)) == (34, {}) and "shapes" not in squares.line()
    part = Subset(source, np.arange(10), "part")
    assert in_buckets(part) and account_of([part], AT_64).buckets.keys() == {"36x108"}


def test_a_mixture_has_buckets_for_the_sources_that_say_so() -> None:
    grouped, squares = Drawings([(100, 300)] * 4), Drawings([(100, 300)] * 4, buckets=False)
    found = filled([grouped, squares], AT_64)
    assert [(b.size, [list(items) for items in b.items]) for b in found] == [
        ((36, 108), [[0, 1, 2, 3], []]),
        ((64, 64), [[], [0, 1, 2, 3]]),
    ]
    assert size_of(grouped, 0, AT_64) == (36, 108) and size_of(squares, 0, AT_64) == (64, 64)
    assert len(usable(grouped, Shapes((64, 64)))) == 4  # a stage without buckets crops all to squares
    with pytest.raises(UserError, match="none of its 2 images fits a bucket of the area of 64x64 pixels"):
        Loader([grouped, Drawings([(30, 30), (10, 900)])], size=(64, 64), stride=4)


def clip_art() -> np.ndarray:
    """Sizes (h, w) with the shapes of openclipart's 6,897 drawings (Debian's openclipart-png 0.18, its headers read):
    57% squares, 9% pages of paper, the others by their quantiles, one in 250 longer than any bucket."""
    shares = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99]
    quantiles = [0.28, 0.49, 0.5, 0.67, 0.88, 1.36, 1.62, 2.0, 2.95]  # of h / w
    others = np.exp(np.interp(np.linspace(0.01, 0.99, 1000), shares, np.log(quantiles)))
    long = np.geomspace(5.2, 17, 12)
    return np.array(of_aspects(np.concatenate([np.full(1665, 1.0), np.full(263, 2**0.5), others, long]), 600**2))


@pytest.mark.parametrize("grid", [8, 16, 32])
def test_of_clip_art_little_is_cropped(grid: int) -> None:
    sizes = clip_art()
    account = account_of([Drawings(sizes.tolist())], Shapes((64, 64), 64 // grid))
    assert 0.12 < cropped(sizes, np.ones((1, 2), np.int64)).mean() < 0.14
    assert account.cropped <= (0.05 if grid == 8 else 0.02)
    assert {why: n for why, n in account.others.items() if n} == {"of no bucket's shape": 12}


def test_a_folder_with_buckets(tmp_path: Path, run_cli: RunCli) -> None:
    """By the command line: what is in the buckets, and a sheet that shows shapes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, (h, w) in enumerate([(64, 64)] * 3 + [(80, 160)] * 2 + [(20, 20), (500, 60)]):
        Image.new("RGB", (w, h), "red").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}", encoding="utf-8")
    write_tar(tmp_path / "0.tar", [("0.png", an_image(90, 90)), ("0.txt", b"a picture")])
    sheet = tmp_path / "sheet.png"
    said = run_cli("data", folder, "--buckets", "--sheet", sheet)
    assert said.code == 0, said.err
    text = " ".join(said.out.split())
    assert "sees 5 of 7 images: 1 too small, 1 of no bucket's shape; 2 shapes, " in text
    assert "44x88 2 0.0%" in text and "64x64 3 0.0%" in text and "all 5 0.0%" in text
    with Image.open(sheet) as image:
        pixels = np.asarray(image)[:, :, 1] == 0  # red
    assert [int(pixels[:128, 128 * at : 128 * at + 128].any(axis=1).sum()) for at in (0, 3)] == [64, 44]
    grouped, plain = (open_source({"source": str(folder), "buckets": on}) for on in (True, False))
    assert grouped.fingerprint != plain.fingerprint
    with pytest.raises(UserError, match=r"got buckets: true, and .* is read shard by shard, each of which has images"):
        open_mixture([{"source": str(folder), "buckets": True}, {"source": str(tmp_path / "0.tar"), "lanes": 2}])
    with pytest.raises(UserError, match="buckets: got true with fit: pad, which makes every image a square"):
        open_source({"source": str(folder), "buckets": True, "fit": "pad"})
