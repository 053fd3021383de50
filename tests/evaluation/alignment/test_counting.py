"""Counting by detectors, VQA models and the checker; detectors against transformers' own pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from pixelgrow.data.scenes.checker import accuracy
from pixelgrow.data.scenes.seeing import Seen, View, look
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment import detector as detectors
from pixelgrow.evaluation.alignment.counting import VqaCounter, judge_counts, judge_scene_counts
from pixelgrow.evaluation.alignment.detector import OVERLAP, load_detector
from pixelgrow.evaluation.alignment.questions import Item, Question
from pixelgrow.evaluation.alignment.results import summarise
from pixelgrow.evaluation.alignment.vqa import load_vqa
from pixelgrow.pictures import to_pil
from question_models import Answers, image_of, save_detector, save_question_model


def how_many(noun: str, count: int) -> Question:
    return Question(noun, f"How many {noun}s are in the image?", str(count), "simple_numeric", (), noun)


# --- detectors --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["yolos", "owlvit", "grounding"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    save_detector(folder, request.param)
    return folder


def found_by_transformers(folder: Path, seed: int, noun: str, threshold: float) -> list[list[float]]:
    """Boxes of a noun, by transformers' pipeline, most confident first."""
    picture = to_pil(image_of(seed))
    if folder.name.startswith("yolos"):
        pipe: Any = transformers.pipeline("object-detection", model=str(folder))
        boxes = [b for b in pipe(picture, threshold=threshold) if b["label"] == noun]
    else:
        text = {"owl": f"a photo of a {noun}", "gro": f"a {noun}"}[folder.name[:3]]
        pipe = transformers.pipeline("zero-shot-object-detection", model=str(folder))
        boxes = pipe(picture, candidate_labels=[text], threshold=threshold)
    return [[b["box"][k] for k in ("xmin", "ymin", "xmax", "ymax")] for b in sorted(boxes, key=lambda b: -b["score"])]


def test_boxes_are_those_of_transformers(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detectors, "OVERLAP", 1.0)  # all boxes are kept
    detector = load_detector(str(saved), threshold=0.3)
    counts = []
    for seed in range(3):
        got = detector.boxes(image_of(seed), "dog")
        want = found_by_transformers(saved, seed, "dog", 0.3)
        assert got.int().tolist() == want
        counts.append(len(want))
    assert max(counts) > 1


