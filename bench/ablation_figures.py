"""Figures of the ablation: what each run reached, with intervals; losses at three batch sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pixelgrow.writing import atomic

Runs = Mapping[str, Mapping[int, Mapping[str, float]]]
Summary = Callable[[Sequence[float]], Mapping[str, float]]
PANELS = (
    ("growth", "questions", "growth to 32 px: questions answered right, %"),
    ("growth", "FD", "growth to 32 px: Frechet distance"),
    ("onestep", "questions", "one step: questions answered right, %"),
    ("onestep", "FD", "one step: Frechet distance (16, 32 and 64 px)"),
    ("scaling", "questions", "cores at 16 px: questions answered right, %"),
    ("scaling", "error", "cores at 16 px: held-out error x 1000"),
)
FACTORS = {"questions": 100, "error": 1000}


def draw(root: Path, runs: Mapping[str, Runs], summary: Summary, folder: Path) -> list[Path]:
    """Write the figures that there are runs for."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    panels = [p for p in PANELS if p[0] in runs]
    if panels:
        bars(panels, runs, summary, folder / "ablation.png")
        written.append(folder / "ablation.png")
    if "batches" in runs:
        curves(root, runs["batches"], folder / "ablation-batches.png")
        written.append(folder / "ablation-batches.png")
    return written


def bars(panels: Sequence[tuple[str, str, str]], runs: Mapping[str, Runs], summary: Summary, path: Path) -> None:
    """A panel for each measure of a part: means, intervals over seeds, and every seed as a dot."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 3.2 * rows), layout="constrained")
    for axis, (part, measure, title) in zip(figure.subplots(rows, 2, squeeze=False).flat, panels, strict=False):
        factor = FACTORS.get(measure, 1)
        found = {n: [factor * v[measure] for v in of.values() if measure in v] for n, of in runs[part].items()}
        found = {name: values for name, values in found.items() if values}
        for at, values in enumerate(found.values()):
            of = summary(values)
            axis.barh(at, of["mean"], color="C0", alpha=0.6)
            if "low" in of:
                axis.plot([of["low"], of["high"]], [at, at], color="black", linewidth=1.5)
            axis.plot(values, [at] * len(values), ".", color="C3", markersize=5)
        axis.set_yticks(range(len(found)), list(found), fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3, axis="x")
    with atomic(path) as part:
        figure.savefig(part, dpi=120, format="png")


def curves(root: Path, runs: Runs, path: Path) -> None:
    """Gradient norms of every run of the stress test, a panel for each way to begin, over images."""
    from matplotlib.figure import Figure

    starts = list(dict.fromkeys(name.rpartition("-")[0] for name in runs))
    figure = Figure(figsize=(5.5 * len(starts), 3.6), layout="constrained")
    panels: Any = figure.subplots(1, len(starts), sharey=True, squeeze=False)[0]
    for axis, start in zip(panels, starts, strict=True):
        names = sorted((n for n in runs if n.startswith(f"{start}-")), key=lambda n: int(n.rpartition("-")[2]))
        for colour, name in enumerate(names):
            for seed in runs[name]:
                log = root / f"batches-seed{seed}" / name / "log.jsonl"
                records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
                steps = [(r["images"], r["grad_norm"]) for r in records if "grad_norm" in r]
                label = f"batch {name.rpartition('-')[2]}" if seed == min(runs[name]) else None
                axis.plot(*zip(*steps, strict=True), color=f"C{colour}", linewidth=0.6, alpha=0.7, label=label)
        axis.set(yscale="log", xlabel="images", title=start)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    panels[0].set_ylabel("norm of the gradient, not clipped")
    with atomic(path) as part:
        figure.savefig(part, dpi=120, format="png")
