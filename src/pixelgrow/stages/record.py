"""`stage.json`: what a stage was told, what it started from, whether it is done. A changed stage is refused by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from pixelgrow.errors import UserError
from pixelgrow.recipe.stages import Recipe
from pixelgrow.writing import writing

FILE = "stage.json"


class Record:
    """The `stage.json` of a stage's folder: `settings`, `parents` (hashes), `done`, and the numbers of its run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / FILE
        self.values: dict[str, Any] = {}
        if self.path.exists():
            try:
                self.values = dict(json.loads(self.path.read_text()))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{self.path} is damaged ({type(error).__name__}): delete the folder {folder} to do it again"
                ) from error

    @property
    def done(self) -> bool:
        return bool(self.values.get("done"))

    def check(
        self,
        settings: Mapping[str, Any],
        parents: Mapping[str, str] | None = None,
        free: Set[str] = frozenset(),
        explain: Callable[[str, Any], str] = lambda key, was: "",
    ) -> None:
        """Raise UserError, naming the first setting that changed, if the stage was begun with others.

        `parents` None: they are not known yet, and not compared. `free`: settings that may change; so may the paths of
        sources. `explain(key, was)`: what changed, in words, where its value says little; "" to show the values.
        """
        if not self.values:
            return
        for kind, now in (("settings", settings), ("parents", parents)):
            if now is None:
                continue
            was, new = _flat(self.values.get(kind, {})), _flat(now)
            for key in [*new, *(k for k in was if k not in new)]:
                if was.get(key) == new.get(key) or (kind == "settings" and (key in free or key.endswith("].source"))):
                    continue
                words = "" if kind == "parents" else explain(key, was.get(key))
                what = f"its parent {key}" if kind == "parents" else key
                change = "" if kind == "parents" else f" (was {_short(was.get(key))}, now {_short(new.get(key))})"
                raise UserError(
                    f"stage {self.folder.name!r}: {words or f'{what} changed since it was begun{change}'}: "
                    f"set it back, give the recipe another name, or delete {self.folder} and the stages made from it"
                )

    def begin(self, settings: Mapping[str, Any], parents: Mapping[str, str]) -> None:
        """Note what the stage is told, before any of its work."""
        self.write({**self.values, "settings": dict(settings), "parents": dict(parents), "done": False})

    def finish(self, **numbers: Any) -> None:
        """Note that the stage is done, and the numbers of its run."""
        self.write({**self.values, **numbers, "done": True})

    def write(self, values: Mapping[str, Any]) -> None:
        """Write the file whole or not at all."""
        self.values = dict(values)
        write_json(self.path, self.values)


def done_before(recipe: Recipe, folder: Path) -> list[str]:
    """The stages of a recipe that are done in its folder. Raises UserError if one was begun with other settings of its
    own, or another seed; whether its data are still the same shows when it runs."""
    records = {stage.name: Record(folder / stage.name) for stage in recipe.stages}
    for stage in recipe.stages:
        was = records[stage.name].values.get("settings", {})
        now = stage.model_dump(mode="json", by_alias=True, exclude={"data"}) | {"seed": recipe.seed}
        records[stage.name].check(was | now, free=stage.free)
    return [name for name, record in records.items() if record.done]


def write_json(path: Path, values: Any) -> None:
    """Write JSON whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(values, indent=2) + "\n")
        part.replace(path)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping of dotted keys; an empty one stands for itself."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= _flat(inner, f"{prefix}[{key}]" if isinstance(key, int) else f"{prefix}.{key}".lstrip("."))
    return flat


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
