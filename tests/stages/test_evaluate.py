"""The `evaluate` stage: the metrics of `pixelgrow evaluate`, on held-out images, resumed where it was cut off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pixelgrow.evaluation.protocol
from evaluation.test_planning import DSG
from pixelgrow.errors import UserError
from pixelgrow.evaluation.compare import compare, read_evaluations
from pixelgrow.evaluation.protocol import Shard
from pixelgrow.recipe.read import read_recipe
from pixelgrow.report.evaluations import comparison_table
from pixelgrow.run import run
from pixelgrow.stages.evaluate import MEASURED, Evaluated
from question_models import save_question_model
from runs import few_samples


@pytest.fixture(scope="module", autouse=True)
def _few_samples() -> Iterator[None]:
    with few_samples():
        yield


def recipe(*more: dict[str, Any], **evaluate: Any) -> Any:
    """A core, its evaluation, and more of its evaluations."""
    small = {"images": 8, "batch": 8, "sample_every": 0, "validate_every": 0, "snapshot_every": 0}
    stages = [
        {"train": {"name": "core", "size": "tiny", "resolution": 32, **small}},
        {"evaluate": {"name": "eval", "prompts": 10, "steps": 1, "batch": 4, **evaluate}},
        *({"evaluate": {"from": "core", "prompts": 10, "steps": 1, "batch": 4, **one}} for one in more),
    ]
    data = {"source": "scenes", "n": 40, "captions": 8}
    return read_recipe({"name": "r", "seed": 5, "data": data, "stages": stages}, "test")


def test_metrics_of_features_and_seeds_and_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(metrics=["recall", "mmd"], seeds=2)
    real = Evaluated.make
    made: list[tuple[int, int]] = []
    stops = [(6, 4)]

    def cut(self: Evaluated, prompts: Any, numbers: Any, seed: int) -> Any:
        if (seed, numbers[0]) in stops:
            stops.clear()
            raise KeyboardInterrupt
        made.append((seed, numbers[0]))
        return real(self, prompts, numbers, seed)

    monkeypatch.setattr(Evaluated, "make", cut)
    with pytest.raises(KeyboardInterrupt):
        run(asked, tmp_path)
    assert made == [(5, 0), (5, 4), (5, 8), (6, 0)] and (tmp_path / "r" / "eval" / MEASURED).exists()
    report = run(asked, tmp_path).read_text(encoding="utf-8")
    assert made[4:] == [(6, 4), (6, 8)] and not (tmp_path / "r" / "eval" / MEASURED).exists()
    metrics = json.loads((tmp_path / "r" / "eval" / "metrics.json").read_text())
    rows = {row["name"]: row for row in metrics["metrics"]}
    distance = rows["MMD-10 (efficientnet-lite0)"]
    assert len(distance["values"]) == 2 and distance["low"] < distance["mean"] < distance["high"]
    assert rows["scenes: colour-10"]["interval"] == "prompts"
    assert metrics["accuracy"]["colour"] == rows["scenes: colour-10"]["mean"]
    assert list(metrics["accuracy"]) == ["background", "colour", "shape", "count", "relation", "all"]
    assert metrics["seeds"] == [5, 6] and metrics["extractors"]["efficientnet-lite0"]["side"] == 224
    assert {"seams", "details", "error", "sampling", "nfe", "seconds_per_image", "peak_memory"} <= metrics.keys()
    assert "MMD-10 (efficientnet-lite0)" in report
    settings = json.loads((tmp_path / "r" / "eval" / "stage.json").read_text())["settings"]
    assert settings["extractors"] == {"efficientnet-lite0": metrics["extractors"]["efficientnet-lite0"]["identity"]}


def test_an_extractor_that_is_not_here_is_refused_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'some/model' is not on this machine"):
        run(recipe(metrics=["fd"], extractor="some/model"), tmp_path)
    assert not (tmp_path / "r" / "core").exists()


def test_the_ratio_has_the_training_data_and_a_stage_is_compared_as_an_evaluation(tmp_path: Path) -> None:
    reference = tmp_path / "reference.safetensors"
    run(recipe({"name": "two", "seeds": 2}, metrics=["fd-ratio"], reference=str(reference)), tmp_path)
    folder = tmp_path / "r" / "eval"
    (one,) = read_evaluations(folder / "evaluation.json")
    assert one.values["metrics"] == json.loads((folder / "metrics.json").read_text())["metrics"]
    (ratio,) = (row for row in one.values["metrics"] if row["metric"] == "fd-ratio")
    assert ratio["mean"] > 0 and ratio["heldout"]["efficientnet-lite0"] > 0 and reference.exists()
    config = json.loads((tmp_path / "r" / "core" / "checkpoint" / "config.json").read_text())
    assert one.values["candidate"]["sha256"] == config["sha256"] and one.values["candidate"]["lineage"]
    assert (
        one.values["versions"]["torch"] and one.values["machine"]["threads"] and one.values["measured"]["peak_memory"]
    )
    (two,) = read_evaluations(tmp_path / "r" / "two" / "evaluation.json")
    assert comparison_table(compare([one, two]), [one, two]).row_count > 3


def test_questions_of_a_file(tmp_path: Path) -> None:
    asked = tmp_path / "dsg.csv"
    asked.write_text(DSG)
    save_question_model(tmp_path / "vqa", "blip")
    given = {"questions": str(asked), "vqa": str(tmp_path / "vqa"), "prompts": 2}
    with pytest.raises(UserError, match=r"nothing\.csv"):
        run(recipe(**given | {"questions": "nothing.csv"}), tmp_path)
    assert not (tmp_path / "r" / "core").exists()
    run(recipe(**given), tmp_path)
    metrics = json.loads((tmp_path / "r" / "eval" / "metrics.json").read_text())
    assert {row["metric"] for row in metrics["metrics"]} == {"dsg"} and "error" not in metrics
    asked.write_text(DSG.replace("is there a cat?", "is there a lynx?"))
    with pytest.raises(UserError, match=r"judge\.questions changed since it was begun"):
        run(recipe(**given), tmp_path)


def test_without_metrics_no_extractor_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Shard] = []
    put = pixelgrow.evaluation.protocol.Shards.put
    monkeypatch.setattr(
        pixelgrow.evaluation.protocol.Shards,
        "put",
        lambda self, part, shard: kept.append(shard) or put(self, part, shard),
    )
    run(recipe({"name": "two", "seeds": 2}), tmp_path)
    assert not [name for shard in kept for name in shard.tensors if name.startswith("features")]
    metrics = json.loads((tmp_path / "r" / "eval" / "metrics.json").read_text())
    assert {row["metric"] for row in metrics["metrics"]} == {"scenes"}
    two = json.loads((tmp_path / "r" / "two" / "metrics.json").read_text())
    for name in ("seams", "details", "error"):  # of the first seed
        assert two[name] == metrics[name]
    assert two["seeds"] == [5, 6]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"metrics": ["fdd"]}, "metric 'fdd' is unknown: did you mean fd"),
        ({"metrics": ["dsg"]}, "metrics: dsg takes questions: a file of prompts with questions"),
        ({"metrics": ["kid"]}, "metric kid: got 10 images, expected at least 1,000"),
        ({"reference": "x"}, "reference is for metrics that compare with real images, such as fd"),
        ({"metrics": ["fd"], "reference": "x", "extractor": ["a", "b"]}, "reference is of one extractor, got 2"),
        ({"vqa": "blip"}, "vqa is for questions; add questions, or drop it"),
        ({"metrics": ["fd"], "questions": "x.csv"}, "fd is of held-out images, and questions has prompts of its own"),
        ({"metrics": ["fd"], "prompts": 9}, "prompts: got 9, expected at least 10 for fd"),
        ({"extractor": "clip"}, "extractor is for metrics of features, such as fd"),
        ({"seeds": 0}, "seeds: got 0"),
    ],
)
def test_mistakes_in_a_recipe(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        recipe(**settings)
    assert "\n" not in str(error.value)
