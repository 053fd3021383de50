"""From what a user asks for to a plan: metrics by default, prompts, real images, extractors, judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pixelgrow.diffusion.sampling_spec import SamplingSpec
from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.counting import Counter, VqaCounter
from pixelgrow.evaluation.alignment.detector import load_detector
from pixelgrow.evaluation.alignment.questions import Item, load_questions
from pixelgrow.evaluation.alignment.vqa import load_vqa
from pixelgrow.evaluation.features import load_extractor
from pixelgrow.evaluation.images import BATCH, Candidate, OfFolder, OfModel, device
from pixelgrow.evaluation.judges import OF_QUESTIONS, OF_SCENES, Judge, QuestionJudge, SceneJudge
from pixelgrow.evaluation.measures import EXTRACTOR, check_names, of_features, takes
from pixelgrow.evaluation.protocol import Plan
from pixelgrow.evaluation.real import Real, open_real, open_train
from pixelgrow.external.vision import describe_clip
from pixelgrow.text.encoders import check_classes

IMAGES = 1000  # of each seed, if nobody says how many
DISTANCES = ("fd", "precision", "recall")
SWEPT = ("guidance", "steps", "sampler", "threshold")  # sampling settings that a sweep may vary
OF_FORMS = {"dsg": "dsg", "geneval2": "soft-tifa", "gecko": "counting"}  # a file's form: its metric


@dataclass(frozen=True)
class Asked:
    """What to measure, and on what. None for the default.

    data, kind: real images, whose captions are the prompts: scenes, a folder, tar shards. n: images of each seed; of a
    folder of images, all of them. questions, form: a file of prompts with questions, in the place of data; vqa,
    detector: the models that answer them. train: training images, for fd-ratio.
    """

    data: str | None = None
    kind: str = "auto"
    metrics: Sequence[str] | None = None
    extractors: Sequence[str] = (EXTRACTOR,)
    n: int | None = None
    seeds: int = 1
    reference: Path | None = None
    train: str | None = None
    questions: Path | None = None
    form: str = "dsg"
    vqa: str | None = None
    detector: str | None = None
    batch: int = BATCH


def make_plan(candidate: Candidate, asked: Asked) -> Plan:
    """The plan of an evaluation. Raises UserError for what does not fit together, before anything is sampled."""
    check_names(asked.metrics or ())  # before anything is opened
    if (asked.data is None) == (asked.questions is None):
        raise UserError(
            "expected --data, whose captions are the prompts, or --questions, which has its own: one of the two"
        )
    if isinstance(candidate, OfFolder) and asked.seeds > 1:
        raise UserError(f"--seeds {asked.seeds}: {candidate.name} has images already, of one seed; drop it")
    items: list[Item] = []
    if asked.data is None:
        items = _items(candidate, asked)
        prompts: Sequence[str] = [item.prompt for item in items]
        real, default = None, [OF_FORMS[asked.form]]
    else:
        prompts, real = _of_data(candidate, asked)
        default = _defaults(asked.data, prompts, real)
    metrics = check_names(default if asked.metrics is None else asked.metrics)
    if not metrics:
        raise UserError("--metrics: got no name, expected at least one")
    features = of_features(metrics)
    if features and not asked.extractors:
        raise UserError("--extractor: got no name, expected at least one")
    if takes(metrics, "texts"):
        for name in asked.extractors:
            describe_clip(name)
    return Plan(
        metrics,
        range(asked.seeds),
        prompts,
        [load_extractor(name, device()) for name in dict.fromkeys(asked.extractors)] if features else [],
        judge_of(metrics, prompts, items, asked),
        real if takes(metrics, "real") else None,
        _train(candidate, asked, len(prompts)) if takes(metrics, "train") else None,
        asked.reference,
        asked.batch,
    )


def _defaults(data: str, prompts: Sequence[str], real: Real) -> list[str]:
    if data == "scenes":
        alignment = ["scenes"] if all(prompts) else []
    else:
        alignment = ["retrieval"] if real.captioned and set(prompts) <= set(real.prompts) else []
    return [*DISTANCES, *alignment]


def _of_data(candidate: Candidate, asked: Asked) -> tuple[Sequence[str], Real]:
    """Prompts, and real images of the candidate's size."""
    own, data = candidate.prompts, str(asked.data)
    n = asked.n or (IMAGES if own is None else len(own))
    if own is not None and n > len(own):
        raise UserError(f"-n {n}: {candidate.name} has {len(own)} images; name no more")
    real = open_real(data, candidate.size, n, kind=asked.kind, captions=candidate.conditions != "nothing")
    if own is not None:
        return own[:n], real
    if len(real) < n:
        h, w = candidate.size
        raise UserError(f"-n {n}: {data} has {len(real)} images of {h}x{w} or larger, each a prompt; name no more")
    if candidate.conditions == "nothing":
        return [""] * n, real
    if isinstance(candidate, OfModel):
        check_classes(candidate.model.config.text, real.classes, f"--data {data}")
    elif bool(real.classes) != (candidate.conditions == "classes"):
        has, wants = ("classes", "captions") if real.classes else ("captions", "classes")
        raise UserError(
            f"--data {data} has {has}, and {candidate.name} makes images of {wants}: name images with {wants}"
        )
    return real.prompts, real


