"""Reading a recipe: YAML and `a.b=c` overrides to a `Recipe`, and every mistake to a line that says where it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pixelgrow.errors import UserError
from pixelgrow.recipe.order import check_losses, check_place, resolution_of, unknown, with_parents
from pixelgrow.recipe.stages import (
    VERBS,
    Head,
    Recipe,
    Stage,
    is_folder,
)
from pixelgrow.writing import reading

FOLDER = Path(__file__).parents[1] / "recipes"
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
            raise UserError(f"{where}: {_dotted(at)}: {unknown(str(verb), VERBS, 'stage')}")
        stages.append(_build(VERBS[verb], body, [*at, verb], where))
        check_place(stages, where)
        check_losses(stages[-1], head.text, where)
    stages = with_parents(stages)
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
        return f"{_dotted(loc[:-1])}: {unknown(str(loc[-1]), known, 'key')}".removeprefix(": ")
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


def _kind(value: Any) -> str:
    names = {type(None): "nothing", dict: "a mapping", list: "a list", str: f"the text {value!r}"}
    return names.get(type(value), repr(value))


def _dotted(loc: Where) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")


__all__ = ["Recipe", "builtin", "is_folder", "load_recipe", "read_recipe", "resolution_of"]
