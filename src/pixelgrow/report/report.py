"""The report of a run: one self-contained HTML file, made from the files in the stages' folders."""

from __future__ import annotations

import base64
import json
import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pixelgrow import __version__
from pixelgrow.data.account import Account
from pixelgrow.recipe.stages import (
    DistillStage,
    EstimateStage,
    EvaluateStage,
    GrowStage,
    PairsStage,
    Recipe,
    Stage,
    TrainStage,
)
from pixelgrow.report.page import PAGE
from pixelgrow.report.svg import Curve, chart
from pixelgrow.report.tables import count
from pixelgrow.stages.record import Record
from pixelgrow.text.cut import Cut
from pixelgrow.training.log import duration
from pixelgrow.writing import read_json, size_of, writing

FILE = "report.html"
POINTS = 500  # of a curve, which is drawn 400 units wide
# Title -> {name of a curve: key in the log}. Curves that were not logged are left out.
CHARTS = {
    "Training loss": {
        "loss": "loss",
        "reconstruction": "generator/rec",
        "discriminator": "discriminator/loss",
    },
    "Held-out error": {
        "mean": "validation/mean",
        "sigma 0.2": "validation/0.2",
        "sigma 1": "validation/1",
        "sigma 5": "validation/5",
    },
    "Distance to held-out images": {
        "prior samples": "validation/prior_distance",
        "reconstructions": "validation/rec_distance",
    },
    "Held-out error of the guidance weight": {"rmse": "validation/rmse"},
    "PSNR, dB": {
        "reconstructions": "validation/rec_psnr",
        "to the teacher's solutions": "validation/solved_psnr",
        "drift from the base": "validation/drift_psnr",
    },
}


def write_report(recipe: Recipe, folder: Path) -> Path:
    """Write `report.html` into a run's folder; returns its path."""
    records = {s.name: Record(folder / s.name) for s in recipe.stages}
    sections = [_overview(recipe, records), _side_by_side(recipe, folder, records)]
    for stage in recipe.stages:
        sections.append(_stage(stage, folder / stage.name, records[stage.name].values))
    sections.append(_details("The recipe, with every setting filled in", json.dumps(_settings(recipe), indent=2)))
    seconds = sum(r.values.get("wall_seconds", 0) for r in records.values())
    page = PAGE.substitute(
        title=escape(f"{recipe.name}: a pixelgrow run"),
        name=escape(recipe.name),
        subtitle=escape(
            f"{len(recipe.stages)} stages in {duration(seconds)}, finished {time.strftime('%Y-%m-%d %H:%M')} "
            f"by pixelgrow {__version__} on {_machine()}"
        ),
        body="\n".join(sections),
    )
    path = folder / FILE
    part = path.with_name(f".{FILE}.part")
    with writing(path):
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    return path


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {platform.machine()}, torch {torch.__version__}"


