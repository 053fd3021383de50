"""Retrieval against a brute force, chance, and ties."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.retrieval import TOPS, _hit, retrieval


def features(n: int, seed: int, width: int = 16) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def names(n: int) -> list[str]:
    return [f"caption {i}" for i in range(n)]


def means(generated: Tensor, real: Tensor, captions: list[str], own: list[str] | None = None) -> dict[str, float]:
    return {k: s.mean for k, s in retrieval(generated, real, captions, own).summary().scores.items()}


def test_ranks_are_those_of_a_brute_force() -> None:
    real, generated = features(30, 1), features(30, 1) + 1.5 * features(30, 2)
    found = retrieval(generated, real, names(30))
    for i, judged in enumerate(found.judged):
        cosines = [
            float(np.dot(g := generated[i].numpy(), r) / np.linalg.norm(g) / np.linalg.norm(r)) for r in real.numpy()
        ]
        rank = sorted(cosines, reverse=True).index(cosines[i])
        assert judged.scores == {f"top-{k}": float(rank < k) for k in TOPS} and judged.prompt == f"caption {i}"
    summary = found.summary().scores
    assert 1 / 30 < summary["top-1"].mean < summary["top-5"].mean < 1
    assert summary["top-1"].low < summary["top-1"].mean < summary["top-1"].high
    assert found.chance == pytest.approx({"top-1": 1 / 30, "top-5": 5 / 30}) and found.candidates == 30
    assert found.to_json()["chance"] == found.chance and found.to_json()["scores"]["top-5"]["prompts"] == 30


def test_the_length_of_features_makes_no_difference() -> None:
    real, generated = features(12, 1), features(12, 1) + features(12, 2)
    scaled = generated * torch.linspace(0.1, 9, 12)[:, None]
    assert means(generated, real * torch.linspace(5, 0.2, 12)[:, None], names(12)) == means(scaled, real, names(12))


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_features_that_say_nothing_score_chance(constant: float) -> None:
    real = torch.full((20, 8), constant)
    found = retrieval(features(20, 3, 8), real, names(20))
    assert {k: s.mean for k, s in found.summary().scores.items()} == pytest.approx(found.chance)
    noisy = real + 1e-7 * features(20, 4, 8)  # float32 networks agree no better from batch to batch
    if constant:
        assert means(features(20, 3, 8), noisy, names(20)) == pytest.approx(found.chance)


def test_equal_images_share_the_place() -> None:
    real = torch.eye(8)
    real[1] = real[0]
    found = retrieval(torch.eye(8)[:3], real, names(8), names(8)[:3])
    assert [j.scores["top-1"] for j in found.judged] == pytest.approx(
        [1 / 2, 1 / 8, 1]
    )  # the second is orthogonal to all
    assert [j.scores["top-5"] for j in found.judged] == pytest.approx([1, 5 / 8, 1])


def test_every_real_image_of_the_caption_is_its_own() -> None:
    captions = ["a", "a", "b", "c", "c", "d", "e"]
    real = torch.eye(7)
    near = real[[0, 4, 5]] * 2 + 0.1 * real[[2, 3, 2]]
    found = retrieval(near, real, captions, ["a", "c", "b"])
    assert [j.scores["top-1"] for j in found.judged] == [1.0, 1.0, 0.0]
    assert found.chance["top-1"] == pytest.approx((2 / 7 + 2 / 7 + 1 / 7) / 3)
    assert found.chance["top-5"] == pytest.approx((2 * (1 - 1 / 21) + 5 / 7) / 3)


def test_several_images_of_a_caption_are_one_draw() -> None:
    real = features(10, 1)
    own = [name for name in names(10) for _ in range(4)]
    summary = retrieval(real.repeat_interleave(4, 0), real, names(10), own).summary()
    assert summary.images == 40 and summary.scores["top-1"].prompts == 10 and summary.scores["top-1"].mean == 1
    assert summary.scores["top-1"].low < 0.8


@given(st.integers(0, 6), st.integers(1, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_a_tie_is_a_random_order(places: int, tied: int, data: st.DataObject) -> None:
    mine = data.draw(st.integers(1, tied))
    orders = list(permutations(range(tied)))
    hits = sum(any(i < mine for i in order[:places]) for order in orders)
    assert _hit(places, tied, mine) == pytest.approx(hits / len(orders))


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = features(9, 1), features(9, 1) + features(9, 2)
    whole = retrieval(generated, real, names(9))
    monkeypatch.setattr("pixelgrow.evaluation.alignment.retrieval.ROWS", 4)
    assert retrieval(generated, real, names(9)) == whole


def test_a_top_of_all_is_left_out() -> None:
    assert list(retrieval(features(5, 0), features(5, 1), names(5)).chance) == ["top-1"]
    assert list(retrieval(features(6, 0), features(6, 1), names(6)).chance) == ["top-1", "top-5"]


BROKEN = features(2, 0) * torch.tensor([[1.0], [torch.nan]])


@pytest.mark.parametrize(
    ("generated", "real", "captions", "own", "words"),
    [
        (features(3, 0), features(3, 0, 8), names(3), None, "got features (3, 16) of generated and (3, 8) of real"),
        (features(3, 0)[0], features(3, 0), names(3), None, "got features (16,) of generated"),
        (features(3, 0), features(4, 0), names(3), None, "got 3 generated and 4 real images for 3 and 3 captions"),
        (features(2, 0), features(3, 0), names(3), None, "got 2 generated and 3 real images for 3 and 3 captions"),
        (features(1, 0), features(1, 0), names(1), None, "got 1 generated images and 1 different captions"),
        (features(2, 0), features(2, 0), ["a", "a"], None, "got 2 generated images and 1 different captions"),
        (features(0, 0), features(2, 0), names(2), [], "got 0 generated images and 2 different captions"),
        (features(1, 0), features(2, 0), names(2), ["x"], "no real image has the caption 'x'"),
        (features(2, 0), BROKEN, names(2), None, "of 1 real images, the first of them 1"),
        (features(2, 0) / 0, features(2, 0), names(2), None, "of 2 generated images, the first of them 0"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    generated: Tensor, real: Tensor, captions: list[str], own: list[str] | None, words: str
) -> None:
    with pytest.raises(UserError) as error:
        retrieval(generated, real, captions, own)
    assert words in str(error.value) and "\n" not in str(error.value)
