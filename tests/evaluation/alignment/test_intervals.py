"""Intervals over prompts: Wilson's where answers are single, their coverage where questions share a prompt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.intervals import over_prompts
from pixelgrow.evaluation.alignment.results import Answer, Judged, summarise


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 30), (30, 30), (1, 7), (17, 40), (995, 1000)])
def test_of_single_answers_it_is_wilsons(right: int, n: int) -> None:
    share = over_prompts([1.0] * right + [0.0] * (n - right))
    want = binomtest(right, n).proportion_ci(0.95, "wilson")
    assert (share.mean, share.prompts) == (right / n, n)
    assert (share.low, share.high) == pytest.approx((want.low, want.high), abs=1e-12)


def test_questions_that_go_together_count_once() -> None:
    alone = over_prompts([1.0] * 12 + [0.0] * 8)
    four = over_prompts([4.0] * 12 + [0.0] * 8, [4] * 20)
    assert (four.mean, four.low, four.high) == pytest.approx((alone.mean, alone.low, alone.high), abs=1e-12)
    mixed = over_prompts([2.4] * 10 + [2.0] * 10, [4] * 20)  # nearly the same share of every prompt
    assert mixed.high - mixed.low < 0.15 * (four.high - four.low)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, hits, trials = np.random.default_rng(0), 0, 2000
    for _ in range(trials):
        asked = rng.integers(1, 7, 60)
        good = rng.beta(2, 1, 60)  # some prompts are easier; more questions are harder below
        right = rng.binomial(asked, good * (1 - 0.1 * asked))
        share = over_prompts(right.astype(float), asked.astype(float))
        sizes = np.arange(1, 7)
        truth = (2 / 3) * (sizes * (1 - 0.1 * sizes)).sum() / sizes.sum()
        hits += share.low <= truth <= share.high
    assert 0.935 < hits / trials < 0.965


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 9)), min_size=1, max_size=20))
def test_the_mean_is_inside_and_all_is_within_bounds(prompts: list[tuple[float, int]]) -> None:
    share = over_prompts([p * n for p, n in prompts], [n for _, n in prompts])
    assert 0 <= share.low <= share.mean <= share.high <= 1
    assert share.mean == pytest.approx(sum(p * n for p, n in prompts) / sum(n for _, n in prompts), abs=1e-9)


def test_one_prompt_says_little_and_equal_ones_much() -> None:
    assert over_prompts([0.5]).high - over_prompts([0.5]).low > 0.8
    assert over_prompts([0.5] * 9) == type(over_prompts([0.5]))(0.5, 0.5, 0.5, 9)


def judged(name: str, score: float, *answers: tuple[str, float]) -> Judged:
    return Judged(name, f"prompt {name}", {"m": score}, tuple(Answer("?", kind, "yes", s) for kind, s in answers))


def test_a_summary_has_measures_and_kinds() -> None:
    found = [
        judged("a", 1.0, ("colour", 1.0), ("colour", 0.0), ("shape", 1.0)),
        judged("b", 0.0, ("colour", 1.0)),
        judged("b", 1.0, ("colour", 1.0), ("count", 0.0)),  # a second image of one prompt
    ]
    summary = summarise(found)
    assert summary.images == 3 and list(summary.kinds) == ["colour", "shape", "count"]
    assert summary.scores["m"] == over_prompts([1.0, 1.0], [1, 2])
    assert summary.kinds["colour"] == over_prompts([1.0, 2.0], [2, 2])
    assert summary.kinds["shape"].prompts == 1
    assert summary.to_json()["scores"]["m"]["prompts"] == 2
    assert [Judged.from_json(j.to_json()) for j in found] == found


def test_nothing_judged_is_one_line() -> None:
    with pytest.raises(UserError, match="got no judged images, expected one a prompt"):
        summarise([])