def test_counts_are_of_one_noun_and_above_the_threshold(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = (load_detector(str(saved), threshold=t) for t in (0.05, 0.6))
    image, question = image_of(1), how_many("dog", 1)
    kept = low.count(image, question)
    assert kept > high.count(image, question) and kept == len(low.boxes(image, "dog"))
    if not low.zero_shot:
        counts = [low.count(image, how_many(noun, 1)) for noun in ("dog", "cat", "fish")]
        assert len(set(counts)) > 1 and sum(counts) <= 12
    if saved.name.startswith("owlvit"):  # the other's boxes are too small to overlap
        monkeypatch.setattr(detectors, "OVERLAP", 1.0)
        assert low.count(image, question) > kept  # several boxes of one object


def test_a_detector_is_described(saved: Path) -> None:
    about = load_detector(str(saved)).describe()
    default = {"yolos": 0.5, "owlvit": 0.1, "grounding": 0.25}
    assert about["threshold"] == next(v for k, v in default.items() if saved.name.startswith(k))
    assert about["overlap"] == (None if saved.name.startswith("yolos") else OVERLAP)
    assert json.loads(json.dumps(about)) == about


@given(
    st.lists(st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(0, 8)] * 2), max_size=12),
)
def test_of_boxes_that_overlap_the_first_is_kept(sides: list[tuple[int, int, int, int]]) -> None:
    boxes = [(x, y, x + w, y + h) for x, y, w, h in sides]
    kept: list[tuple[int, ...]] = []
    for box in boxes:
        cells = {(i, j) for i in range(box[0], box[2]) for j in range(box[1], box[3])}
        overlaps = []
        for other in kept:
            others = {(i, j) for i in range(other[0], other[2]) for j in range(other[1], other[3])}
            overlaps.append(len(cells & others) / max(1, len(cells | others)))
        if max(overlaps, default=0) <= OVERLAP:
            kept.append(box)
    got = detectors._apart(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    assert [tuple(map(int, box)) for box in got.tolist()] == kept


def test_nouns_that_a_detector_does_not_know_are_one_line(tmp_path: Path) -> None:
    save_detector(tmp_path, "yolos")
    detector = load_detector(str(tmp_path))
    with pytest.raises(UserError, match=r"does not know 'axolotl' and 1 more; expected nouns among its 3; choose"):
        detector.check([how_many("dog", 1), how_many("axolotl", 2), how_many("olive", 1), how_many("olive", 3)])
    with pytest.raises(UserError, match=r"'Is it red\?' counts nothing, expected questions of form gecko"):
        detector.check([Question("1", "Is it red?", "yes", "attribute")])


def test_what_is_no_detector_is_one_line(tmp_path: Path) -> None:
    save_question_model(tmp_path, "git")
    with pytest.raises(UserError, match="is a GitForCausalLM, expected an object detector"):
        load_detector(str(tmp_path))
    with pytest.raises(UserError, match="got threshold 2, expected a number between 0 and 1"):
        load_detector(str(tmp_path), threshold=2)
    with pytest.raises(UserError, match=r"detector './nope' is not a folder here"):
        load_detector("./nope")


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_right_if_all_its_counts_are() -> None:
    counter = VqaCounter(Answers({"dog": "Two dogs.", "cat": "3", "fly": "many"}))
    image = image_of(0)
    right = judge_counts(counter, Item("p", (how_many("dog", 2), how_many("cat", 3)), "a"), image)
    wrong = judge_counts(counter, Item("q", (how_many("dog", 2), how_many("fly", 3)), "b"), image)
    assert right.scores == {"counting": 1} and wrong.scores == {"counting": 0}
    assert [(a.kind, a.given, a.score) for a in wrong.answers] == [("2", 2, 1), ("3", "", 0)]
    summary = summarise([right, wrong])
    assert summary.scores["counting"].mean == 0.5
    assert {kind: share.mean for kind, share in summary.kinds.items()} == {"2": 1, "3": 0.5}


def test_a_model_that_has_no_word_for_a_number_is_refused(tmp_path: Path) -> None:
    save_question_model(tmp_path, "vilt")
    counter = VqaCounter(load_vqa(str(tmp_path)))
    counter.check([how_many("dog", 3)])
    with pytest.raises(UserError, match="cannot answer '5'"):
        counter.check([how_many("dog", 3), how_many("dog", 5)])
    assert counter.describe()["class"] == "ViltForQuestionAnswering"
    assert judge_counts(counter, Item("p", (how_many("dog", 3),), "a"), image_of(0)).answers[0].kind == "3"


def test_scenes_are_counted_by_the_checker() -> None:
    scenes = [Scenes(split="heldout").scene(i) for i in range(60)]
    views = [look(s.render(32, 32)) for s in scenes]
    asked = [scenes[(i + 1) % 60 if i % 3 == 0 else i].questions for i in range(60)]
    judged = [judge_scene_counts(str(i), "p", v, q) for i, (v, q) in enumerate(zip(views, asked, strict=True))]
    found = [j for j in judged if j is not None]
    assert len(found) == 60
    summary = summarise(found)
    counts = [[q for q in questions if q.kind == "count"] for questions in asked]
    want = accuracy(views, counts)
    assert summary.scores["counting"].mean == pytest.approx(want["all"])
    assert np.mean([a.score for j in found for a in j.answers]) == pytest.approx(want["count"])
    assert set(summary.kinds) == {"1", "2", "3", "4", "5"}


def test_a_scene_counts_objects_by_colour() -> None:
    scene = next(s for s in (Scenes().scene(i) for i in range(99)) if s.spec.groups[0].count == 3)
    colour = scene.spec.groups[0].colour
    view = View("white", tuple(Seen(colour, "star", 0.1 * i, 0.5) for i in range(2)))
    found = judge_scene_counts("7", scene.caption, view, scene.questions)
    assert found is not None and found.scores == {"counting": 0}
    assert (found.answers[0].kind, found.answers[0].given) == ("3", 2)
    assert judge_scene_counts("7", "", view, [q for q in scene.questions if q.kind != "count"]) is None
