"""`stage.json`: a stage's settings, the hashes of its parents, and whether it is done. It shows what has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from pixelgrow.errors import UserError
from pixelgrow.model import RECORD
from pixelgrow.recipe.stages import Recipe, is_folder
from pixelgrow.training.loop import CHECKPOINT
from pixelgrow.writing import read_json, write_json

FOLDER = "/"  # stands for a parent that is a folder
NAMES = {  # settings that name a model, and those with its fingerprint
    "text.encoder": "text.fingerprint",
    "latent.autoencoder": "latent.fingerprint",
    "losses.distance": "networks.distance",
    "losses.discriminator": "networks.discriminator",
    "losses.similarity.model": "networks.similarity",
}


class Record:
    """The `stage.json` of a stage's folder: `settings`, `parents` (hashes), `done`, and the numbers of its run.

    A hidden copy beside it is read if it is damaged. Raises UserError if both are.
    first: whether this is the process of the run that reads and writes it; in others it is empty.
    """

    def __init__(self, folder: Path, first: bool = True) -> None:
        self.folder, self.path, self.first = folder, folder / RECORD, first
        self.copy = folder / f".{RECORD}.copy"
        self.values: dict[str, Any] = {}
        if first and self.path.exists():
            found = read_json(self.path)
            if found is None:
                found = read_json(self.copy)
            if found is None:
                raise UserError(f"{self.path} is damaged, and so is its copy: {self._remedy()}")
            self.values = found

    def _remedy(self) -> str:
        made = self.folder / CHECKPOINT
        if made.exists():
            return (
                f"{made} can still be used: move it elsewhere and name it as the from: of another stage; then delete "
                f"{self.folder} to make the stage again"
            )
        return (
            f"if the recipe is as it was when the stage began, delete {self.path} alone, and the same command goes on "
            f"from what is saved; else delete {self.folder}"
        )

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
        """Raise UserError if a setting or parent has changed since the stage began, naming the first.

        `parents`: None if they do not exist yet; they are not compared then. `free`: settings that may change. Paths of
        what is compared by its content may change, too. `explain(key, was)`: the change in words; "" to show values.
        """
        if not self.values:
            return
        for kind, now in (("settings", settings), ("parents", parents)):
            if now is None:
                continue
            was, new = _flat(self.values.get(kind, {})), _flat(now)
            if kind == "parents":
                was, new = _by_name(was), _by_name(new)
            for key in [*new, *(k for k in was if k not in new)]:
                if was.get(key) == new.get(key) or (kind == "settings" and _may_change(key, was, new, free)):
                    continue
                words = "" if kind == "parents" else explain(key, was.get(key))
                name = settings.get("from") if key == FOLDER else key
                what = f"its parent {name}" if kind == "parents" else key
                change = "" if kind == "parents" else f" (was {_short(was.get(key))}, now {_short(new.get(key))})"
                back = "put it" if words else "set it"
                raise UserError(
                    f"stage {self.folder.name!r}: {words or f'{what} changed since it was begun{change}'}: "
                    f"{back} back, give the recipe another name, or delete {self.folder} and the stages made from it"
                )

    def begin(self, settings: Mapping[str, Any], parents: Mapping[str, str]) -> None:
        """Write down what the stage is about to do, before any of its work."""
        self.write({**self.values, "settings": dict(settings), "parents": dict(parents), "done": False})

    def note(self, name: str, value: Any) -> None:
        """Write down one value about the run in progress."""
        self.write({**self.values, name: value})

    def finish(self, **numbers: Any) -> None:
        """Write down that the stage is done, and the numbers of its run."""
        self.write({**self.values, **numbers, "done": True})

    def write(self, values: Mapping[str, Any]) -> None:
        """Write the file and its copy, one after the other, so that one of them is always whole."""
        self.values = dict(values)
        for path in (self.path, self.copy) if self.first else ():
            write_json(path, self.values)


def _by_name(parents: Mapping[str, Any]) -> dict[str, Any]:
    """The hashes of parents by the names of their stages. All checkpoint folders have one name."""
    return {FOLDER if is_folder(name) else name: digest for name, digest in parents.items()}


def _may_change(key: str, was: Mapping[str, Any], new: Mapping[str, Any], free: Set[str]) -> bool:
    """Whether a setting may change: it is free, or the path of something that is compared by its content."""
    if key == "from":
        return is_folder(str(was.get(key))) and is_folder(str(new.get(key)))  # parents are compared by their hashes
    if key.startswith("networks.") or NAMES.get(key) in new:
        prints = [str(of.get(NAMES.get(key, key))).rpartition(" ")[2] for of in (was, new)]  # after a name, if any
        return prints[0] == prints[1] and "teacher" not in (was.get(key), new.get(key))
    return key in free or key.endswith("].source")


def done_before(recipe: Recipe, folder: Path) -> list[str]:
    """Names of the stages of a recipe that are done in its folder.

    Raises UserError if a stage was begun with other settings or another seed. Data are not opened, so a change of data
    is found only when the recipe runs.
    """
    records = {stage.name: Record(folder / stage.name) for stage in recipe.stages}
    for stage in recipe.stages:
        was = records[stage.name].values.get("settings", {})
        now = stage.model_dump(mode="json", by_alias=True, exclude={"data"}) | {"seed": recipe.seed}
        records[stage.name].check(was | now, free=stage.free)
    return [name for name, record in records.items() if record.done]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping with dotted keys; an empty mapping or list is a value."""
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
