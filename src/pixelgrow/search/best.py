"""Best of many: previews of each prompt, scored by a judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from PIL import Image

from pixelgrow.errors import UserError
from pixelgrow.model import Model
from pixelgrow.search.judges import Judge, checker, judge_named


@dataclass(frozen=True)
class Winner:
    """The best previews of a prompt, best first: `index` numbers the samples, `scores` are theirs."""

    prompt: str
    index: list[int]
    scores: list[float]


def best_of(
    model: Model,
    prompts: Sequence[str] | str,
    *,
    judge: Judge | str,
    of: int = 64,
    keep: int = 1,
    batch: int = 64,
    **settings: Any,
) -> list[Winner]:
    """For each prompt the `keep` best of `of` previews; `model.sample(prompt, index=winner.index)` samples one large.

    judge: see `judge_named`, or a function (images, prompt) -> scores; of equal scores the lower number wins. Preview j
    of prompt p has the number p * of + j. settings: as in `Model.stream`. Raises UserError, also where the model is not
    exact.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not 1 <= keep <= of:
        raise UserError(f"best of {of}: got {keep} to keep, expected from 1 to {of}")
    score = judge_named(judge, model.device) if isinstance(judge, str) else judge
    if score is checker:
        for prompt in prompts:  # one that it cannot read is refused before anything is sampled
            checker([], prompt)
    previews = model.stream([p for p in prompts for _ in range(of)], preview=True, batch=batch, **settings)
    winners = []
    for number, prompt in enumerate(prompts):
        images: list[Image.Image] = list(islice(previews, of))
        scores = [float(s) for s in score(images, prompt)]
        if len(scores) != of or not all(map(math.isfinite, scores)):
            raise UserError(f"the judge gave {len(scores)} scores for {of} images: expected a finite number for each")
        order = sorted(range(of), key=lambda j, scores=scores: (-scores[j], j))[:keep]  # type: ignore[misc]
        winners.append(Winner(prompt, [number * of + j for j in order], [scores[j] for j in order]))
    return winners
