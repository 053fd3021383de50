"""The report of a run."""

from __future__ import annotations

from pathlib import Path

from pixelgrow.recipe_spec import Recipe


def write_report(recipe: Recipe, folder: Path) -> Path:
    return folder / "report.html"
