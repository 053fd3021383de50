"""Reading a recipe: YAML and `a.b=c` overrides become a `Recipe`. A mistake is one line that says where it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pixelgrow.errors import UserError
from pixelgrow.recipe.order import check_buckets, check_losses, check_place, resolution_of, unknown, with_parents
from pixelgrow.recipe.overrides import override, types_at
from pixelgrow.recipe.plain_yaml import Loader, kind_of
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
    """Names of the package's recipes."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def load_recipe(recipe: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a path, or by the name of one of the package's, with overrides (`stages.core.images=1000`).

    Raises UserError, one line, for any mistake in it.
    """
    with reading(recipe):
        path = next((p for p in (Path(recipe), FOLDER / f"{recipe}.yaml") if p.is_file()), None)
    if path is None:
        raise UserError(f"recipe {str(recipe)!r} is neither a file nor one of {', '.join(builtin())}")
    where = str(recipe)
    raw = _mapping(path, where)
    for given in overrides:
        override(raw, given)
    return read_recipe(raw, where)


# --- YAML -------------------------------------------------------------------------------------------------------------


def _mapping(path: Path, where: str) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader)
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
        raise UserError(f"{where}: got {kind_of(raw)}, expected a mapping with name, data and stages")
    return raw


def _verbs() -> str:
    return ", ".join(f"{verb}:" for verb in VERBS)


# --- validation -------------------------------------------------------------------------------------------------------


def read_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """Read a recipe from a mapping. `where`: its name, for messages. Raises UserError."""
    entries = raw.get("stages")
    head = _build(Head, {k: v for k, v in raw.items() if k != "stages"}, [], where, also=["stages"])
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{where}: stages: got {kind_of(entries)}, expected a list such as [train: {{...}}, grow: {{...}}]"
        )
    stages: list[Stage] = []
    for i, entry in enumerate(entries):
        at: Where = ("stages", i)
        if not isinstance(entry, dict) or len(entry) != 1:
            raise UserError(f"{where}: {_dotted(at)}: got {kind_of(entry)}, expected one of {_verbs()}")
        ((verb, body),) = entry.items()
        if verb not in VERBS:
            raise UserError(f"{where}: {_dotted(at)}: {unknown(str(verb), VERBS, 'stage')}")
        stages.append(_build(VERBS[verb], body, [*at, verb], where))
        check_place(stages, where)
        check_losses(stages[-1], head.text, where)
        check_buckets(stages[-1], head, where)
    stages = with_parents(stages)
    return Recipe(**{f: getattr(head, f) for f in head.model_fields_set}, stages=tuple(stages))


def _build(model: type[M], body: Any, at: Where, where: str, also: Sequence[str] = ()) -> M:
    if not isinstance(body, Mapping):
        raise UserError(f"{where}: {_dotted(at)}: got {kind_of(body)}, expected its settings, such as {{name: ...}}")
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
    shown = repr(got) if isinstance(got, str | int | float | bool) else kind_of(got)
    text = text.removeprefix("input ").replace("should", "expected to", 1)
    if error["type"] == "string_pattern_mismatch":
        text = "expected letters, digits, dots, dashes and underscores, a letter or digit first and no dot last"
    return f"{_dotted(loc)}: got {shown}, {text}"


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_at(model: type[BaseModel], loc: Iterable[str | int]) -> type[BaseModel]:
    """The pydantic model of the mapping at `loc` in `model`."""
    for part in loc:
        if isinstance(part, int):
            continue
        inner = [a for a in types_at(model, part) or () if issubclass(a, BaseModel)]
        if not inner:
            break
        model = inner[0]
    return model


def _dotted(loc: Where) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")


__all__ = ["Recipe", "builtin", "is_folder", "load_recipe", "read_recipe", "resolution_of"]
