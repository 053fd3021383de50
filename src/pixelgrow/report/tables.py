"""Tables of the command line: recipes, plans, checkpoints, sources."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pixelgrow.data.sources.remote import is_url
from pixelgrow.training.log import duration
from pixelgrow.writing import reading, size_of

if TYPE_CHECKING:
    from pixelgrow.checkpoint import CheckpointConfig
    from pixelgrow.data.inspect import Inspection, Lengths
    from pixelgrow.plan.recipe import StagePlan
    from pixelgrow.plan.text import TextPlan
    from pixelgrow.recipe.data import DataSpec, HeldoutSpec
    from pixelgrow.recipe.stages import Recipe
    from pixelgrow.stages.foresight import Foresight
    from pixelgrow.text.cut import Cut

YEAR = 365.25 * 86400


def count(n: float, unit: str = "") -> str:
    """A number with three digits and a suffix: 3.04M, 75.5T."""
    for power, suffix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(n) >= 0.9995 * 10**power:
            return f"{n / 10**power:.3g}{suffix}{unit}"
    return f"{n:.3g}{unit}"


def time_of(seconds: float) -> str:
    """A length of time as text, up to years."""
    if seconds >= YEAR:
        return f"{seconds / YEAR:,.0f} years" if seconds >= 2 * YEAR else f"{seconds / YEAR:.1f} years"
    return f"{seconds / 86400:.1f} days" if seconds >= 3 * 86400 else duration(seconds)


def table_of(*columns: str, title: str = "") -> Table:
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", header_style="dim")
    return table


def recipe_heading(
    recipe: Recipe, folder: Path, done: Sequence[str] = (), seen: Foresight | None = None
) -> RenderableType:
    """Name, data, text, the stages `done`, what they see of their data if it is known, and what the table of stages
    leaves out."""
    accounts, held_out = (seen.accounts, seen.held_out) if seen else ({}, "")
    from pixelgrow.plan.shapes import is_here
    from pixelgrow.recipe.stages import DistillStage, EstimateStage, EvaluateStage, GrowStage, ModelStage, PairsStage

    assumed = (
        ""
        if is_here(recipe.text)
        else " (neither minilm nor a folder here: taken as a name on the hub, its width as the size's reference)"
    )
    lines = [
        f"recipe {recipe.name}, seed {recipe.seed}, in {folder}",
        f"data: {', '.join(_data(d) for d in recipe.data)}; held out: {_held_out(recipe.heldout, held_out)}",
        f"text: {recipe.text.encoder}, {recipe.text.max_tokens} tokens{assumed}",
    ]
    if done:
        lines.append(f"done before: {', '.join(done)}")
    for s in recipe.stages:
        if isinstance(s, ModelStage | PairsStage) and s.data is not None:
            lines.append(f"{s.name}: data {', '.join(_data(d) for d in s.data)}")
        if isinstance(s, EvaluateStage):
            lines.append(f"{s.name}: evaluate {s.parent}, {s.prompts:,} prompts")
        elif isinstance(s, PairsStage):
            guided = f", guidance {s.guidance}" if s.guidance != 1 else ""
            lines.append(f"{s.name}: {s.direction} {s.n:,} pairs of {s.parent}, {s.sampler}, {s.steps} levels{guided}")
        elif isinstance(s, EstimateStage):
            lines.append(f"{s.name}: estimate guidance weights from {s.pairs}, {s.images:,} images; not in the table")
        elif isinstance(s, DistillStage):
            lines.append(f"{s.name}: distil {s.parent} on {s.pairs}, {s.images:,} images")
        elif isinstance(s, GrowStage) and s.pairs is not None:
            lines.append(f"{s.name}: grow generator {s.parent} to {s.to[-1]} px, {s.images:,} images")
        if s.name in accounts:
            lines.append(f"{s.name}: {accounts[s.name].line()}")
    return Text("\n".join(lines))


def _held_out(spec: HeldoutSpec, images: str) -> str:
    if spec.source:
        return f"{_data(spec)}{images and f' ({images})'}"
    share = f"{100 * spec.fraction:g}% of the data"
    several = f"16 to {spec.at_most:,}" if spec.at_most > 16 else f"{spec.at_most}"
    return images or f"{share}, {several} images of each source and at most half of it"


def _data(spec: DataSpec) -> str:
    with reading(spec.source):
        here = spec.source == "scenes" or is_url(spec.source) or Path(expanduser(spec.source)).exists()
        found = "" if here else " (not there yet)"
    return spec.source + (f" x {spec.weight:g}" if spec.weight is not None else "") + found


def plan_tables(plans: Sequence[StagePlan], rate: float, how: str) -> RenderableType:
    """Stages, sizes, images and cost; then memory by use. `rate`: FLOP/s achieved; `how`: where it comes from."""
    from pixelgrow.plan.network import SCRATCH

    work = table_of("stage", "pixels", "images", "micro-batch", "core", "levels", "training", "FLOP/image", "time")
    for p in plans:
        sizes = [count(p.cost.parameters[k]) for k in ("core", "levels", "training")]
        flops = " + ".join(map(count, p.cost.work.values()))
        work.add_row(
            f"{p.name}: {p.what}", str(p.resolution), f"{p.images:,}", str(p.batch), *sizes, flops,
            time_of(p.seconds(rate)),
        )  # fmt: skip
    memory = table_of("memory", "weights", "gradients", "optimizer", "averages", "activations", "peak of a step")
    for p in plans:
        m = p.cost.memory
        parts = (m.weights, m.gradients, m.optimizer, m.averages, m.activations, m.peak)
        memory.add_row(f"{p.name}: {p.what}", *map(size_of, parts))
    sums = "forward + backward; of a one-step generator, its update + its discriminator's; of pairs, forward"
    note = f"FLOP/image: {sums}. Time at {count(rate)}FLOP/s, {how}; one device."
    if any(list(p.cost.work) == ["forward"] for p in plans):
        note += " Pairs are made in float32 (TF32 on a GPU), which is slower than that."
    note += f" A process on a CPU takes some {size_of(SCRATCH)} beside its tensors."
    if most := max((p.cost.memory.state for p in plans), default=0):
        note += f" While a state is written, its copy takes up to {size_of(most)} of CPU memory beside a step."
    return Group(work, Text(), memory, Text(), Text(note, style="dim"))


def text_line(text: TextPlan, folder: Path, rate: float) -> RenderableType:
    """What a recipe's captions take in a cache in `folder`, or online, at `rate` FLOP/s."""
    many = "captions" if text.captions is None else f"at most {text.captions:,} captions to train on,"
    each = f"{many} of {'' if text.measured else 'at most '}{text.tokens:.3g} tokens"
    work = "" if text.flops is None else f" ({count(text.flops)}FLOP each)"
    if text.online:
        return Text(f"text: {each}, encoded while training{work}, and nothing is stored")
    stored, seconds = size_of((text.captions or 1) * text.size), text.seconds(rate)
    time = "" if seconds is None else f", {time_of(seconds)} of encoding"
    return Text(f"text: {each}, encoded once{work}: {stored}{'' if text.captions else ' each'} in {folder}{time}")


