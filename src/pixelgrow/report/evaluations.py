"""Evaluations for people to read: a table of one, a table of several, and alignment against distance as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from pixelgrow.evaluation.compare import Comparison, Evaluation, Line
from pixelgrow.report.plot import Point, Series, scatter
from pixelgrow.report.tables import count, table_of
from pixelgrow.training.log import duration
from pixelgrow.writing import size_of

# Which of the metrics that all evaluations have stands on the axes of a plot: the first that is there.
DISTANCES = ("fd", "fd-ratio", "fd-infinity", "cmmd", "kid", "mmd")
ALIGNMENTS = ("scenes", "dsg", "soft-tifa", "counting", "retrieval", "clipscore")


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """The metrics of one evaluation, and what it cost."""
    values = evaluation.values
    table = table_of("metric", "", "95% interval", "over", "chance", "better")
    for row in values["metrics"]:
        ends = "" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}"
        chance = f"{row['chance']:.4g}" if "chance" in row else ""
        table.add_row(row["name"], f"{row['mean']:.4g}", ends, row["interval"] or "", chance, row["better"])
    return Group(Text(_what(values)), Text(), table, Text(), Text(_cost(values), style="dim"))


def _what(values: Mapping[str, Any]) -> str:
    sampling = values["candidate"].get("sampling", {})
    settings = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in sampling.items())
    seeds = len(values["seeds"])
    made = f"{values['images']:,} images" + (f" of each of {seeds} seeds" if seeds > 1 else "")
    real = f"; {values['real']['images']:,} real images of {values['data']}" if values["real"] else ""
    bad = f", {len(values['bad_files'])} more cannot be read" if values["bad_files"] else ""
    return f"{values['name']}: {made}{settings and f' ({settings})'}{real}{bad}"


def _cost(values: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in cost_of(values).items() if value)


def cost_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Network evaluations, parameters, time and memory of an evaluation, as text."""
    cost, measured = values["cost"], values["measured"]
    parameters = (cost["parameters"] or {}).get("network")
    return {
        "network evaluations an image": "" if cost["nfe"] is None else str(cost["nfe"]),
        "parameters": "" if not parameters else count(parameters),
        "seconds an image": f"{measured['seconds_per_image']:.3g}" if cost["nfe"] is not None else "",
        "peak memory": size_of(measured["peak_memory"]) if measured.get("peak_memory") else "",
        "time": duration(measured["seconds"]) if "seconds" in measured else "",
    }


def comparison_table(comparison: Comparison, evaluations: Sequence[Evaluation]) -> RenderableType:
    """Evaluations side by side; bold where one's interval lies beyond all others'."""
    table = table_of("", *comparison.names)
    for name, settings in comparison.settings:
        table.add_row(name, *settings, style="dim")
    for line in comparison.lines:
        table.add_row(f"{line.name}, {line.better} is better", *_cells(line))
    costs = [cost_of(e.values) for e in evaluations]
    for name in ("network evaluations an image", "parameters", "seconds an image", "peak memory"):
        if any(cost[name] for cost in costs):
            table.add_row(name, *(cost[name] for cost in costs), style="dim")
    return table


def _cells(line: Line) -> list[Text]:
    best = line.best
    return [Text(_cell(cell), style="bold" if i == best else "") for i, cell in enumerate(line.cells)]


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['mean']:.4g}" + ("" if row["low"] is None else f" [{row['low']:.4g}, {row['high']:.4g}]")


def trade_off(curves: Mapping[str, Sequence[Evaluation]]) -> str:
    """Alignment against distance as an SVG document; "" if the evaluations do not all have one of each.

    curves: by name, evaluations that are joined in their order.
    """
    everything = [e for some in curves.values() for e in some]
    x_name, y_name = (_shared(everything, names) for names in (DISTANCES, ALIGNMENTS))
    if not x_name or not y_name:
        return ""
    series = [
        Series(name, [Point(_ends(e, x_name), _ends(e, y_name), e.label) for e in some])
        for name, some in curves.items()
    ]
    return scatter("Alignment against distance", series, f"{x_name} (lower is better)", f"{y_name} (higher is better)")


def _shared(evaluations: Sequence[Evaluation], metrics: Sequence[str]) -> str:
    """The name of the first row of one of the metrics that all evaluations have."""
    first = evaluations[0].rows
    names = [name for metric in metrics for name, row in first.items() if row["metric"] == metric]
    return next((name for name in names if all(name in e.rows for e in evaluations)), "")


def _ends(evaluation: Evaluation, name: str) -> tuple[float, float, float]:
    row = evaluation.rows[name]
    mean, low, high = row["mean"], row["low"], row["high"]
    return mean, mean if low is None else low, mean if high is None else high
