"""Tables of a plan for a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from pixelgrow.report.tables import table_of, time_of
from pixelgrow.writing import size_of

if TYPE_CHECKING:
    from pixelgrow.plan.cluster import Disk, Placed
    from pixelgrow.plan.gpus import Cluster
    from pixelgrow.plan.layout import Layout
    from pixelgrow.plan.text import TextPlan


def cluster_tables(cluster: Cluster, stages: Sequence[Placed], disks: Sequence[Disk]) -> RenderableType:
    """Layouts and times; memory of one GPU; disks; the settings to write."""
    title = f"{cluster.gpus} x {cluster.name}, {cluster.gpu.memory / 2**30:.0f} GiB each"
    work = table_of(
        title, "pixels", "layout", "micro-batch", "accumulate", "checkpointing", "images/s", "time", "CPU cores"
    )
    memory = table_of(
        "memory of a GPU", "weights", "gradients", "optimizer", "averages", "activations", "bf16 weights",
        "reduce buffers", "peak",
    )  # fmt: skip
    faults = []
    for p in stages:
        name = f"{p.name}: {p.what}"
        if p.layout is None:
            faults.append(Text(f"{name} does not fit: {p.fault}"))
            continue
        at, m = p.layout, p.layout.memory
        mode = {"False": "none", "True": "full"}.get(str(at.checkpointing), "selective")
        work.add_row(
            name, str(p.resolution), str(at), str(at.micro_batch), str(at.accumulate), mode,
            f"{p.images_per_second:,.0f}", time_of(p.seconds), str(p.cores or ""),
        )  # fmt: skip
        parts = (m.weights, m.gradients, m.optimizer, m.averages, m.activations, m.compute, m.buffers, m.peak)
        memory.add_row(name, *map(size_of, parts))
    files = table_of("disk", "states, while it trains", "kept")
    for disk in disks:
        files.add_row(disk.name, size_of(disk.states), size_of(disk.kept))
    note = (
        f"Time at an MFU of {cluster.mfu:g}: that share of {cluster.gpu.flops / 1e12:.0f} TFLOP/s a GPU (dense "
        "bfloat16), what checkpointing computes again included; pairs in TF32. CPU cores: of all "
        "machines together, to decode as fast as the GPUs train."
    )
    notes = [Text(note, style="dim")]
    if flags := settings_of(stages):
        notes.insert(0, Text("settings: " + " ".join(f"--set {flag}" for flag in flags)))
    parts_shown: list[RenderableType] = [work, *faults, Text(), memory, Text(), files, Text(), *notes]
    return Group(*parts_shown)


def settings_of(stages: Sequence[Placed]) -> list[str]:
    """The settings of the layouts, as `--set` takes them: one for a recipe, or for a stage of several phases, as the
    stage or the phase needs it that takes most."""
    trained: dict[str, Layout] = {}
    for p in stages:
        if p.layout is not None and p.trains:
            trained[p.name] = max(trained.get(p.name, p.layout), p.layout, key=lambda at: at.accumulate)
    if not trained:
        return []
    flags = [f"parallel.shard={max(at.shard for at in trained.values())}"]
    for name, at in trained.items():
        flags.append(f"stages.{name}.accumulate={at.accumulate}")
        flags.append(f"stages.{name}.activation_checkpointing={str(at.checkpointing).lower()}")
    return flags


def encoder_line(text: TextPlan) -> Text:
    """What the memory of a GPU holds of a text encoder."""
    if not text.online:
        return Text("")
    if not text.resident:
        return Text(
            "The encoder, which is not on this machine, takes memory of each GPU beside that: it is not counted."
        )
    return Text(f"The encoder takes {size_of(text.resident)} of each GPU beside that.")