def _items(candidate: Candidate, asked: Asked) -> list[Item]:
    """The prompts with questions of a file; of images that are there, those of their prompts, in their order."""
    assert asked.questions is not None
    items = load_questions(asked.questions, asked.form)
    if candidate.conditions == "classes":
        raise UserError(
            f"--questions {asked.questions}: {candidate.name} makes images of classes; name one of captions"
        )
    if candidate.prompts is not None:
        known = {item.prompt: item for item in items}
        if (strange := next((p for p in candidate.prompts if p not in known), None)) is not None:
            raise UserError(
                f"{candidate.name}: the prompt {strange!r} is not in {asked.questions}; expected images of its "
                "prompts, named in a metadata.jsonl (file_name, text)"
            )
        items = [known[p] for p in candidate.prompts]
    if asked.n is not None and asked.n > len(items):
        raise UserError(f"-n {asked.n}: {asked.questions} has {len(items)} prompts with questions; name no more")
    return items[: asked.n]


def judge_of(metrics: Sequence[str], prompts: Sequence[str], items: Sequence[Item], asked: Asked) -> Judge | None:
    """What answers the alignment metrics; None if there are none."""
    if not (wanted := takes(metrics, "judge")):
        return None
    able = OF_QUESTIONS if items else OF_SCENES
    if unable := [name for name in wanted if name not in able]:
        need = "--data scenes" if items else "--questions FILE, prompts with questions, in the place of --data"
        raise UserError(f"metric {unable[0]}: expected {need}; or drop it from --metrics")
    if not items:
        judge = SceneJudge(wanted, prompts)
        assert judge.questions is not None  # refuses what it cannot read, before anything is sampled
        return judge
    asks = [name for name in wanted if name != "counting" or asked.detector is None]
    if asks and asked.vqa is None:
        other = " or --detector MODEL" if asks == ["counting"] else ""
        raise UserError(f"metric {asks[0]}: expected --vqa MODEL{other}, which answers the questions")
    vqa = load_vqa(str(asked.vqa), device()) if asks else None
    counter: Counter | None = None
    if "counting" in wanted:
        counter = load_detector(asked.detector, device()) if asked.detector else VqaCounter(vqa) if vqa else None
    made = QuestionJudge(wanted, items, vqa, counter)
    made.check()
    return made


def _train(candidate: Candidate, asked: Asked, n: int) -> Real | None:
    if asked.train is None and asked.data != "scenes":
        return None
    return open_train(asked.train or "scenes", candidate.size, n, kind=asked.kind)


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """`guidance=1,2,4` as a sampling setting and its values. Raises UserError."""
    setting, _, values = text.partition("=")
    if setting not in SWEPT or not values:
        raise UserError(f"--sweep {text}: expected SETTING=VALUE,VALUE with one of {', '.join(SWEPT)}")
    return setting, [getattr(sampling({setting: value}), setting) for value in values.split(",")]


def sampling(given: dict[str, Any]) -> SamplingSpec:
    """Sampling settings, validated. Raises UserError."""
    try:
        return SamplingSpec.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{name}: {reason[:1].lower()}{reason[1:]}; got {first['input']!r}") from None
