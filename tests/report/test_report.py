"""The report: labels and curves of charts, tables and grids of stages."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import torch

from pixelgrow.recipe.stages import EvaluateStage
from pixelgrow.report.report import _growth, _series, _side_by_side, _training
from pixelgrow.report.svg import Curve, chart
from pixelgrow.training.monitor import Row, save_grid, save_rows


def labels(svg: str, anchor: str) -> list[str]:
    return re.findall(rf'text-anchor="{anchor}">([^<]*)</text>', svg)


def test_axes_have_round_values_and_short_labels() -> None:
    svg = chart("Loss", [Curve("loss", [(x, 0.1 + x / 8000) for x in range(0, 8001, 500)])])
    assert labels(svg, "middle") == ["0", "2k", "4k", "6k", "8k"]
    svg = chart("Loss", [Curve("loss", [(0, 1.0), (1500, 2.0)]), Curve("error", [(0, 0.5), (3e6, 3e-2)])])
    assert labels(svg, "middle") == ["0", "1M", "2M", "3M"]
    assert "0.1" in labels(svg, "end")


def test_every_curve_is_within_the_chart_and_named_with_its_last_value() -> None:
    svg = chart("Error", [Curve("a", [(0, 1e-4), (10, 3.0)]), Curve("b & c", [(10, 0.25)])])
    points = [tuple(map(float, p.split(","))) for line in re.findall(r'points="([^"]*)"', svg) for p in line.split()]
    assert len(points) == 3 and all(0 <= x <= 460 and 0 <= y <= 220 for x, y in points)
    assert "a 3</span>" in svg and "b &amp; c 0.25</span>" in svg
    assert svg.count("<circle") == 1  # a curve of one point


def test_curves_that_were_not_logged_are_left_out() -> None:
    assert chart("Error", [Curve("a", []), Curve("b", [(0, 0.0)])]) == ""


def test_numbers_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    points = [(1, 0.5), (2, math.inf), (3, math.nan), (4, 0.25)]
    assert chart("Error", [Curve("a", points)]) == chart("Error", [Curve("a", [points[0], points[-1]])])
    (tmp_path / "log.jsonl").write_text(
        json.dumps({"images": 8, "validation/mean": None, "validation/0.5": None, "validation/2": 0.125}) + "\n",
        encoding="utf-8",
    )
    counts = {name: [] for name in ("loaded", "new", "dropped", "frozen")}
    sizes = {"parameters": {"loaded": 1, "new": 1}, "resolution": [8, 16], "init": "random"}
    errors = {when: {"0.5": math.nan, "2.0": 0.25} for when in ("before", "after")}
    (tmp_path / "growth.json").write_text(json.dumps(counts | sizes | errors), encoding="utf-8")
    page = _growth(tmp_path)
    assert "<td>0.12500</td></tr>" in page and "<td>nan</td><td></td></tr>" in page


def test_grids_are_those_of_the_run_in_the_order_of_images(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("", encoding="utf-8")
    (tmp_path / "samples").mkdir()
    for name in ("999000000", "1000000000", "000000064", "mine"):  # nine digits, until they do not suffice
        save_grid(torch.zeros(1, 3, 2, 2), tmp_path / "samples" / f"{name}.png")
    page = _training(tmp_path, "")
    assert "999,000,000 images, halfway" in page and "1,000,000,000 images, at the end" in page


def test_grids_of_other_prompts_are_not_shown_beside_the_last(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("", encoding="utf-8")
    for images, prompt in ((1, "a <cat>"), (2, "a <cat>"), (3, "a dog"), (4, "a dog")):
        save_rows([Row(torch.zeros(1, 3, 2, 2), "preview", [prompt])], tmp_path / "samples" / f"{images:09d}.png")
    page = _training(tmp_path, "")
    assert "3 images, halfway" in page and "4 images, at the end" in page
    assert "row 1: preview\n  a dog" in page and "cat" not in page
    (tmp_path / "samples" / "000000003.png").unlink()
    (tmp_path / "samples" / "000000004.png").unlink()
    assert "a &lt;cat&gt;" in _training(tmp_path, "")


def test_evaluations_side_by_side_may_have_been_asked_other_questions(tmp_path: Path) -> None:
    """Few prompts may hold no relation, and prompts of files have no questions at all."""
    records = {
        name: SimpleNamespace(values={"result": {"nfe": 31, "seconds_per_image": 0.5} | more})
        for name, more in {
            "a": {"accuracy": {"colour": 1.0, "relation": 0.5}}, "b": {"accuracy": {"colour": 0.75}}, "c": {}
        }.items()
    }  # fmt: skip
    recipe = SimpleNamespace(stages=[EvaluateStage(name=name, parent="core") for name in records])
    page = _side_by_side(recipe, tmp_path, records)
    rows = [re.findall(r"<td>([^<]*)</td>", row)[2:] for row in page.split("<tr>")[2:]]
    assert rows == [["100.0%", "50.0%"], ["75.0%", ""], ["", ""]]


def test_long_logs_are_thinned_and_end_at_the_end() -> None:
    lines = [{"images": 100 * i, "loss": 1 / i, "none": None} for i in range(1, 20_001)]
    points = _series(lines, "loss")
    assert 400 <= len(points) <= 500
    assert points[-1] == (2_000_000, 1 / 20_000)
    assert _series(lines[:500], "loss") == [(line["images"], line["loss"]) for line in lines[:500]]
    assert _series(lines, "none") == _series(lines, "other") == []
