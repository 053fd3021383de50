"""Scores of answers: DSG and Soft-TIFA."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from pixelgrow.evaluation.alignment.questions import Item, Question
from pixelgrow.evaluation.alignment.results import Answer, Judged
from pixelgrow.evaluation.alignment.vqa import Vqa


def dsg_score(questions: Sequence[Question], yes: Mapping[str, bool]) -> dict[str, float]:
    """The score of each question under DSG's rule (Cho et al., arXiv 2310.18235): yes to it and to all its parents.

    yes: by question id, whether its answer is yes. A parent's answer counts as given, whatever its own parents' answers
    are, as in the released code. The score of a prompt is the mean.
    """
    return {q.id: float(yes[q.id] and all(yes[p] for p in q.parents)) for q in questions}


def soft_tifa(probabilities: Sequence[float]) -> tuple[float, float]:
    """Soft-TIFA (arXiv 2512.16853): arithmetic and geometric mean of the expected answers' probabilities.

    The first estimates a model by question, the second by prompt, where every part must be right.
    """
    n = len(probabilities)
    assert n > 0 and all(0 <= p <= 1 for p in probabilities)
    geometric = math.exp(sum(map(math.log, probabilities)) / n) if min(probabilities) > 0 else 0.0
    return sum(probabilities) / n, geometric


def judge_dsg(vqa: Vqa, item: Item, image: Tensor) -> Judged:
    """Ask all of a prompt's questions about its image, uint8 (3, h, w).

    Measures: `dsg`, and `dsg-free`, the share of answers that are yes, without dependencies. An answer is yes if its
    first word is; DSG's code wants no further word, which models that chat add.
    """
    given = {q.id: vqa.answer(image, q) for q in item.questions}
    yes = {name: re.match(r"yes\b", answer) is not None for name, answer in given.items()}
    scores = dsg_score(item.questions, yes)
    n = len(item.questions)
    return Judged(
        item.id,
        item.prompt,
        {"dsg": sum(scores.values()) / n, "dsg-free": sum(yes.values()) / n},
        tuple(Answer(q.text, q.kind, given[q.id], scores[q.id]) for q in item.questions),
    )


def judge_soft_tifa(vqa: Vqa, item: Item, image: Tensor) -> Judged:
    """The probabilities of all of a prompt's expected answers, given its image, uint8 (3, h, w).

    Measures: `soft-tifa-am` and `soft-tifa-gm`.
    """
    found = [vqa.probability(image, q) for q in item.questions]
    arithmetic, geometric = soft_tifa(found)
    return Judged(
        item.id,
        item.prompt,
        {"soft-tifa-am": arithmetic, "soft-tifa-gm": geometric},
        tuple(Answer(q.text, q.kind, p, p) for q, p in zip(item.questions, found, strict=True)),
    )