def checkpoint_tables(folder: Path, config: CheckpointConfig, parts: dict[str, int]) -> RenderableType:
    """The tables of `pixelgrow info`."""
    from pixelgrow.checkpoint import KINDS

    net = config.network
    one_step = config.objective == "generate"
    defaults = f"one evaluation, latents of {net.latent_resolution} px" if one_step else "the library's defaults"
    facts = Table(box=None, show_header=False, pad_edge=False)
    rungs = ", ".join(
        f"{'-'.join(str(v.resolution) for v in r.levels)} px on {r.kind}, patch {r.patch}" for r in net.rungs
    )
    rows = {
        "checkpoint": str(folder),
        "kind": KINDS[config.objective].removeprefix("a "),
        "resolution": f"{net.resolution} px; sides are multiples of {net.stride}",
        "core": f"{net.size}: {net.core.depth} blocks, {net.core.width} wide, {net.core.heads} heads; "
        f"{net.core_resolution // net.core_stride}x{net.core_resolution // net.core_stride} tokens at "
        f"{net.core_resolution} px",
        "rungs": rungs,
        "denoiser": f"{config.diffusion.prediction}, sigma at the core from {config.diffusion.sigma_min:g} "
        f"to {config.diffusion.sigma_max:g}",
        "text": f"{config.text.get('encoder', 'none')}, {config.text.get('max_tokens', 0)} tokens",
        "sampling": ", ".join(f"{k} {v}" for k, v in config.sampling.items()) or defaults,
        "weights": f"sha256 {config.sha256}",
    }
    if config.latent:
        rows["latents"] = f"of {config.latent.get('autoencoder')}; resolutions are sides of latents"
    for name, value in rows.items():
        facts.add_row(Text(name, style="dim"), value)
    sizes = table_of("parameters", "")
    for name, n in parts.items():
        sizes.add_row(name, f"{n:,}")
    sizes.add_row("all", f"{sum(parts.values()):,}", style="bold")
    lineage = Table(box=None, show_header=False, pad_edge=False)
    for i, entry in enumerate(config.lineage, 1):
        lineage.add_row(str(i), ", ".join(f"{k} {_shown(v)}" for k, v in entry.items()))
    return Group(facts, Text(), sizes, Text(), Text("lineage", style="dim"), lineage)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {v}" for k, v in value.items()) + ")"
    if type(value) is int:
        return f"{value:,}"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)  # hashes are shortened


