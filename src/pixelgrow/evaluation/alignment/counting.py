"""Are there as many objects as the prompt says? Counted by a detector, a VQA model, or the scenes' checker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from pixelgrow.data.scenes.questions import Question as SceneQuestion
from pixelgrow.data.scenes.seeing import View
from pixelgrow.evaluation.alignment.nouns import number
from pixelgrow.evaluation.alignment.questions import Item, Question
from pixelgrow.evaluation.alignment.results import Answer, Judged
from pixelgrow.evaluation.alignment.vqa import Vqa


class Counter(Protocol):
    """What counts a question's noun in an image, uint8 (3, h, w): a `Detector`, or a `VqaCounter`."""

    def describe(self) -> dict[str, Any]:
        """JSON: all that repeating a count needs."""
        ...

    def check(self, questions: Iterable[Question]) -> None:
        """Raise UserError if it cannot count what one of the questions asks for; call it before anything is sampled."""
        ...

    def count(self, image: Tensor, question: Question) -> int | None:
        """How many there are; None if it gives no number."""
        ...


class VqaCounter:
    """Counts by asking a VQA model: the first number in its answer."""

    def __init__(self, vqa: Vqa) -> None:
        self.vqa = vqa

    def describe(self) -> dict[str, Any]:
        """The VQA model's description."""
        return self.vqa.describe()

    def check(self, questions: Iterable[Question]) -> None:
        """Raise UserError if the model has no words for an expected number."""
        self.vqa.check(questions)

    def count(self, image: Tensor, question: Question) -> int | None:
        """How many there are; None if there is no number in the answer."""
        return number(self.vqa.answer(image, question))


def judge_counts(counter: Counter, item: Item, image: Tensor) -> Judged:
    """Compare all counts that a prompt asks for with an image, uint8 (3, h, w).

    Measure: `counting`, 1 if all are exact. Kinds: by the number asked for, each count by itself.
    """
    found = [(q, counter.count(image, q)) for q in item.questions]
    return _judged(item.id, item.prompt, [(q.text, int(q.answer), n) for q, n in found])


def judge_scene_counts(name: str, prompt: str, view: View, questions: Sequence[SceneQuestion]) -> Judged | None:
    """`judge_counts` for a caption of the built-in scenes, by what the checker sees; None if nothing is counted.

    As for the checker's question, objects are counted by colour, which no two groups of a scene share.
    """
    asked = [(q.text, q.args[0], int(q.args[1])) for q in questions if q.kind == "count"]
    seen = [(text, count, sum(o.colour == colour for o in view.objects)) for text, colour, count in asked]
    return _judged(name, prompt, seen) if seen else None


def _judged(name: str, prompt: str, counts: Sequence[tuple[str, int, int | None]]) -> Judged:
    """From (question, number asked for, number found)."""
    answers = tuple(
        Answer(text, str(want), "" if got is None else float(got), float(got == want)) for text, want, got in counts
    )
    return Judged(name, prompt, {"counting": float(all(a.score for a in answers))}, answers)
