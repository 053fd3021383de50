"""From what is asked for to a plan, and what does not fit together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cli_files import class_model, noisy_classes
from external.test_vision import save_vision
from pixelgrow.errors import UserError
from pixelgrow.evaluation.images import Conditions, Made, open_candidate
from pixelgrow.evaluation.judges import QuestionJudge, SceneJudge
from pixelgrow.evaluation.planning import IMAGES, Asked, make_plan, parse_sweep, sampling
from pixelgrow.evaluation.protocol import evaluate
from pixelgrow.evaluation.shards import Shards
from question_models import save_detector, save_question_model

ITEM = "item_id,text,proposition_id,dependency,category_broad,question_natural_language\n"
DSG = (
    ITEM
    + 'a,a dog,1,0,entity,is there a dog?\na,a dog,2,1,count,is there one dog?\nb,a cat,1,0,entity,"is there a cat?"\n'
)
GENEVAL = [
    {"prompt": "two dogs", "vqa_list": [["how many dogs are in the image?", "two"]], "skills": ["count"]},
    {"prompt": "a cat", "vqa_list": [["is there a cat in the image?", "yes"]], "skills": ["object"]},
]
GECKO = "prompt,dataset_id,prompt_id\n2 dogs and one cat.,att/count:1,1\n3 cats.,att/count:2,2\n"


@dataclass
class Blank:
    """A candidate of 32 px that makes grey images of text."""

    name: str = "blank"
    size: tuple[int, int] = (32, 32)
    conditions: Conditions = "text"
    prompts: Sequence[str] | None = None

    def describe(self) -> dict[str, Any]:
        return {"kind": "blank"}

    def make(self, prompts: Sequence[str], numbers: Sequence[int], seed: int) -> Made:
        return Made(torch.full((len(numbers), 3, *self.size), 128 + seed, dtype=torch.uint8), 1)


def captioned(folder: Path, count: int = 16, captions: bool = True) -> str:
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        if captions:
            (folder / f"{i:02d}.txt").write_text(f"image {i}")
    return str(folder)


def line(asked: Asked, candidate: Any = None) -> str:
    with pytest.raises(UserError) as error:
        make_plan(Blank() if candidate is None else candidate, asked)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_metrics_by_default(tmp_path: Path) -> None:
    scenes = make_plan(Blank(), Asked("scenes", n=12))
    assert tuple(scenes.metrics) == ("fd", "precision", "recall", "scenes") and isinstance(scenes.judge, SceneJudge)
    assert [e.name for e in scenes.extractors] == ["efficientnet-lite0"] and len(scenes.prompts) == 12
    assert len(make_plan(Blank(), Asked("scenes", extractors=["efficientnet-lite0"] * 2, n=12)).extractors) == 1
    words = make_plan(Blank(), Asked(captioned(tmp_path / "words"), n=12))
    assert tuple(words.metrics) == ("fd", "precision", "recall", "retrieval") and words.judge is None
    others = open_candidate(captioned(tmp_path / "others", 20))  # with captions that the real images lack
    assert tuple(make_plan(others, Asked(str(tmp_path / "words"))).metrics) == ("fd", "precision", "recall")
    same = open_candidate(str(tmp_path / "words"))  # the first 12 of both are the same
    assert "retrieval" in make_plan(same, Asked(str(tmp_path / "words"), n=12)).metrics
    silent = open_candidate(captioned(tmp_path / "silent", captions=False))
    plan = make_plan(silent, Asked(captioned(tmp_path / "also silent", captions=False)))
    assert tuple(plan.metrics) == ("fd", "precision", "recall") and list(plan.prompts) == [""] * 16
    assert tuple(make_plan(silent, Asked("scenes")).metrics) == ("fd", "precision", "recall")
    only = make_plan(Blank(), Asked("scenes", metrics=["scenes"]))
    assert only.real is None and not only.extractors and len(only.prompts) == IMAGES
    assert make_plan(Blank(), Asked("scenes", metrics=["fd-ratio"], n=10)).train is not None


def test_a_folder_is_compared_with_as_many_real_images(tmp_path: Path) -> None:
    folder = open_candidate(captioned(tmp_path / "made", 12))
    plan = make_plan(folder, Asked(captioned(tmp_path / "real", 20)))
    assert (len(plan.prompts), len(plan.real or ()), list(plan.seeds)) == (12, 12, [0])
    some = list(make_plan(folder, Asked(str(tmp_path / "real"), n=6)).prompts)
    assert len(set(some)) == 6 and set(some) != {f"image {i}" for i in range(6)}  # a sample of all, not the first ones
    assert "-n 13:" in line(Asked(str(tmp_path / "real"), n=13), folder) and "has 12 images; name no more" in line(
        Asked(str(tmp_path / "real"), n=13), folder
    )
    assert "--seeds 2" in line(Asked(str(tmp_path / "real"), seeds=2), folder)


def test_what_does_not_fit_together(tmp_path: Path) -> None:
    words = captioned(tmp_path / "words")
    classes = str(noisy_classes(tmp_path, side=32))
    silent = captioned(tmp_path / "silent", captions=False)
    of_classes = open_candidate(str(class_model(tmp_path / "model")))
    nothing = Blank(conditions="nothing")
    assert "metric 'fdd' is unknown: did you mean fd" in line(Asked(words, metrics=["fdd"]))
    assert "expected some of fd, fd-infinity" in line(Asked(words, metrics=["quality"]))
    assert "one of the two" in line(Asked()) and "one of the two" in line(Asked(words, questions=tmp_path / "x"))
    assert f"-n 17: {words} has 16 images of 32x32 or larger" in line(Asked(words, n=17))
    assert "no such folder or file" in line(Asked("nowhere"))
    assert "has classes, and blank makes images of captions" in line(Asked(classes, n=12))
    assert f"--data {words} has captions, and the model was trained on classes" in line(Asked(words, n=12), of_classes)
    assert "expected a metadata.jsonl" in line(Asked(silent, n=12))
    assert "metric scenes: the checker cannot read the prompt" in line(Asked(words, n=12, metrics=["scenes"]))
    assert "metric dsg: expected --questions FILE" in line(Asked(words, n=12, metrics=["dsg"]))
    assert "extractor 'magic' is unknown" in line(Asked(words, n=12, extractors=["magic"]))
    assert "is not on this machine and cannot be fetched" in line(Asked(words, n=12, extractors=["some/model"]))
    assert make_plan(nothing, Asked(silent, n=12)).prompts == [""] * 12
    assert "--extractor: got no name, expected at least one" in line(Asked(words, n=12, extractors=[]))
    save_vision(tmp_path / "vit", "ViT")
    vit = str(tmp_path / "vit")
    assert "expected 'clip', with both halves" in line(Asked(words, n=12, metrics=["clipscore"], extractors=[vit]))


def test_questions_bring_their_prompts_and_their_metric(tmp_path: Path) -> None:
    files = {"dsg": tmp_path / "dsg.csv", "geneval2": tmp_path / "geneval.jsonl", "gecko": tmp_path / "gecko.csv"}
    files["dsg"].write_text(DSG)
    files["geneval2"].write_text("".join(json.dumps(item) + "\n" for item in GENEVAL))
    files["gecko"].write_text(GECKO)
    save_question_model(tmp_path / "vqa", "blip")
    save_detector(tmp_path / "detector", "owlvit")
    vqa, detector = str(tmp_path / "vqa"), str(tmp_path / "detector")
    measures = {"dsg": "dsg-2", "geneval2": "soft-tifa-gm-2", "gecko": "counting-2"}
    for form, file in files.items():
        plan = make_plan(Blank(), Asked(questions=file, form=form, vqa=vqa, seeds=2))
        assert isinstance(plan.judge, QuestionJudge) and plan.real is None and not plan.extractors
        result = evaluate(Blank(), plan, Shards(tmp_path / form, plan.describe(Blank())))
        row = next(r for r in result.values["metrics"] if r["name"] == measures[form])
        assert 0 <= row["low"] <= row["mean"] <= row["high"] <= 1 and len(row["values"]) == 2
        assert result.values["judge"]
    counted = make_plan(Blank(), Asked(questions=files["gecko"], form="gecko", detector=detector, n=1))
    assert counted.judge is not None and counted.judge.describe().keys() == {"counter", "questions"}
    files["dsg"].write_text(DSG.replace("is there a cat?", "is there a lynx?"))
    asked = [make_plan(Blank(), Asked(questions=files["dsg"], vqa=vqa)).describe() for _ in range(2)]
    files["dsg"].write_text(DSG)
    assert asked[0] == asked[1] != make_plan(Blank(), Asked(questions=files["dsg"], vqa=vqa)).describe()
    assert "metric dsg: expected --vqa MODEL, which" in line(Asked(questions=files["dsg"], detector=detector))
    assert "expected --vqa MODEL or --detector MODEL" in line(Asked(questions=files["gecko"], form="gecko"))
    assert "metric scenes: expected --data scenes" in line(Asked(questions=files["dsg"], metrics=["scenes"], vqa=vqa))
    assert "has 2 prompts with questions; name no more" in line(Asked(questions=files["dsg"], vqa=vqa, n=3))
    assert "got form 'tifa'" in line(Asked(questions=files["dsg"], form="tifa", vqa=vqa))
    assert "makes images of classes" in line(Asked(questions=files["dsg"], vqa=vqa), Blank(conditions="classes"))


def test_a_folder_has_images_of_the_questions_prompts(tmp_path: Path) -> None:
    (tmp_path / "dsg.csv").write_text(DSG)
    save_question_model(tmp_path / "vqa", "vilt")
    made = Path(captioned(tmp_path / "made", 2))
    asked = Asked(questions=tmp_path / "dsg.csv", vqa=str(tmp_path / "vqa"))
    assert "the prompt 'image 0' is not in" in line(asked, open_candidate(str(made)))
    (made / "00.txt").write_text("a cat")
    (made / "01.txt").write_text("a dog")
    plan = make_plan(open_candidate(str(made)), asked)
    assert list(plan.prompts) == ["a cat", "a dog"]
    assert isinstance(plan.judge, QuestionJudge) and [item.id for item in plan.judge.items] == ["b", "a"]


def test_sweeps_and_settings_are_validated() -> None:
    assert parse_sweep("guidance=1,2,4.5") == ("guidance", [1.0, 2.0, 4.5])
    assert parse_sweep("sampler=ddim,heun") == ("sampler", ["ddim", "heun"])
    for text, words in (
        ("guidance", "expected SETTING=VALUE,VALUE"),
        ("size=1,2", "one of guidance, steps, sampler, threshold"),
        ("guidance=1,x", "guidance: input should be a valid number"),
        ("steps=0,1", "steps: input should be greater than or equal to 1; got '0'"),
        ("sampler=euler", "sampler: got 'euler', expected one of"),
    ):
        with pytest.raises(UserError, match=words) as error:
            parse_sweep(text)
        assert "\n" not in str(error.value)
    assert sampling({"steps": 3}).given == {"steps": 3}
    with pytest.raises(UserError, match="interval: got"):
        sampling({"interval": (3.0, 1.0)})
