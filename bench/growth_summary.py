"""What the growth benchmark found: curves of the held-out error, who reaches whose error with what compute, tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.growth_plan import TERA, Phase, Plan

from pixelgrow.data.scenes.questions import KINDS
from pixelgrow.diffusion.heldout import SIGMAS
from pixelgrow.errors import UserError
from pixelgrow.training.unfinished import FROZEN
from pixelgrow.writing import write_json

LEVELS = ("mean", *(f"{sigma:g}" for sigma in SIGMAS))
OURS = ("frozen-preserve", "frozen-exact", "finetune-exact")
PAPERS, SCRATCH = "frozen-random", "scratch"
TARGETS = {PAPERS: 1 / 3, SCRATCH: 1 / 2}


@dataclass(frozen=True)
class Curve:
    """Held-out error along a run: `flops` spent, the core's included, and by level ("mean", "0.05", ...) the errors."""

    flops: list[float]
    errors: dict[str, list[float]]

    @property
    def final(self) -> dict[str, float]:
        return {level: errors[-1] for level, errors in self.errors.items()}


def read_curve(folder: Path, phases: Sequence[Phase], start: float) -> Curve:
    """The validation records of a stage's folder; of two phases, the first lies in a folder of its own."""
    flops: list[float] = []
    errors: dict[str, list[float]] = {level: [] for level in LEVELS}
    before = 0  # images of the phases before: logs count those of the whole run
    for number, phase in enumerate(phases, 1):
        log = (folder if number == len(phases) else folder / FROZEN) / "log.jsonl"
        for record in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
            if "validation/mean" in record:
                flops.append(start + (record["images"] - before) * phase.flops)
                for level in LEVELS:
                    errors[level].append(record[f"validation/{level}"])
        start += phase.cost
        before += phase.images
    return Curve(flops, errors)


