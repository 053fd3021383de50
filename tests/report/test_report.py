"""The report's charts: what the axes say, and what is drawn."""

from __future__ import annotations

import re

from pixelgrow.report.report import _series
from pixelgrow.report.svg import Curve, chart


def labels(svg: str, anchor: str) -> list[str]:
    return re.findall(rf'text-anchor="{anchor}">([^<]*)</text>', svg)


def test_axes_say_round_values_in_short() -> None:
    svg = chart("Loss", [Curve("loss", [(x, 0.1 + x / 8000) for x in range(0, 8001, 500)])])
    assert labels(svg, "middle") == ["0", "2k", "4k", "6k", "8k"]
    svg = chart("Loss", [Curve("loss", [(0, 1.0), (1500, 2.0)]), Curve("error", [(0, 0.5), (3e6, 3e-2)])])
    assert labels(svg, "middle") == ["0", "1M", "2M", "3M"]
    assert "0.1" in labels(svg, "end")


def test_every_curve_is_within_the_drawing_and_named_with_its_last_value() -> None:
    svg = chart("Error", [Curve("a", [(0, 1e-4), (10, 3.0)]), Curve("b & c", [(10, 0.25)])])
    points = [tuple(map(float, p.split(","))) for line in re.findall(r'points="([^"]*)"', svg) for p in line.split()]
    assert len(points) == 3 and all(0 <= x <= 460 and 0 <= y <= 220 for x, y in points)
    assert "a 3</span>" in svg and "b &amp; c 0.25</span>" in svg
    assert svg.count("<circle") == 1  # a curve of one point


def test_what_was_not_logged_is_not_drawn() -> None:
    assert chart("Error", [Curve("a", []), Curve("b", [(0, 0.0)])]) == ""


def test_long_logs_are_thinned_and_end_at_the_end() -> None:
    lines = [{"images": 100 * i, "loss": 1 / i, "none": None} for i in range(1, 20_001)]
    points = _series(lines, "loss")
    assert 400 <= len(points) <= 500
    assert points[-1] == (2_000_000, 1 / 20_000)
    assert _series(lines[:500], "loss") == [(line["images"], line["loss"]) for line in lines[:500]]
    assert _series(lines, "none") == _series(lines, "other") == []
