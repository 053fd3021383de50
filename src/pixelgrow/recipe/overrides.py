"""Overrides of a recipe, `a.b=value`: finds the field and reads the value for its type."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import NoneType
from typing import Any, get_origin

import yaml
from pydantic import BaseModel

from pixelgrow.errors import UserError
from pixelgrow.recipe.plain_yaml import Loader, kind_of, scalar
from pixelgrow.recipe.stages import VERBS, Head

Model = type[BaseModel]


def override(raw: dict[str, Any], given: str) -> None:
    """Apply `a.b=value` to a recipe as it was read, in place. Raises UserError.

    A stage is given by its name or its number, or as messages write it: `stages[0].train.images=1000`.
    """
    name, equals, text = given.partition("=")
    keys = _keys(raw.get("stages"), name.strip())
    if not equals or not all(keys):
        raise UserError(f"--set {given!r}: expected a.b=value, such as stages.core.images=1000")
    here: Any = raw
    model: Model | None = Head
    for depth, key in enumerate(keys[:-1]):
        if isinstance(here, list):
            stages = keys[:depth] == ["stages"]
            here = here[_item(here, key, given, stages)]
            if stages and isinstance(here, dict) and len(here) == 1:
                ((verb, body),) = here.items()
                model = VERBS.get(verb)
                if keys[depth + 1] != verb:  # it may be left out
                    here = body
            continue
        if not isinstance(here, dict):
            raise _no_key(here, keys[: depth + 1], given)
        if not (model in VERBS.values() and key in VERBS and list(here) == [key]):  # a stage's verb is no field
            model = next((t for t in types_at(model, key) or () if issubclass(t, BaseModel)), None)
        here = here.setdefault(key, {})
    last = keys[-1]
    if isinstance(here, list):
        here[_item(here, last, given, keys[:-1] == ["stages"])] = _value(
            text, given, None if model is None else [model]
        )
    elif isinstance(here, dict):
        here[last] = _value(text, given, types_at(model, last))
    else:
        raise _no_key(here, keys, given)


def _keys(stages: Any, name: str) -> list[str]:
    """`a.b[0].c` as ["a", "b", "0", "c"]. The name of a stage, which may have dots, is one key."""
    names = map(_stage_name, stages) if isinstance(stages, list) else ()
    for stage in sorted(names, key=len, reverse=True):
        head, found, rest = name.partition(f"stages.{stage}.")
        if stage and found and not head:
            return ["stages", stage, *rest.split(".")]
    return re.sub(r"\[(\d+)\]", r".\1", name).split(".")


def _no_key(here: Any, keys: Sequence[str], given: str) -> UserError:
    return UserError(f"--set {given!r}: {'.'.join(keys[:-1])} is {kind_of(here)} and has no {keys[-1]!r}")


def _value(text: str, given: str, types: Sequence[type] | None) -> Any:
    """The value of a typed text for a field of some `types` (None: unknown).

    A field of text takes it as typed, with `#` and colons; quotes around all of it are optional. Other fields, those of
    several texts too, take mappings and lists in YAML, numbers and truth values if they allow any, else the text.
    """
    plain = text.strip()
    may_be_none = types is None or NoneType in types
    numbers = types is None or any(issubclass(t, int | float) for t in types)
    takes_text = types is not None and str in types and tuple not in types
    if _quoted(plain) or (plain[:1] in ("{", "[") and not takes_text):
        return _yaml(text, given)
    if plain in ("", "null", "~") and may_be_none:
        return None
    if not numbers:
        return text
    try:
        value = scalar(plain)
    except yaml.YAMLError as error:
        raise _unreadable(given) from error
    return text if isinstance(value, str) else value


def _quoted(text: str) -> bool:
    """Whether a text is one quoted scalar of YAML."""
    return bool(re.fullmatch(r'"(?:[^"\\]|\\.)*"|\'(?:[^\']|\'\')*\'', text))


def _yaml(text: str, given: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise _unreadable(given) from error


def _unreadable(given: str) -> UserError:
    return UserError(f"--set {given!r}: the value is not readable as YAML")


def _item(items: list[Any], key: str, given: str, stages: bool) -> int:
    """The index of an item in a list. `key`: its number, or the name of a stage."""
    if key.isdigit() and int(key) < len(items):
        return int(key)
    names = [_stage_name(entry) for entry in items] if stages else []
    if key in names:
        return names.index(key)
    known = f"one of {', '.join(n for n in names if n)}" if stages else f"a number below {len(items)}"
    raise UserError(f"--set {given!r}: got {key!r}, expected {known}")


def _stage_name(entry: Any) -> str:
    body = next(iter(entry.values()), None) if isinstance(entry, dict) else None
    return str(body.get("name", "")) if isinstance(body, dict) else ""


def types_at(model: Model | None, key: str) -> list[type] | None:
    """The types that the field `key` of a model allows; None if there is no such field."""
    fields = model.model_fields.items() if model is not None else ()
    field = next((f for name, f in fields if key in (name, f.alias)), None)
    return None if field is None else _types(field.annotation)


def _types(annotation: Any) -> list[type]:
    """The types in an annotation such as `tuple[DataSpec, ...] | None`, with `tuple` itself for one of several."""
    args = getattr(annotation, "__args__", None)
    if args is None:
        return [annotation] if isinstance(annotation, type) else []
    return [tuple] * (get_origin(annotation) is tuple) + [t for a in args for t in _types(a)]
