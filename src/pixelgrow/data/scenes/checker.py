"""Does an image show what its caption says? Answers a caption's questions from the pixels alone."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pixelgrow.data.scenes.questions import KINDS, Question
from pixelgrow.data.scenes.seeing import View, look
from pixelgrow.errors import UserError

APART = 0.1  # least distance of the centres of two groups for a relation to hold, as a share of the side


def answer(view: View, question: Question) -> bool:
    """The answer to a question about a view; no, if it is about a colour that is not there."""
    kind, args = question.kind, question.args
    if kind == "background":
        return view.background == args[0]
    mine = [o for o in view.objects if o.colour == args[0]]
    if kind == "colour":
        return bool(mine)
    if kind == "shape":  # most of them
        return 2 * sum(o.shape == args[1] for o in mine) > len(mine)
    if kind == "count":
        return len(mine) == args[1]
    if kind == "relation":
        others = [o for o in view.objects if o.colour == args[2]]
        if not mine or not others:
            return False
        down = float(np.mean([o.y for o in mine]) - np.mean([o.y for o in others]))
        right = float(np.mean([o.x for o in mine]) - np.mean([o.x for o in others]))
        return {"above": -down, "below": down, "left of": -right, "right of": right}[str(args[1])] > APART
    raise UserError(
        f"checker: got a question of kind {kind!r}, expected one of {', '.join(KINDS)}; correct the question"
    )


def check(image: NDArray[np.uint8], questions: Iterable[Question]) -> list[bool]:
    """For each question, whether the image, uint8 (h, w, 3), gives the expected answer."""
    view = look(image)
    return [answer(view, q) is q.expected for q in questions]


def accuracy(views: Iterable[View], questions: Iterable[Sequence[Question]]) -> dict[str, float]:
    """The share of expected answers by kind, and "all": the share of images with every answer as expected.

    A kind without questions is left out. Raises UserError unless there is one list of questions for each view.
    """
    seen, asked = list(views), list(questions)
    if len(seen) != len(asked):
        raise UserError(
            f"checker: got {len(seen)} images and {len(asked)} lists of questions, unequal; expected one list an image"
        )
    right: dict[str, list[bool]] = {}
    whole = []
    for view, claims in zip(seen, asked, strict=True):
        answers = [answer(view, q) is q.expected for q in claims]
        whole.append(all(answers))
        for q, a in zip(claims, answers, strict=True):
            right.setdefault(q.kind, []).append(a)
    found = {kind: float(np.mean(right[kind])) for kind in KINDS if kind in right}
    return found | ({"all": float(np.mean(whole))} if whole else {})


def score(images: Iterable[NDArray[np.uint8]], questions: Iterable[Sequence[Question]]) -> dict[str, float]:
    """`accuracy` of images, each uint8 (h, w, 3), under the questions of their captions."""
    return accuracy((look(image) for image in images), questions)
