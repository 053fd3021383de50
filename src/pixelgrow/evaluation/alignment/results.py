"""What judges say of images, and the means of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.intervals import METHOD, Share, over_prompts


@dataclass(frozen=True)
class Answer:
    """One question, what the judge answered, and the score in [0, 1] that it earned."""

    question: str
    kind: str
    given: str | float
    score: float


@dataclass(frozen=True)
class Judged:
    """What a judge says of one image. id: its prompt's. scores: by measure, each in [0, 1]."""

    id: str
    prompt: str
    scores: dict[str, float]
    answers: tuple[Answer, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Itself as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Judged:
        """The inverse of `to_json`."""
        return cls(**values | {"answers": tuple(Answer(**a) for a in values["answers"])})


@dataclass(frozen=True)
class Summary:
    """Means over prompts. scores: of each measure. kinds: of the questions of each kind, a mean over questions."""

    images: int
    scores: dict[str, Share]
    kinds: dict[str, Share]
    interval: str = METHOD

    def to_json(self) -> dict[str, Any]:
        """Itself as JSON."""
        return asdict(self)


def summarise(judged: Iterable[Judged]) -> Summary:
    """Means with intervals over prompts. Several images of one prompt count as one draw of a prompt.

    Measures and kinds keep the order in which they first come. Raises UserError if nothing was judged.
    """
    found = list(judged)
    if not found:
        raise UserError("alignment: got no judged images, expected one a prompt; ask for at least one image")
    of_scores = ((j.id, name, score) for j in found for name, score in j.scores.items())
    of_kinds = ((j.id, a.kind, a.score) for j in found for a in j.answers)
    return Summary(len(found), _shares(of_scores), _shares(of_kinds))


def _shares(scores: Iterable[tuple[str, str, float]]) -> dict[str, Share]:
    """From (prompt's id, name, score): the share of each name."""
    by_name: dict[str, dict[str, list[float]]] = {}
    for prompt, name, score in scores:
        by_name.setdefault(name, {}).setdefault(prompt, []).append(score)
    return {
        name: over_prompts([sum(s) for s in of.values()], [len(s) for s in of.values()]) for name, of in by_name.items()
    }
