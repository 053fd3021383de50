"""DSG with its dependencies, Soft-TIFA, and the checker's questions prompt by prompt."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pixelgrow.data.scenes.checker import accuracy
from pixelgrow.data.scenes.questions import Question as SceneQuestion
from pixelgrow.data.scenes.seeing import Seen, View, look
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.evaluation.alignment.questions import Item, Question, load_questions
from pixelgrow.evaluation.alignment.results import summarise
from pixelgrow.evaluation.alignment.scenes import judge_scene
from pixelgrow.evaluation.alignment.scores import dsg_score, judge_dsg, judge_soft_tifa, soft_tifa
from pixelgrow.evaluation.alignment.vqa import load_vqa
from question_models import Answers, image_of, save_question_model


def chain(*parents: tuple[str, ...]) -> tuple[Question, ...]:
    return tuple(
        Question(str(i), f"{i}?", "yes", "entity" if not p else "attribute", p) for i, p in enumerate(parents, 1)
    )


# 1, 2 <- 1, 3 <- 2, 4 <- 1 and 5, 5
GRAPH = chain((), ("1",), ("2",), ("1", "5"), ())


@pytest.mark.parametrize(
    ("no", "right"),
    [
        ("", "12345"),
        ("1", "35"),  # 3 counts: its parent was answered yes, whatever the parent's parent was
        ("2", "145"),
        ("5", "123"),
        ("4", "1235"),
        ("12345", ""),
    ],
)
def test_a_question_counts_if_all_its_parents_were_answered_yes(no: str, right: str) -> None:
    scores = dsg_score(GRAPH, {q.id: q.id not in no for q in GRAPH})
    assert scores == {q.id: float(q.id in right) for q in GRAPH}


def test_a_prompt_judged_by_dsg() -> None:
    given = {"1": "no", "2": "yes, it is", "3": "yes.", "4": "yesterday", "5": "Yes".lower()}
    found = judge_dsg(Answers(given), Item("a prompt", GRAPH, "x_1"), image_of(0))
    assert (found.id, found.prompt) == ("x_1", "a prompt")
    assert found.scores == {"dsg": 2 / 5, "dsg-free": 3 / 5}
    assert [a.given for a in found.answers] == list(given.values())
    assert [a.score for a in found.answers] == [0, 0, 1, 0, 1]
    assert [a.kind for a in found.answers] == ["entity", "attribute", "attribute", "attribute", "entity"]


def test_soft_tifa_is_two_means() -> None:
    assert soft_tifa([0.5, 0.02, 1]) == pytest.approx((1.52 / 3, (0.5 * 0.02) ** (1 / 3)))
    assert soft_tifa([0.9, 0.0]) == (0.45, 0.0) and soft_tifa([0.3]) == pytest.approx((0.3, 0.3))
    assert soft_tifa([1e-300] * 4)[1] == pytest.approx(1e-300)  # a product would be 0


def test_a_prompt_judged_by_soft_tifa() -> None:
    item = Item("p", (Question("1", "a?", "Yes", "object"), Question("2", "b?", "two", "count")), "7")
    found = judge_soft_tifa(Answers({"1": 0.9, "2": 0.4}), item, image_of(0))
    assert found.scores == pytest.approx({"soft-tifa-am": 0.65, "soft-tifa-gm": math.sqrt(0.36)})
    assert [(a.given, a.score, a.kind) for a in found.answers] == [(0.9, 0.9, "object"), (0.4, 0.4, "count")]


def test_from_files_to_means_with_a_model(tmp_path: Path) -> None:
    save_question_model(tmp_path / "model", "llava")
    vqa = load_vqa(str(tmp_path / "model"))
    (tmp_path / "dsg.csv").write_text(
        "item_id,text,proposition_id,dependency,category_broad,question_natural_language\n"
        "a_1,a dog,1,0,entity,is there a dog ?\na_1,a dog,2,1,attribute,is the dog one ?\n"
        "a_2,a cat,1,0,entity,is there a cat ?\n"
    )
    pairs = [["how many dogs are in the image ?", "two"], ["are there dogs ?", "Yes"]]
    line = {"prompt": "two dogs", "vqa_list": pairs, "skills": ["count", "object"]}
    (tmp_path / "two.jsonl").write_text(json.dumps(line))
    for form, name, judge in (("dsg", "dsg.csv", judge_dsg), ("geneval2", "two.jsonl", judge_soft_tifa)):
        items = load_questions(tmp_path / name, form)
        vqa.check(q for item in items for q in item.questions)
        found = [judge(vqa, item, image_of(i)) for i, item in enumerate(items)]
        assert found == [judge(vqa, item, image_of(i)) for i, item in enumerate(items)]
        summary = summarise(found)
        assert all(0 <= s.low <= s.mean <= s.high <= 1 for s in (*summary.scores.values(), *summary.kinds.values()))
        assert summary.images == len(items) and len(summary.kinds) == 2


def test_a_scene_may_be_asked_for_what_it_lacks() -> None:
    view = View("white", (Seen("red", "star", 0.5, 0.5),))
    asked = [SceneQuestion("colour", f"{c}?", (c,), expected=False) for c in ("red", "blue")]
    found = judge_scene("1", "p", view, asked)
    assert [(a.given, a.score) for a in found.answers] == [("yes", 0), ("no", 1)]
    assert found.scores == {"scenes": 0, "scenes-questions": 0.5}


def test_scenes_agree_with_the_checkers_accuracy() -> None:
    scenes = [Scenes(split="heldout").scene(i) for i in range(40)]
    views = [look(s.render(32, 32)) for s in scenes]
    asked = [scenes[(i + 1) % 40 if i % 2 else i].questions for i in range(40)]  # every other caption is another's
    found = [
        judge_scene(str(i), "p", view, questions) for i, (view, questions) in enumerate(zip(views, asked, strict=True))
    ]
    summary, want = summarise(found), accuracy(views, asked)
    assert summary.scores["scenes"].mean == pytest.approx(want.pop("all")) and 0.4 < summary.scores["scenes"].mean < 0.8
    assert {kind: share.mean for kind, share in summary.kinds.items()} == pytest.approx(want)
    assert summary.scores["scenes-questions"].mean == pytest.approx(
        np.mean([np.mean([a.score for a in j.answers]) for j in found])
    )