def inspection_tables(found: Inspection, cut: Cut | None = None) -> RenderableType:
    """The tables of `pixelgrow data`; `cut`: the captions that a recipe's text encoder cuts."""
    facts = table_of(f"{found.name} ({found.kind})", "")
    facts.add_row("images", f"{found.files:,}")
    facts.add_row(f"usable {'images' if found.classes else 'image-caption pairs'}", f"{found.samples:,}")
    lost = sum(bad.samples for bad in found.bad)
    facts.add_row(f"bad or lost (headers of all, {found.decoded:,} decoded)", f"{lost:,}")
    for passed in found.passed:
        facts.add_row(Text(f"passed over: {passed.reason} (such as {passed.example})"), f"{passed.count:,}")
    for note, n in found.notes:
        facts.add_row(note, f"{n:,}")
    if not found.classes:
        facts.add_row(f"distinct captions among {found.captions:,}", f"{found.distinct:,}")
        facts.add_row("words in a caption", _spread(found.words))
        facts.add_row("characters in a caption", _spread(found.characters))
    facts.add_row("cropped to a square, an image loses on average", f"{100 * found.squared:.1f}%")
    if cut is not None:
        limit = f"captions cut by the recipe's text encoder, after {cut.max_tokens} tokens"
        facts.add_row(limit, f"{cut.captions:,} of {cut.total:,}")
    sides = table_of("smaller side", "images")
    for low, n in found.sides:
        sides.add_row(f"{low} to {2 * low - 1} px", f"{n:,}")
    stages = table_of("a stage at", "")
    for (h, w), account in found.stages:
        stages.add_row(f"{h}x{w}", Text(account.line()))
    buckets: list[RenderableType] = [part for table in _buckets(found) for part in (Text(), table)]
    guess = [Text(f"note: {found.guess}"), Text()] if found.guess else []
    parts: list[RenderableType] = [*guess, facts, Text(), sides, Text(), stages, *buckets]
    if found.classes:
        classes = table_of("label", "class", "images")
        for label, (name, n) in enumerate(found.classes):
            classes.add_row(str(label), name, f"{n:,}")
        parts += [Text(), classes]
    if found.bad:
        bad = table_of("bad or lost", "samples", "such as")
        for reason in found.reasons():
            bad.add_row(Text(reason.text), f"{reason.samples:,}", Text(reason.example))
        parts += [Text(), bad]
    if found.sheet is not None:
        parts += [Text(), Text(f"contact sheet: {found.sheet}, from {found.shown[0]} to {found.shown[1]}")]
    return Group(*parts)


def _buckets(found: Inspection) -> list[Table]:
    """For each stage with buckets: what is in them."""
    tables = []
    for (h, w), account in found.stages:
        if account.buckets:
            table = table_of(f"bucket of a stage at {h}x{w}", "images", "cropped")
            for size, (count, lost) in account.buckets.items():
                table.add_row(size, f"{count:,}", f"{100 * lost:.1f}%")
            table.add_row("all", f"{sum(n for n, _ in account.buckets.values()):,}", f"{100 * account.cropped:.1f}%")
            tables.append(table)
    return tables


def _spread(lengths: Lengths) -> str:
    return f"{lengths.least} to {lengths.most}, median {lengths.median}, 95% up to {lengths.p95}"


def show(*parts: object) -> None:
    """Print tables and lines."""
    shown = sys.stdout.isatty()  # markup and emoji off: [a] and :cat: may be parts of file names
    console = Console(soft_wrap=not shown, width=None if shown else 200, markup=False, emoji=False)
    for part in parts:
        console.print(part)
