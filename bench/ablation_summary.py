"""What the ablation found: means over seeds with t intervals, and paired differences of the runs compared."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.ablation_figures import draw
from bench.growth_plan import TERA
from bench.onestep import DECODER

from pixelgrow.errors import UserError
from pixelgrow.evaluation.metrics import interval
from pixelgrow.writing import atomic, read_json, write_json

Values = dict[str, float]  # of a run and seed, by measure
Runs = dict[str, dict[int, Values]]  # by name and seed
SCENES = ("questions", "all", "background", "colour", "shape", "count", "relation")  # shares, written in %
WINDOW = 50  # steps before a step, whose median gradient norm it is compared with
SPIKE = 5.0  # times that median
WORSE = 2.0  # a run diverged if its last tenth loses this many times what its best tenth did


@dataclass(frozen=True)
class Contrast:
    """A difference of sums of runs in one measure, seed by seed; expected: the sign that the claim says."""

    part: str
    what: str
    measure: str
    plus: tuple[str, ...]
    minus: tuple[str, ...]


def _against(part: str, base: str, names: Iterable[str], measures: Sequence[str]) -> list[Contrast]:
    return [Contrast(part, f"{n} - {base}", m, (n,), (base,)) for n in names for m in measures]


BOTH = ("questions", "FD")
CONTRASTS = [
    *_against("growth", "scratch", ("frozen-random", "unfreeze-random", "frozen-preserve", "frozen-exact"), BOTH),
    *_against("growth", "scratch", ("frozen-random", "frozen-preserve"), ("error",)),
    *_against("growth", "finetune-random", ("frozen-random", "unfreeze-random"), (*BOTH, "error")),
    *_against("growth", "cascade", ("frozen-random", "frozen-preserve", "frozen-exact"), BOTH),
    *_against("few", "scratch-few", ("frozen-random-few", "finetune-random-few"), (*BOTH, "error")),
    *_against("onestep", "rec", ("rec-adv",), BOTH),
    *_against("onestep", "dstl-adv", ("rec-adv",), BOTH),
    *_against("onestep", "weak-dstl-adv", ("weak-rec-adv",), BOTH),
    *(
        Contrast(
            "onestep", "rise with the weak teacher, dstl-adv - rec-adv", m,
            ("weak-dstl-adv", "rec-adv"), ("dstl-adv", "weak-rec-adv"),
        )
        for m in BOTH
    ),
    *_against("onestep", "rec-adv", ("share-0.01", "share-0.1"), BOTH),
    *_against("onestep", "16-to-64", ("32-to-64", "base32-to-64"), BOTH),
    *_against("scaling", "core-s-images", ("core-m",), ("questions", "error")),
    *_against("scaling", "core-m", ("core-l-images",), ("questions", "error")),
    *_against("scaling", "core-s", ("core-m",), ("questions", "error")),
    *_against("scaling", "core-m", ("core-l",), ("questions", "error")),
]  # fmt: skip
COLUMNS = {
    "cores": (*SCENES, "FD", "error"),
    "growth": (*SCENES, "FD", "error"),
    "few": (*SCENES, "FD", "error"),
    "onestep": (*SCENES, "FD"),
    "scaling": (*SCENES, "error"),
    "batches": ("steps", "spikes", "skipped", "diverged", "questions", "error"),
}


# --- reading ----------------------------------------------------------------------------------------------------------


def read_runs(root: Path, part: str) -> Runs:
    """What every finished evaluation of a part found."""
    runs: Runs = {}
    for file in sorted(root.glob(f"{part}-seed*/eval-*/metrics.json")):
        name, seed = file.parent.name.removeprefix("eval-"), int(file.parents[1].name.rpartition("seed")[2])
        values = measured(json.loads(file.read_text(encoding="utf-8")))
        if part == "batches":
            values |= stability(file.parents[1] / name / "log.jsonl")
        runs.setdefault(name, {})[seed] = values
    return runs


def measured(metrics: Mapping[str, Any]) -> Values:
    """The measures of an evaluation: accuracies, `FD`, and `error`, the mean over noise levels."""
    found: Values = dict(metrics["accuracy"])
    for row in metrics.get("metrics", ()):
        if row["metric"] == "fd":
            found["FD"] = row["mean"]
        elif row.get("measure") == "scenes-questions":
            found["questions"] = row["mean"]
    if "error" in metrics:
        found["error"] = statistics.mean(metrics["error"].values())
    return found


def stability(log: Path) -> Values:
    """Steps, spikes (of the gradient's norm) per 1000 steps, skipped steps, and whether a run diverged (0 or 1)."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [r for r in records if "grad_norm" in r]
    return {
        "steps": len(steps),
        "spikes": 1e3 * spikes([r["grad_norm"] for r in steps]) / len(steps),
        "skipped": steps[-1]["skipped"],
        "diverged": float(diverged([r["loss"] for r in steps])),
    }


def spikes(norms: Sequence[float]) -> int:
    """How many are more than SPIKE times the median of up to WINDOW before them; the first five are left out."""
    before = [norms[max(0, i - WINDOW) : i] for i in range(len(norms))]
    return sum(len(w) >= 5 and not norm <= SPIKE * statistics.median(w) for norm, w in zip(norms, before, strict=True))


def diverged(losses: Sequence[float]) -> bool:
    """Whether the mean loss of the last tenth is more than WORSE times that of the best tenth, or no number."""
    n = max(1, len(losses) // 10)
    tenths = [statistics.mean(losses[i : i + n]) for i in range(0, len(losses) - n + 1, n)]
    return not statistics.mean(losses[-n:]) <= WORSE * min(tenths)


# --- intervals --------------------------------------------------------------------------------------------------------


def summary(values: Sequence[float]) -> dict[str, float | int]:
    """Mean, and the t interval over seeds if there are several."""
    found: dict[str, float | int] = {"mean": statistics.mean(values), "seeds": len(values)}
    if len(values) > 1:
        of = interval(values)
        found |= {"low": of.low, "high": of.high}
    return found


def contrast(of: Contrast, runs: Runs) -> dict[str, Any] | None:
    """The paired difference over the seeds that have all runs; None if there are none."""
    names = (*of.plus, *of.minus)
    seeds = sorted(set.intersection(*(set(runs.get(name, {})) for name in names)))
    seeds = [s for s in seeds if all(of.measure in runs[name][s] for name in names)]
    if not seeds:
        return None

    def total(names: Sequence[str], seed: int) -> float:
        return sum(runs[name][seed][of.measure] for name in names)

    differences = [total(of.plus, s) - total(of.minus, s) for s in seeds]
    return {"part": of.part, "what": of.what, "measure": of.measure, **summary(differences)}


# --- what is written --------------------------------------------------------------------------------------------------


def shown(found: Mapping[str, float | int], measure: str, *, signed: bool = False) -> str:
    """A mean with its interval; shares in %, errors x 1000."""
    share = measure in SCENES
    factor, digits = (100, 1) if share else (1000, 2) if measure == "error" else (1, 1)
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    low, high = (found.get(k) for k in ("low", "high"))
    if share and not signed and low is not None and high is not None:
        low, high = max(0.0, low), min(1.0, high)
    text = form.format(factor * found["mean"])
    if low is None or high is None:
        return text
    return f"{text} [{form.format(factor * low)}, {form.format(factor * high)}]"


TITLES = {"error": "held-out error x 1000", "spikes": "spikes per 1000 steps"}


def part_table(part: str, runs: Runs, plan: Mapping[str, Mapping[str, Any]]) -> str:
    """The runs of a part as Markdown."""
    columns = COLUMNS[part]
    titles = [TITLES.get(c, f"{c}, %" if c in SCENES else c) for c in columns]
    lines = [f"### {part}", "", "| run | images | TFLOP | " + " | ".join(titles) + " |"]
    lines.append("|---|" + "---:|" * (len(columns) + 2))
    for name in sorted(runs, key=lambda n: list(plan).index(n) if n in plan else len(plan)):
        cells = []
        for column in columns:
            values = [v[column] for v in runs[name].values() if column in v]
            cells.append(shown(summary(values), column) if values else "")
        work = plan.get(name, {"images": [], "flops": []})
        images = " + ".join(f"{n:,}" for n in work["images"])
        tera = sum(n * f for n, f in zip(work["images"], work["flops"], strict=True)) / TERA
        lines.append(f"| {name} | {images} | {tera:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def contrast_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Paired differences as Markdown."""
    lines = ["### Differences, seed by seed", "", "| part | difference | of | mean [95% interval] | seeds | sure |"]
    lines.append("|---|---|---|---:|---:|---|")
    for row in found:
        sure = "low" in row and (row["low"] > 0 or row["high"] < 0)
        cells = (row["part"], row["what"], TITLES.get(row["measure"], row["measure"]))
        value = shown(row, row["measure"], signed=True)
        lines.append(f"| {' | '.join(cells)} | {value} | {row['seeds']} | {'yes' if sure else 'no'} |")
    return "\n".join(lines)


def decode_table(costs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Seconds of growth blocks, of the whole generator, and of a latent model's decoder, as Markdown."""
    lines = [
        "### decode",
        "",
        "| px | growth blocks, s | whole generator, s | decoder, s | decoder over growth | over all |",
    ]
    lines.append("|---:|---:|---:|---:|---:|---:|")
    ours = next(name for name in costs if name != DECODER)
    for side, decoder in costs[DECODER].items():
        mine = costs[ours][side]
        if not (mine["seconds"] and decoder["seconds"]):
            continue
        growth = mine["seconds"] * mine["growth"]
        cells = [f"{v:.4f}" for v in (growth, mine["seconds"], decoder["seconds"])]
        cells += [f"{decoder['seconds'] / v:.1f}" for v in (growth, mine["seconds"])]
        lines.append(f"| {side} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summarize(root: Path, figures: Path, parts: Iterable[str] = COLUMNS) -> tuple[str, list[Path]]:
    """Tables of what is there, as Markdown; writes them, `ablation.json` and figures, and returns those files, too."""
    runs = {part: found for part in parts if (found := read_runs(root, part))}
    costs = read_json(root / "decode.json")
    if not runs and costs is None:
        raise UserError(f"{root} holds no finished evaluation: run the same command without --summary")
    plans = {
        part: {w["name"]: w for w in (read_json(root / f"plan-{part}.json") or {"works": []})["works"]} for part in runs
    }
    contrasts = [row for of in CONTRASTS if (row := contrast(of, runs.get(of.part, {})))]
    tables = [part_table(part, of, plans[part]) for part, of in runs.items()]
    if contrasts:
        tables.append(contrast_table(contrasts))
    if costs is not None:
        tables.append(decode_table(costs))
    settings = read_json(root / "settings.json") or {}
    head = "Mean over seeds and its 95% t interval; " + ", ".join(f"{k} {v}" for k, v in settings.items())
    text = "\n\n".join([head, *tables])
    with atomic(root / "ablation.md") as file:
        file.write_text(text + "\n", encoding="utf-8")
    found = {"settings": settings, "plans": plans, "runs": runs, "differences": contrasts, "decode": costs}
    write_json(root / "ablation.json", found)
    return text, [root / "ablation.md", root / "ablation.json", *draw(root, runs, summary, figures)]
