"""Reading a recipe: YAML and `a.b=c` overrides to a `Recipe`, and every mistake to a line that says where it is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pixelgrow.errors import UserError
from pixelgrow.model import check_one_step
from pixelgrow.recipe_spec import (
    VERBS,
    DistillStage,
    EstimateStage,
    EvaluateStage,
    GrowStage,
    Head,
    ModelStage,
    PairsStage,
    Recipe,
    Stage,
    TextSpec,
    TrainStage,
    is_folder,
    makes_generator,
    wrong_kind,
)
from pixelgrow.writing import reading

FOLDER = Path(__file__).parent / "recipes"
Where = Sequence[str | int]
M = TypeVar("M", bound=BaseModel)


def builtin() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def load_recipe(recipe: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe at a path, or of a name that the package carries, with overrides such as `stages.core.images=1000`.

    An override's value is YAML; a stage is named by its name or its number, or as messages name it:
    `stages[0].train.images=1000`. Raises UserError, one line, for whatever is wrong in it.
    """
    with reading(recipe):
        path = next((p for p in (Path(recipe), FOLDER / f"{recipe}.yaml") if p.is_file()), None)
    if path is None:
        raise UserError(f"recipe {str(recipe)!r} is neither a file nor one of {', '.join(builtin())}")
    where = str(recipe)
    raw = _mapping(path, where)
    for override in overrides:
        _override(raw, override)
    return read_recipe(raw, where)


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML without its traps: `1e-3` is a number; `no`, `on` and `2024-01-31` are words. A key twice is a mistake."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # `!!int x`, or digits by the thousand
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"no readable {kind}", node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a mapping or a list, expected a word (double braces?)", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.rpartition(":")[2] not in ("bool", "timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false|True|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _mapping(path: Path, where: str) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not readable as YAML: {error.problem}") from error
    except RecursionError as error:
        raise UserError(f"{where}: not readable as YAML: nested too deeply") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not readable as YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{where}: got {_kind(raw)}, expected a mapping with name, data and stages")
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    """Set what `a.b=c` says, in place."""
    name, equals, text = override.partition("=")
    keys = re.sub(r"\[(\d+)\]", r".\1", name.strip()).split(".")  # stages[0] as messages have it
    if not equals or not all(keys):
        raise UserError(f"--set {override!r}: expected a.b=value, such as stages.core.images=1000")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--set {override!r}: the value is not readable as YAML") from error
    here: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            stages = depth == 1 and keys[0] == "stages"
            item = _item(here, key, override, stages)
            if last:
                here[item] = value
                return
            here = here[item]
            if stages and isinstance(here, dict) and len(here) == 1 and keys[depth + 1] not in here:
                (here,) = here.values()  # the verb may be left out
            continue
        if not isinstance(here, dict):
            raise UserError(f"--set {override!r}: {'.'.join(keys[:depth])} is {_kind(here)} and has no {key!r}")
        if last:
            here[key] = value
        else:
            here = here.setdefault(key, {})


def _item(items: list[Any], key: str, override: str, stages: bool) -> int:
    """Which item of a list `key` means: a number, or the name of a stage."""
    if key.isdigit() and int(key) < len(items):
        return int(key)
    names = [_stage_name(entry) for entry in items] if stages else []
    if key in names:
        return names.index(key)
    known = f"one of {', '.join(n for n in names if n)}" if stages else f"a number below {len(items)}"
    raise UserError(f"--set {override!r}: got {key!r}, expected {known}")


def _verbs() -> str:
    return ", ".join(f"{verb}:" for verb in VERBS)


def _stage_name(entry: Any) -> str:
    body = next(iter(entry.values()), None) if isinstance(entry, dict) else None
    return str(body.get("name", "")) if isinstance(body, dict) else ""


# --- validation -------------------------------------------------------------------------------------------------------