def crossing(curve: Curve, error: float, level: str = "mean") -> float | None:
    """FLOPs at which a curve first comes down to an error, on straight lines between evaluations; None if never."""
    points = list(zip(curve.flops, curve.errors[level], strict=True))
    if points[0][1] <= error:
        return points[0][0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 <= error:
            return x0 + (x1 - x0) * (y0 - error) / (y0 - y1)
    return None


def fractions(curves: Mapping[str, Curve], plan: Plan, ours: str, level: str = "mean") -> dict[str, float | None]:
    """What share of another regime's compute `ours` needs to reach its final error: of `frozen-random`'s the growth's
    alone, of `scratch`'s all, the core's included."""
    found: dict[str, float | None] = {}
    for other in (PAPERS, SCRATCH):
        if {other, ours} <= curves.keys():
            free = plan.core.cost if other == PAPERS else 0.0
            at = crossing(curves[ours], curves[other].final[level], level)
            found[other] = None if at is None else (at - free) / (curves[other].flops[-1] - free)
    return found


# --- what is written --------------------------------------------------------------------------------------------------


def summarize(plan: Plan, root: Path, seeds: int, figures: Path) -> tuple[str, bool]:
    """Tables of the seeds that are whole, as Markdown, and whether all seeds are and meet every target.

    Writes `root/results.json` and two figures."""
    accuracy, curves = [], []
    for seed in range(seeds):
        files = {name: root / f"seed{seed}-checker" / name / "metrics.json" for name in plan.regimes}
        if all(file.exists() for file in files.values()):
            accuracy.append(
                {name: json.loads(file.read_text(encoding="utf-8"))["accuracy"] for name, file in files.items()}
            )
            curves.append(
                {n: read_curve(root / f"seed{seed}" / n, phases, plan.starts(n)) for n, phases in plan.regimes.items()}
            )
    if not curves:
        raise UserError(f"{root} holds no seed whose runs are all done: run the same command without --summary")
    run = [ours for ours in OURS if ours in plan.regimes]
    results = [
        {
            "curves": {name: asdict(curve) for name, curve in of_seed.items()},
            "accuracy": accuracy[seed],
            "fractions": {ours: {level: fractions(of_seed, plan, ours, level) for level in LEVELS} for ours in run},
        }
        for seed, of_seed in enumerate(curves)
    ]
    write_json(root / "results.json", {"plan": asdict(plan), "seeds": results})
    plot(curves, plan, ["mean"], figures / "growth.png")
    plot(curves, plan, LEVELS[1:], figures / "growth_by_noise.png")
    parts = [error_table(curves), accuracy_table(accuracy), *(fraction_table(curves, plan, ours) for ours in run)]
    found = [fractions(of, plan, ours) for of in curves for ours in run]
    met = len(curves) == seeds and all(
        (share := of.get(other)) is not None and share <= target for of in found for other, target in TARGETS.items()
    )
    return "\n\n".join(part for part in parts if part), met


def error_table(curves: Sequence[Mapping[str, Curve]]) -> str:
    """Final held-out error by regime and noise level."""
    lines = [
        f"Final held-out error x 1000 by noise level at the core; mean and standard deviation of {len(curves)} seeds.",
        "",
        "| regime | mean | " + " | ".join(f"σ {level}" for level in LEVELS[1:]) + " |",
        "|---|" + "---:|" * len(LEVELS),
    ]
    for name in curves[0]:
        cells = [spread((1e3 * of[name].final[level] for of in curves), 2) for level in LEVELS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracy_table(accuracy: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """The checker's accuracies by regime and kind of question."""
    lines = [
        "The checker's accuracies on held-out captions, %.",
        "",
        "| regime | " + " | ".join(KINDS) + " |",
        "|---|" + "---:|" * len(KINDS),
    ]
    for name in accuracy[0]:
        cells = [spread((100 * of[name][kind] for of in accuracy if kind in of[name]), 1) for kind in KINDS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fraction_table(curves: Sequence[Mapping[str, Curve]], plan: Plan, ours: str) -> str:
    """The targets, and the same by noise level; empty where the regimes that it compares were not run."""
    found = {level: [fractions(of, plan, ours, level) for of in curves] for level in LEVELS}
    others = list(found["mean"][0])
    if not others:
        return ""
    what = {PAPERS: "growth compute", SCRATCH: "total compute, the core's included"}
    lines = [
        f"Share of another regime's compute at which {ours} reaches its final held-out error, of each seed "
        "(0: before the first step; never: not with all of its budget).",
        "",
        "| compared with | of its | target | " + " | ".join("mean" if v == "mean" else f"σ {v}" for v in LEVELS) + " |",
        "|---|---|---|" + "---|" * len(LEVELS),
    ]
    for other in others:
        of_mean = [of[other] for of in found["mean"]]
        met = all(f is not None and f <= TARGETS[other] for f in of_mean)
        target = f"{TARGETS[other]:.2f} {'met' if met else 'missed'}"
        cells = [", ".join("never" if of[other] is None else f"{of[other]:.2f}" for of in found[v]) for v in LEVELS]
        lines.append(f"| {other} | {what[other]} | {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Iterable[float], digits: int) -> str:
    """Mean and standard deviation; the value alone if there is one, nothing if there is none."""
    numbers = list(values)
    if not numbers:
        return ""
    mean = f"{statistics.mean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def plot(curves: Sequence[Mapping[str, Curve]], plan: Plan, levels: Sequence[str], path: Path) -> None:
    """Held-out error over compute, a panel for each level: the mean of the seeds, and a band from least to most."""
    from matplotlib.figure import Figure

    columns = min(4, len(levels))
    rows = -(-len(levels) // columns)
    figure = Figure(figsize=(8, 4.8) if len(levels) == 1 else (3.2 * columns, 2.8 * rows), layout="constrained")
    panels: list[Any] = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for axis, level in zip(panels, levels, strict=False):
        for name in curves[0]:
            x = [flops / TERA for flops in curves[0][name].flops]
            points = list(zip(*(of[name].errors[level] for of in curves), strict=True))
            (line,) = axis.plot(x, [statistics.mean(p) for p in points], label=name, marker=".", markersize=4)
            axis.fill_between(x, [min(p) for p in points], [max(p) for p in points], color=line.get_color(), alpha=0.15)
        axis.axvline(plan.core.cost / TERA, color="grey", linestyle=":", linewidth=1)
        title = f"mean over noise levels, {len(curves)} seeds" if level == "mean" else f"σ = {level} at the core"
        axis.set(yscale="log", title=title)
        axis.tick_params(axis="y", which="both", labelsize=7)
        axis.grid(alpha=0.3, which="both")
    figure.supxlabel("training compute, TFLOP, with the core's (dotted)", fontsize=10)
    figure.supylabel("held-out error", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
