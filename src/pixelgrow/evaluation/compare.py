"""Evaluations side by side: read from their files, refused where they are not comparable, as rows of a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixelgrow.errors import UserError
from pixelgrow.evaluation.differences import Difference, differences, short
from pixelgrow.writing import reading

FORMAT = 1
# What must be the same in two evaluations: how many images, which real ones, which prompts; which training images.
SAME = ("images", "real", "prompts", "train")
_KEYS = ("images", "real", "prompts", "extractors", "candidate", "seeds", "metrics", "cost", "measured")


@dataclass(frozen=True)
class Evaluation:
    """The JSON of one evaluation; the title of its file, and which value of a sweep it is of ("guidance 2")."""

    title: str
    values: Mapping[str, Any]
    label: str = ""

    @property
    def name(self) -> str:
        """Its name in a table."""
        return f"{self.title} {self.label}".rstrip()

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """What was measured, by the name under which it is printed."""
        return {row["name"]: row for row in self.values["metrics"]}


def read_evaluations(path: Path, title: str | None = None) -> list[Evaluation]:
    """The evaluations in a file of `pixelgrow evaluate`: one, or those of a sweep. title: the file's name, if None.

    Raises UserError.
    """
    with reading(path):
        text = path.read_bytes()
    try:
        found = json.loads(text.decode("utf-8"))
        many = found.get("evaluations", [found])
        swept = found.get("sweep", {}).get("setting")
        for one in many:
            if one["format"] != FORMAT:
                raise UserError(f"{path}: got format {one['format']}, expected {FORMAT}: evaluate again")
            if lacking := [key for key in _KEYS if key not in one]:
                raise KeyError(lacking[0])
        labels = ["" if swept is None else f"{swept} {short(e['candidate']['sampling'][swept])}" for e in many]
        return [Evaluation(title or path.stem, e, label) for e, label in zip(many, labels, strict=True)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: no evaluation in it; expected the JSON that pixelgrow evaluate writes") from None


@dataclass(frozen=True)
class Line:
    """A row of a comparison: a metric, which way is better, and of each evaluation its row, or None."""

    name: str
    better: str
    cells: Sequence[Mapping[str, Any] | None]

    @property
    def best(self) -> int | None:
        """The evaluation whose interval lies beyond all others' on the better side; None if none does."""
        cells = [(i, c) for i, c in enumerate(self.cells) if c is not None and c.get("low") is not None]
        if len(cells) < 2 or len(cells) < sum(c is not None for c in self.cells):
            return None
        sign = 1 if self.better == "higher" else -1
        i, first = max(cells, key=lambda ic: sign * ic[1]["mean"])
        worst = first["low"] if sign > 0 else first["high"]
        others = [c["high"] if sign > 0 else c["low"] for j, c in cells if j != i]
        return i if all(sign * worst > sign * other for other in others) else None


@dataclass(frozen=True)
class Comparison:
    """names: of the evaluations. settings: what differs between candidates, a value of each. lines: the metrics."""

    names: Sequence[str]
    settings: Sequence[tuple[str, Sequence[str]]]
    lines: Sequence[Line]


def compare(evaluations: Sequence[Evaluation]) -> Comparison:
    """Evaluations of the same kind side by side. Raises UserError, naming what differs, if they are not comparable."""
    first, *others = evaluations
    for other in others:
        if found := incomparable(first.values, other.values):
            raise UserError(
                f"{first.name} and {other.name} are not comparable: {found.line(first.name, other.name)}; evaluate "
                "both on the same data, with the same -n and extractors"
            )
    names = list(dict.fromkeys(name for e in evaluations for name in e.rows))
    if others and not any(all(name in e.rows for e in evaluations) for name in names):
        raise UserError(
            f"{', '.join(e.name for e in evaluations)} have no metric in common: evaluate them with the same --metrics"
        )
    lines = []
    for name in names:
        cells = [e.rows.get(name) for e in evaluations]
        lines.append(Line(name, next(c["better"] for c in cells if c is not None), cells))
    return Comparison([e.name for e in evaluations], _settings(evaluations), lines)


def incomparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference | None:
    """The first thing that keeps two evaluations from being comparable; None if nothing does."""
    for key in SAME:
        ours, theirs = a.get(key), b.get(key)
        if ours is not None and theirs is not None and (found := differences(ours, theirs, key)):
            return found[0]
    for key, what in (("extractors", "extractor "), ("judge", "")):  # of those in both
        ours, theirs = a.get(key) or {}, b.get(key) or {}
        for name in ours:
            if name in theirs and (found := differences(ours[name], theirs[name], f"{what}{name}")):
                return found[0]
    return None


_HIDDEN = ("lineage", "text", "latent", "parameters")  # of a candidate: too long for a table, or in it elsewhere


def _settings(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[str]]]:
    """What differs between candidates, as far as a line tells it."""
    flat = [_flat({k: v for k, v in e.values["candidate"].items() if k not in _HIDDEN}) for e in evaluations]
    for found, e in zip(flat, evaluations, strict=True):
        found["seeds"] = len(e.values["seeds"])
    keys = list(dict.fromkeys(k for found in flat for k in found))
    rows = [(k, [short(found[k]) if k in found else "" for found in flat]) for k in keys]
    return [(k.removeprefix("sampling."), values) for k, values in rows if len(set(values)) > 1]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{k}": v for k, v in _flat(value).items()} if isinstance(value, Mapping) else {key: value}
    return flat