def read_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """The recipe that a mapping says; `where` it comes from, for messages. Raises UserError."""
    entries = raw.get("stages")
    head = _build(Head, {k: v for k, v in raw.items() if k != "stages"}, [], where, also=["stages"])
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{where}: stages: got {_kind(entries)}, expected a list such as [train: {{...}}, grow: {{...}}]"
        )
    stages: list[Stage] = []
    for i, entry in enumerate(entries):
        at: Where = ("stages", i)
        if not isinstance(entry, dict) or len(entry) != 1:
            raise UserError(f"{where}: {_dotted(at)}: got {_kind(entry)}, expected one of {_verbs()}")
        ((verb, body),) = entry.items()
        if verb not in VERBS:
            raise UserError(f"{where}: {_dotted(at)}: {_unknown(str(verb), VERBS, 'stage')}")
        stages.append(_build(VERBS[verb], body, [*at, verb], where))
        _check_place(stages, where)
        _check_losses(stages[-1], head.text, where)
    stages = _with_parents(stages)
    return Recipe(**{f: getattr(head, f) for f in head.model_fields_set}, stages=tuple(stages))


def _build(model: type[M], body: Any, at: Where, where: str, also: Sequence[str] = ()) -> M:
    if not isinstance(body, Mapping):
        raise UserError(f"{where}: {_dotted(at)}: got {_kind(body)}, expected its settings, such as {{name: ...}}")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first, *rest = error.errors(include_url=False)
        more = f" (and {len(rest)} more)" if rest else ""
        raise UserError(f"{where}: {_message(model, first, at, also)}{more}") from error


def _message(model: type[BaseModel], error: Any, at: Where, also: Sequence[str]) -> str:
    loc = [*at, *error["loc"]]
    if error["type"] == "extra_forbidden":
        owner = _model_at(model, error["loc"][:-1])
        known = [*_keys(owner), *(also if owner is model else ())]
        return f"{_dotted(loc[:-1])}: {_unknown(str(loc[-1]), known, 'key')}".removeprefix(": ")
    if error["type"] == "missing":
        return f"{_dotted(loc)} is missing"
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        return f"{_dotted(loc)}: {text}".removeprefix(": ")
    text = error["msg"][0].lower() + error["msg"][1:]
    got = error["input"]
    shown = repr(got) if isinstance(got, str | int | float | bool) else _kind(got)
    text = text.removeprefix("input ").replace("should", "expected to", 1)
    if error["type"] == "string_pattern_mismatch":
        text = "expected letters, digits, dots, dashes and underscores"
    return f"{_dotted(loc)}: got {shown}, {text}"


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_at(model: type[BaseModel], loc: Iterable[str | int]) -> type[BaseModel]:
    """The model whose keys stand at `loc` below `model`."""
    for part in loc:
        if isinstance(part, int):
            continue
        field = next((f for name, f in model.model_fields.items() if part in (name, f.alias)), None)
        inner = [] if field is None else [a for a in _types(field.annotation) if issubclass(a, BaseModel)]
        if not inner:
            break
        model = inner[0]
    return model


def _types(annotation: Any) -> list[type]:
    """The classes that an annotation such as `tuple[DataSpec, ...] | None` is made of."""
    args = getattr(annotation, "__args__", None)
    if args is None:
        return [annotation] if isinstance(annotation, type) else []
    return [t for a in args for t in _types(a)]


def _unknown(got: str, known: Iterable[str], what: str) -> str:
    """`unknown key 'imagess'; did you mean 'images'?`, or all that there are."""
    known = list(known)
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.5)
    return f"unknown {what} {got!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
    )


def _kind(value: Any) -> str:
    names = {type(None): "nothing", dict: "a mapping", list: "a list", str: f"the text {value!r}"}
    return names.get(type(value), repr(value))


def _dotted(loc: Where) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")


# --- how stages hang together -----------------------------------------------------------------------------------------


def _models(stages: Iterable[Stage]) -> list[str]:
    return [s.name for s in stages if isinstance(s, ModelStage)]