def _settings(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", by_alias=True, exclude_none=True)


def _overview(recipe: Recipe, records: dict[str, Record]) -> str:
    rows = []
    for stage in recipe.stages:
        values = records[stage.name].values
        result = values.get("result", {})
        parameters = result.get("parameters", {})
        speed, share = result.get("images_per_second"), result.get("matmul_share")
        rows.append(
            [
                f'<a href="#{escape(stage.name)}">{escape(stage.name)}</a>',
                escape(_what(stage)),
                f"{result['images']:,}" if "images" in result else "",
                "<br>".join(escape(_seen(account)) for account in values.get("sees", [])),
                count(parameters["all"]) if parameters else "",
                count(parameters["training"]) if parameters else "",
                f"{speed:.3g}" if speed else "",
                f"{100 * share:.0f}%" if share else "",
                duration(values.get("wall_seconds", 0)),
                size_of(result["peak_memory"]) if "peak_memory" in result else "",
                _number_of(result.get("bad_files", "")),
            ]
        )
    head = ["stage", "what", "images", "sees", "parameters", "training", "images/s", "of matmul rate", "time",
            "peak memory", "bad files"]  # fmt: skip
    return f"<section><h2>Stages</h2>{_table(head, rows, named=True)}</section>"


def _side_by_side(recipe: Recipe, folder: Path, records: dict[str, Record]) -> str:
    """The evaluations of several models on the same held-out prompts: a table of numbers, and grids side by side."""
    stages = [s for s in recipe.stages if isinstance(s, EvaluateStage)]
    found = [(s, metrics) for s in stages if (metrics := records[s.name].values.get("result"))]
    if len(found) < 2:
        return ""
    kinds = list(dict.fromkeys(kind for _, metrics in found for kind in metrics.get("accuracy", {})))
    rows = [
        [
            f'<a href="#{escape(stage.name)}">{escape(str(stage.parent))}</a>',
            f"{metrics['nfe']}",
            f"{metrics['seconds_per_image']:.3g}",
            *(f"{100 * accuracy[kind]:.1f}%" if kind in accuracy else "" for kind in kinds),
        ]
        for stage, metrics in found
        for accuracy in [metrics.get("accuracy", {})]
    ]
    grids = [(stage, folder / stage.name / "samples" / "grid.png") for stage, _ in found]
    shown = [_figure(grid, f"{stage.parent}") for stage, grid in grids if grid.exists()]
    table = _table(["model", "evaluations", "seconds/image", *kinds], rows)
    return f'<section><h2>Side by side</h2>{table}<div class="row">{"".join(shown)}</div></section>'


def _number_of(files: Any) -> str:
    """The number of bad files, which stages that train count and evaluations list."""
    return f"{len(files) if isinstance(files, list) else files:,}" if files != "" else ""


def _what(stage: Stage) -> str:
    if isinstance(stage, TrainStage):
        return f"train on {stage.parent}" if stage.parent else f"train {stage.size} at {stage.resolution} px"
    if isinstance(stage, GrowStage):
        core = "all trains" if stage.trains_core else "frozen"
        core = f"unfrozen after {stage.unfreeze_after:,}" if stage.unfreeze_after else core
        return f"grow {stage.parent} to {stage.to[-1]} px, {stage.init}, {core}"
    if isinstance(stage, PairsStage):
        return f"{stage.direction} pairs of {stage.parent}"
    if isinstance(stage, EstimateStage):
        return f"estimate guidance weights from {stage.pairs}"
    if isinstance(stage, DistillStage):
        return f"distil {stage.parent} to one step on {stage.pairs}"
    return f"evaluate {stage.parent}"


def _stage(stage: Stage, folder: Path, values: dict[str, Any]) -> str:
    parts = [f'<section id="{escape(stage.name)}"><h2>{escape(stage.name)} <small>{escape(_what(stage))}</small></h2>']
    if isinstance(stage, EvaluateStage):
        parts.append(_evaluation(folder, values.get("result", {})))
    elif isinstance(stage, PairsStage):
        parts.append(_pairs(values.get("result", {})))
    else:
        if isinstance(stage, GrowStage):
            parts.append(_growth(folder))
        for phase in (folder / "frozen", folder):
            if (phase / "log.jsonl").exists():
                title = "Frozen phase" if phase != folder else ""
                parts.append(_training(phase, title))
    result = values.get("result", {})
    notes = [Account.from_stored(a).line() for a in values.get("sees", [])]
    notes += [result.get("bad_report", ""), _skipped(result.get("skipped_steps", 0)), _cut(values.get("cut"))]
    parts += [f"<p>{escape(n[0].upper() + n[1:])}.</p>" for n in notes if n]
    return "\n".join(parts) + "</section>"


def _skipped(steps: int) -> str:
    return f"{steps} steps were skipped because they were not finite" if steps else ""


def _cut(found: dict[str, Any] | None) -> str:
    return Cut(**found).line() if found and found["captions"] else ""


def _seen(found: dict[str, Any]) -> str:
    things = "" if found["things"] == "images" else f" {found['things']}"
    return f"{found['seen']:,} of {found['total']:,}{things}"


# --- parts ------------------------------------------------------------------------------------------------------------


def _training(folder: Path, title: str) -> str:
    """Charts and grids of a training: the last one, and one halfway of the same prompts, which may have changed."""
    lines = _log(folder / "log.jsonl")
    charts = [
        chart(title, [Curve(name, _series(lines, key)) for name, key in curves.items()])
        for title, curves in CHARTS.items()
    ]
    numbered = [path for path in (folder / "samples").glob("*.png") if path.stem.isdecimal()]
    grids = sorted(numbered, key=lambda path: int(path.stem))
    rows = _rows(grids[-1]) if grids else ""
    grids = [path for path in grids if _rows(path) == rows]
    shown = [(grids[(len(grids) - 1) // 2], "halfway"), (grids[-1], "at the end")][-len(grids) :] if grids else []
    figures = "".join(_figure(path, f"{int(path.stem):,} images, {when}") for path, when in shown)
    heading = f"<h3>{title}</h3>" if title else ""
    what = _details("What the rows show", rows) if rows else ""
    return f'{heading}<div class="row">{"".join(charts)}</div><div class="row">{figures}</div>{what}'


def _rows(grid: Path) -> str:
    """What the rows of a sample grid show, and their prompts, as the file itself says; "" if it does not."""
    with Image.open(grid) as image:
        return str(json.loads(image.info.get("pixelgrow", "{}")).get("rows", ""))


def _pairs(result: dict[str, Any]) -> str:
    bands = [[escape(k), *(f"{v + 0:g}" for v in numbers.values())] for k, numbers in result.get("latents", {}).items()]
    trips = [[escape(sigma), f"{value:.1f}"] for sigma, value in result.get("round_trip_psnr", {}).items()]
    note = f"{result.get('pairs', 0):,} pairs, {result.get('bytes_per_pair', 0):,.0f} bytes each"
    return (
        f'<p>{note}.</p><div class="row"><div>'
        f'<p class="note">Latents by band of frequencies; white noise has deviation 1 and kurtosis 3:</p>'
        f"{_table(['band', 'mean', 'deviation', 'kurtosis'], bands)}</div>"
        f'<div><p class="note">Inverted to a noise level and solved back:</p>'
        f"{_table(['sigma', 'PSNR, dB'], trips)}</div></div>"
    )


def _growth(folder: Path) -> str:
    growth = read_json(folder / "growth.json")
    if growth is None:
        return ""
    low, high = growth["resolution"]
    tensors = [
        ["loaded", f"{len(growth['loaded'])}", f"{growth['parameters']['loaded']:,}"],
        ["new", f"{len(growth['new'])}", f"{growth['parameters']['new']:,}"],
        ["dropped", f"{len(growth['dropped'])}", ""],
        ["frozen", f"{len(growth['frozen'])}", ""],
    ]
    before, after = ({float(k): v for k, v in growth[k].items()} for k in ("before", "after"))
    trained = {float(k.partition("/")[2]): v for k, v in _last_validation(folder / "log.jsonl").items()}
    rows = [
        [f"{s:g}", f"{before[s]:.5f}", f"{after[s]:.5f}", f"{trained[s]:.5f}" if s in trained else ""] for s in before
    ]
    head = ["noise level at the core", f"parent, {low} px up-sampled", "grown, no step yet", "trained"]
    figures = [("before.png", f"the parent, {low} px"), ("after.png", f"grown, {high} px, before its first step")]
    images = "".join(_figure(folder / name, what) for name, what in figures if (folder / name).exists())
    errors = (
        f'<div><p class="note">Held-out squared error of the denoised image at {high} px'
        f"{', kept by the growth itself' if growth['init'] == 'preserve' else ''}:</p>"
        f"{_table(head, rows)}</div>"
        if rows
        else ""
    )
    return (
        f"<h3>Growth from {low} to {high} px ({escape(growth['init'])})</h3>"
        f'<div class="row">{_table(["tensors", "", "parameters"], tensors)}{errors}</div>'
        f'<div class="row">{images}</div>'
    )


def _evaluation(folder: Path, metrics: dict[str, Any]) -> str:
    parts = []
    if accuracy := metrics.get("accuracy"):
        bars = "".join(
            f'<tr><th>{escape(kind)}</th><td class="bar"><i style="width:{100 * share:.1f}%"></i></td>'
            f"<td>{100 * share:.1f}%</td></tr>"
            for kind, share in accuracy.items()
        )
        parts.append(
            f'<div><p class="note">The checker\'s accuracy on {metrics["prompts"]:,} held-out captions</p>'
            f'<table class="bars">{bars}</table></div>'
        )
    others = [row for row in metrics.get("metrics", []) if row["metric"] != "scenes"]
    if others:
        rows = [[escape(r["name"]), f"{r['mean']:.4g}", _ends(r), escape(r["interval"] or "")] for r in others]
        parts.append(f"<div>{_table(['metric', '', '95% interval', 'over'], rows)}</div>")
    if error := metrics.get("error"):
        points = [(float(k), v) for k, v in error.items()]
        parts.append(chart("Held-out error by noise level at the core", [Curve("error", points)], "sigma", log_x=True))
    grid = folder / "samples" / "grid.png"
    settings = [", ".join(f"{name} {value}" for name, value in metrics.get("sampling", {}).items())]
    each = "one network evaluation each" if metrics.get("nfe") == 1 else f"{metrics.get('nfe', '?')} evaluations each"
    caption = "; ".join(["held-out prompts", *filter(None, settings), each])
    figure = _figure(grid, caption) if grid.exists() else ""
    return f'<div class="row">{"".join(parts)}</div>{figure}{_prompts(folder / "samples" / "prompts.txt")}'


def _ends(row: Mapping[str, Any]) -> str:
    """The interval of a row of an evaluation."""
    return "" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}"


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _prompts(path: Path) -> str:
    if not path.exists():
        return ""
    return _details("Prompts, row by row", path.read_text(encoding="utf-8"))


def _details(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text.strip())}</pre></details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], named: bool = False) -> str:
    """`rows` are HTML; `named`: their second cells are words, not numbers."""
    kind = ' class="named"' if named else ""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


# --- logs -------------------------------------------------------------------------------------------------------------


def _log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _series(lines: Iterable[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """The logged values of `name` by images, thinned evenly to POINTS at most, the last one kept."""
    found = [(line["images"], line[name]) for line in lines if line.get(name) is not None]
    return found[::-1][:: max(1, math.ceil(len(found) / POINTS))][::-1]


def _last_validation(path: Path) -> dict[str, float]:
    found = [line for line in _log(path) if "validation/mean" in line] if path.exists() else []
    last = found[-1] if found else {}
    return {k: v for k, v in last.items() if k.startswith("validation/") and not k.endswith("mean") and v is not None}
