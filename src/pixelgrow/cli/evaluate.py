"""The `evaluate` and `compare` verbs: one JSON file of an evaluation, or of a sweep over a sampling setting; tables."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from pixelgrow.distributed import Team
from pixelgrow.errors import UserError
from pixelgrow.evaluation.compare import FORMAT, Evaluation, compare, read_evaluations
from pixelgrow.evaluation.images import Candidate, device, open_candidate
from pixelgrow.evaluation.planning import Asked, make_plan, parse_sweep, sampling
from pixelgrow.evaluation.protocol import Plan, check, measure, result
from pixelgrow.evaluation.shards import Shards
from pixelgrow.report.evaluations import comparison_table, evaluation_table, trade_off
from pixelgrow.report.tables import show
from pixelgrow.training.log import Displays
from pixelgrow.training.loop import CHECKPOINT
from pixelgrow.training.monitor import peak_memory, reset_peak
from pixelgrow.writing import atomic, going_on, reading, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What to evaluate, how, and where to. `sweep`: SETTING=VALUE,VALUE. `settings`: None for the checkpoint's own."""

    candidate: str
    asked: Asked
    out: Path | None = None
    sweep: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def evaluate_candidate(request: Request, team: Team) -> None:
    """Evaluate, or go on with it; write the JSON, of a sweep a plot too, and print the table. Raises UserError.

    team: the processes that share the images, each of which calls this function; the first one writes.
    """
    out = request.out or Path(f"evaluation-{_slug(request.candidate)}.json")
    if out.suffix != ".json":
        raise UserError(f"--output {out}: expected a name that ends in .json")
    given = sampling({k: v for k, v in request.settings.items() if v is not None})
    setting, values = ("", []) if request.sweep is None else parse_sweep(request.sweep)
    with reading(out):
        there = team.tell(out.exists())
    found = read_evaluations(out) if there else []  # refuses a file that is none before anything is loaded
    candidate = open_candidate(request.candidate, given, batch=request.asked.batch)
    candidates = [candidate.varied(setting, value) for value in values] or [candidate]
    plan = make_plan(candidate, request.asked)
    for one in candidates:
        check(plan, one)
    described = plan.describe(*candidates)
    digest = team.alone(lambda: _digest([described, plan.metrics, plan.seeds, plan.real_images()]))
    if any(e.values.get("plan") != digest for e in found):
        raise UserError(f"--output {out}: holds another evaluation, of {found[0].values['name']}; name another file")
    if found:
        logger.info("%s is there already; delete it to evaluate again", out)
    else:
        with going_on():
            shards = team.in_turn(lambda: Shards(out.with_name(f"{out.name}.part"), described))
            made = [_measured(one, plan, shards, setting, team) | {"plan": digest} for one in candidates]
            swept = {"format": FORMAT, "sweep": {"setting": setting, "values": values}, "evaluations": made}
            if team.first:
                write_json(out, swept if setting else made[0])
                shards.clear()
    if not team.first:
        return
    evaluations = read_evaluations(out)
    if not setting:
        show(evaluation_table(evaluations[0]))
        return
    show(comparison_table(compare(evaluations), evaluations))
    _plot(out.with_suffix(".svg"), {out.stem: evaluations})


def _measured(candidate: Candidate, plan: Plan, shards: Shards, setting: str, team: Team) -> dict[str, Any]:
    """The JSON of a candidate."""
    key = f"{setting}={candidate.describe()['sampling'][setting]}/" if setting else ""
    began = time.monotonic()
    reset_peak(device())
    with Displays() as display:
        measure(candidate, plan, shards, key=key, progress=display, team=team)
        values = team.alone(lambda: result(candidate, plan, shards, key=key).values)
    values["measured"] |= {
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory": peak_memory(device()),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    return values


def compare_files(files: Sequence[Path], plot: Path | None = None) -> None:
    """Print evaluations side by side; of a sweep, each of its values. Raises UserError if they are not comparable."""
    if plot is not None and plot.suffix != ".svg":
        raise UserError(f"--plot {plot}: expected a name that ends in .svg")
    curves = {title: read_evaluations(f, title) for f in files for title in [_title(f, files)]}
    evaluations = [e for some in curves.values() for e in some]
    show(comparison_table(compare(evaluations), evaluations))
    if plot is not None:
        _plot(plot, curves)


def _title(file: Path, files: Sequence[Path]) -> str:
    """A file's name in tables: its stem, or its path where two have one."""
    return file.stem if sum(other.stem == file.stem for other in files) == 1 else str(file.with_suffix(""))


def _plot(path: Path, curves: Mapping[str, Sequence[Evaluation]]) -> None:
    """Write the plot of alignment against distance."""
    if drawn := trade_off(curves):
        with atomic(path) as part:
            part.write_text(drawn, encoding="utf-8")
        show(Text(f"plot: {path}"))
    else:
        logger.warning("no plot: it takes a distance and a metric of alignment, such as fd and scenes; see --metrics")


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=list).encode()).hexdigest()


def _slug(name: str) -> str:
    """The last part of a name that says something, as part of a file name."""
    parts = [p for p in Path(name).parts if p != CHECKPOINT]
    return re.sub(r"[^A-Za-z0-9.]+", "-", parts[-1] if parts else "").strip("-.") or "images"