def _check_place(stages: Sequence[Stage], where: str) -> None:
    """Names are unique, parents stand earlier, resolutions grow."""
    *before, stage = stages
    earlier = _with_parents(before)
    if stage.name in [s.name for s in earlier]:
        raise UserError(f"{where}: two stages are called {stage.name!r}; give each a name of its own")
    at = f"stage {stage.name!r}"
    models = _models(earlier)
    parent = _parent_of(stage, earlier)
    if parent is None:
        if not isinstance(stage, TrainStage):
            raise UserError(
                f"{where}: {at} has no model to start from: put a train stage before it, or name a checkpoint"
            )
    elif parent not in models and not is_folder(parent):
        known = _unknown(parent, models, "stage") if models else f"no stage before it makes a model, got {parent!r}"
        raise UserError(f"{where}: {at}: from: {known} (a checkpoint folder is written with a slash)")
    _check_kind(earlier, stage, parent, f"{where}: {at}")
    if isinstance(stage, GrowStage | DistillStage | EstimateStage) and stage.pairs is not None:
        made = {s.name: s for s in earlier if isinstance(s, PairsStage)}
        if stage.pairs not in made:
            raise UserError(f"{where}: {at}: pairs: {_unknown(stage.pairs, made, 'stage of pairs')}")
        if isinstance(stage, GrowStage) and made[stage.pairs].direction == "draw":
            raise UserError(
                f"{where}: {at}: pairs: {stage.pairs} has direction: draw, so its pictures are no larger than the "
                "teacher draws: name pairs with direction: invert"
            )
        _check_teacher(earlier, stage, parent, made[stage.pairs], f"{where}: {at}")
        _check_guidance(earlier, stage, made[stage.pairs], f"{where}: {at}")
    if isinstance(stage, GrowStage):
        assert parent is not None
        if stage.patch is not None and stage.init != "preserve" and _is_uvit(earlier, parent):
            raise UserError(
                f"{where}: {at}: patch: got {stage.patch}, but init: {stage.init} keeps the levels and the patch of "
                "an earlier growth; drop it"
            )
        low = resolution_of(earlier, parent)
        for to in stage.to:
            if low and (to <= low or to % low or (to // low) & (to // low - 1)):
                raise UserError(
                    f"{where}: {at}: to: got {to}, expected {low} doubled once or more: {2 * low}, {4 * low}, ..."
                )
            low = to


def _check_kind(earlier: Sequence[Stage], stage: Stage, parent: str | None, where: str) -> None:
    """One-step generators are grown with pairs, and are no teachers; a folder's kind is seen before a run."""
    made = next((s for s in earlier if s.name == parent), None)
    if made is None:
        return
    if wrong := wrong_kind(stage, made.name, makes_generator(made)):
        raise UserError(f"{where}: {wrong}")
    if isinstance(stage, EvaluateStage) and isinstance(made, DistillStage | GrowStage) and makes_generator(made):
        pairs = {s.name: s.law for s in earlier if isinstance(s, PairsStage)}
        try:
            check_one_step(stage.given, guided=pairs[str(made.pairs)] is not None)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _check_teacher(
    earlier: Sequence[Stage],
    stage: GrowStage | DistillStage | EstimateStage,
    parent: str | None,
    pairs: PairsStage,
    where: str,
) -> None:
    """Pairs are the teacher's own; of a checkpoint folder the weights' hash tells, when the stage runs."""
    by_name: dict[str | None, Stage] = {s.name: s for s in earlier}
    of: Stage | None = stage
    while isinstance(of, GrowStage):
        of, parent = by_name.get(parent), by_name[parent].parent if parent in by_name else None
    if parent in by_name and pairs.parent in by_name and parent != pairs.parent:
        raise UserError(f"{where}: pairs: {pairs.name} is of {pairs.parent}, and the teacher is {parent}: name its own")


def _check_losses(stage: Stage, text: TextSpec, where: str) -> None:
    """CLIP reads captions, and a recipe of classes has none."""
    if isinstance(stage, GrowStage | DistillStage) and stage.losses and stage.losses.similarity and text.classes:
        raise UserError(
            f"{where}: stage {stage.name!r}: losses.similarity compares pictures with captions, and a recipe of "
            f"{{classes: {text.classes}}} has none; drop it"
        )


def _check_guidance(
    earlier: Sequence[Stage], stage: GrowStage | DistillStage | EstimateStage, pairs: PairsStage, where: str
) -> None:
    """Weights are estimated from pictures drawn with those of a law; of pairs of a law an estimator is needed where
    there is a discriminator, and nowhere else."""
    if isinstance(stage, EstimateStage):
        if pairs.law is None or pairs.direction != "draw":
            raise UserError(
                f"{where}: pairs: {pairs.name} has direction: {pairs.direction} and guidance: {pairs.guidance}, "
                "expected pictures drawn with weights of a law: direction: draw and guidance: captions or recaptions"
            )
        return
    made = [s.name for s in earlier if isinstance(s, EstimateStage)]
    adversarial = stage.losses is None or stage.losses.adversarial
    if pairs.law is not None and adversarial and stage.estimator is None:
        raise UserError(
            f"{where}: pairs: {pairs.name} has guidance: {pairs.law}, so the discriminator asks for a weight of real "
            "pictures too: write estimator: and the name of an estimate stage"
        )
    if stage.estimator is not None:
        if pairs.law is None or not adversarial:
            why = f"the pairs have guidance: {pairs.guidance}, no law" if adversarial else "there is no discriminator"
            raise UserError(f"{where}: estimator: got {stage.estimator!r}, but {why}; drop it")
        if stage.estimator not in made:
            raise UserError(f"{where}: estimator: {_unknown(stage.estimator, made, 'estimate stage')}")


def _is_uvit(stages: Sequence[Stage], name: str) -> bool:
    """Whether the model that a stage makes has levels around its core from a growth with `random` or `scratch`."""
    by_name = {s.name: s for s in stages}
    while (stage := by_name.get(name)) is not None:
        if isinstance(stage, GrowStage) and stage.init != "preserve":
            return True
        name = stage.parent or ""
    return False


def resolution_of(stages: Iterable[Stage], name: str) -> int | None:
    """Image side of the model that a stage makes; None where only a checkpoint on disk knows."""
    by_name = {s.name: s for s in stages}
    stage = by_name.get(name)
    if isinstance(stage, GrowStage):
        return stage.to[-1]
    if isinstance(stage, TrainStage) and stage.resolution:
        return stage.resolution
    return resolution_of(by_name.values(), stage.parent or "") if isinstance(stage, ModelStage) else None


def _with_parents(stages: Sequence[Stage]) -> list[Stage]:
    """Every stage with its parent named. Where the recipe names none: the teacher of the pairs that a generator is
    distilled from, or a weight estimated from; else the last model before it."""
    done: list[Stage] = []
    for stage in stages:
        if stage.parent is None and not isinstance(stage, TrainStage):
            stage = stage.model_copy(update={"parent": _parent_of(stage, done)})
        done.append(stage)
    return done


def _parent_of(stage: Stage, earlier: Sequence[Stage]) -> str | None:
    """What a stage starts from, after stages whose parents are named: None if nothing, or a mistake."""
    if stage.parent is not None or isinstance(stage, TrainStage):
        return stage.parent
    teachers = {s.name: s.parent for s in earlier if isinstance(s, PairsStage)}
    if isinstance(stage, DistillStage | EstimateStage) and stage.pairs in teachers:
        return teachers[stage.pairs]
    return next(reversed(_models(earlier)), None)


__all__ = ["Recipe", "builtin", "is_folder", "load_recipe", "read_recipe", "resolution_of"]
