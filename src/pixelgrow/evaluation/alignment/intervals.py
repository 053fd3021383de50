"""Intervals over prompts for means of scores in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

METHOD = "95%: Wilson score interval, with the effective number of prompts"
Z = 1.959963984540054  # the normal distribution's quantile at 0.975


@dataclass(frozen=True)
class Share:
    """A mean of scores in [0, 1] with its 95% interval, and the number of prompts that it is over."""

    mean: float
    low: float
    high: float
    prompts: int


def over_prompts(scores: Sequence[float], asked: Sequence[float] | None = None) -> Share:
    """The mean score a question, and how far it would move with other prompts of the same kind.

    scores: of each prompt, the sum over its questions, each in [0, 1]. asked: of each prompt, how many questions; one,
    if not given.

    Questions about one image are not independent, so prompts are what is sampled. The interval is Wilson's (1927, J.
    Am. Stat. Assoc. 22) with n = p (1 - p) / v in the place of the number of trials: the effective sample size of
    survey sampling (Kish 1965), where v is the variance of p over prompts as a ratio of sums. With one question a
    prompt, answered right or wrong, n is the number of prompts and the interval Wilson's own. If all is right or all
    wrong, v says nothing and n is the number of prompts, so that the interval never claims certainty.
    """
    right = np.asarray(scores, np.float64)
    count = np.ones_like(right) if asked is None else np.asarray(asked, np.float64)
    n, total = len(right), float(count.sum())
    assert n > 0 and total > 0 and np.isfinite(right).all() and (right >= 0).all() and (right <= count + 1e-9).all()
    mean = min(1.0, float(right.sum()) / total)
    spread, variance = mean * (1 - mean), float((((right - mean * count) / total) ** 2).sum())
    if n == 1 or spread < 1e-12:
        effective = float(n)
    elif variance < 1e-300:
        return Share(mean, mean, mean, n)
    else:
        effective = spread / variance
    shrink = 1 + Z**2 / effective
    centre = (mean + Z**2 / (2 * effective)) / shrink
    half = Z / shrink * float(np.sqrt(spread / effective + (Z / (2 * effective)) ** 2))
    return Share(mean, min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half)), n)
