"""Which judge answers for an alignment metric, and of which prompts: a caption's scene, or a file's questions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from pixelgrow.data.scenes.parsing import read
from pixelgrow.data.scenes.questions import Question as SceneQuestion
from pixelgrow.data.scenes.questions import questions
from pixelgrow.data.scenes.seeing import look
from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.counting import Counter, judge_counts, judge_scene_counts
from pixelgrow.evaluation.alignment.questions import Item
from pixelgrow.evaluation.alignment.results import Judged
from pixelgrow.evaluation.alignment.scenes import judge_scene
from pixelgrow.evaluation.alignment.scores import judge_dsg, judge_soft_tifa
from pixelgrow.evaluation.alignment.vqa import Vqa

OF_SCENES = ("scenes", "counting")
OF_QUESTIONS = ("dsg", "soft-tifa", "counting")


class Judge(Protocol):
    """What answers alignment metrics: image uint8 (3, h, w) of prompt `number` -> what is said of it, by metric."""

    def describe(self) -> dict[str, Any]: ...
    def __call__(self, number: int, image: Tensor, /) -> dict[str, Judged]: ...


@dataclass(frozen=True)
class SceneJudge:
    """The checker of the built-in scenes. Raises UserError for a prompt that is none of their captions."""

    metrics: Sequence[str]
    prompts: Sequence[str]

    def describe(self) -> dict[str, Any]:
        return {"judge": "the checker of the built-in scenes"}

    @cached_property
    def questions(self) -> list[tuple[SceneQuestion, ...]]:
        found = []
        for prompt in self.prompts:
            if (spec := read(prompt)) is None:
                raise UserError(
                    f"metric {self.metrics[0]}: the checker cannot read the prompt {prompt!r}, expected captions of "
                    "the built-in scenes: drop the metric, or name scenes as --data"
                )
            found.append(questions(spec))
        return found

    def __call__(self, number: int, image: Tensor) -> dict[str, Judged]:
        prompt, asked = self.prompts[number], self.questions[number]
        view = look(image.permute(1, 2, 0).numpy())
        found = {"scenes": judge_scene(prompt, prompt, view, asked)} if "scenes" in self.metrics else {}
        if "counting" in self.metrics and (counted := judge_scene_counts(prompt, prompt, view, asked)):
            found["counting"] = counted
        return found


@dataclass(frozen=True)
class QuestionJudge:
    """A VQA model, or a detector that counts, on a file's questions. `vqa` and `counter` are there if a metric asks."""

    metrics: Sequence[str]
    items: Sequence[Item]
    vqa: Vqa | None = None
    counter: Counter | None = None

    def check(self) -> None:
        """Raise UserError if they cannot answer one of the questions."""
        asked = [q for item in self.items for q in item.questions]
        if self.vqa is not None and set(self.metrics) & {"dsg", "soft-tifa"}:
            self.vqa.check(asked)
        if self.counter is not None:
            self.counter.check(asked)

    def describe(self) -> dict[str, Any]:
        parts = {"vqa": self.vqa, "counter": self.counter}
        asked = hashlib.sha256(repr([tuple(item) for item in self.items]).encode()).hexdigest()
        return {name: part.describe() for name, part in parts.items() if part is not None} | {"questions": asked}

    def __call__(self, number: int, image: Tensor) -> dict[str, Judged]:
        item, found = self.items[number], {}
        for metric in self.metrics:
            if metric == "counting":
                assert self.counter is not None
                found[metric] = judge_counts(self.counter, item, image)
            else:
                assert self.vqa is not None
                found[metric] = (judge_dsg if metric == "dsg" else judge_soft_tifa)(self.vqa, item, image)
        return found
