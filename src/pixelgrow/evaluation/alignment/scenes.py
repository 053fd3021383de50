"""The built-in scenes: the checker's answers, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence

from pixelgrow.data.scenes.checker import answer
from pixelgrow.data.scenes.questions import Question
from pixelgrow.data.scenes.seeing import View
from pixelgrow.evaluation.alignment.results import Answer, Judged


def judge_scene(name: str, prompt: str, view: View, questions: Sequence[Question]) -> Judged:
    """Ask the checker all questions of a caption about what it sees in an image (`look`).

    Measures: `scenes`, 1 if every answer is as expected (`accuracy`'s "all"), and `scenes-questions`, the share of
    them. Kinds: background, colour, shape, count, relation.
    """
    found = [(q, answer(view, q)) for q in questions]
    answers = tuple(Answer(q.text, q.kind, "yes" if a else "no", float(a is q.expected)) for q, a in found)
    share = sum(a.score for a in answers) / len(answers)
    return Judged(name, prompt, {"scenes": float(share == 1), "scenes-questions": share}, answers)
