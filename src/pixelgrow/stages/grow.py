"""The `grow` stage: grow a parent checkpoint to a higher resolution (`start/`, `growth.json`), then train it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from pixelgrow import checkpoint
from pixelgrow.data.buckets import Shapes
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.sampling import sample
from pixelgrow.growth import freeze, grow
from pixelgrow.models.cond import Cond
from pixelgrow.recipe.stages import GrowStage
from pixelgrow.stages import looks
from pixelgrow.stages.materials import Materials
from pixelgrow.stages.train import WATCHED, Parent, fit, guided_batch, save
from pixelgrow.training import state
from pixelgrow.training.monitor import save_grid
from pixelgrow.training.unfinished import FROZEN, START
from pixelgrow.writing import read_json, write_json

REPORT, RESULT = "growth.json", "result.json"
logger = logging.getLogger(__name__)


def grow_stage(stage: GrowStage, parent: Parent, folder: Path, materials: Materials) -> dict[str, Any]:
    """Run or resume a `grow` stage; returns the numbers of its run.

    `unfreeze_after` is one training run, as in the paper (arXiv 2405.16759): one learning-rate schedule over `images`
    and one stream of data; weights, averages and optimizer state are carried on. The paper does not say how the core
    starts to train. Ours: with an empty optimizer state, at the rate of the schedule.
    """
    team = materials.team
    growth = team.alone(lambda: read_json(folder / REPORT) or make_start(stage, parent, folder, materials))
    loaded = list(growth["frozen"])
    entry = lineage_entry(stage, parent, growth, materials)
    lineage = [*parent.config.lineage, entry]
    denoiser, _ = checkpoint.load(folder / START)
    if stage.unfreeze_after is None:
        freeze(denoiser.net, loaded)
        return fit(denoiser, stage, stage.training(), folder, materials, lineage)
    # The second phase is a new model that loads the state of the first: no hook or optimizer of the first is reused.
    frozen, stop_at = folder / FROZEN, stage.unfreeze_after
    began, first = team.alone(lambda: (_second_phase(folder, stop_at), read_json(frozen / RESULT)))
    if first is None or not began:
        freeze(denoiser.net, loaded)
        alone = [*parent.config.lineage, entry | {"images": stop_at}]
        first = fit(denoiser, stage, stage.training(), frozen, materials, alone, stop_at=stop_at)
        if team.first:
            write_json(frozen / RESULT, first)
        denoiser, _ = checkpoint.load(folder / START)
    lineage = [*parent.config.lineage, entry | {"unfrozen_after": stop_at}]
    second = fit(denoiser, stage, stage.training(), folder, materials, lineage, after=frozen)
    if team.first:
        state.clear(frozen / "state")
    return second | {"phases": [first, second]}


def _second_phase(folder: Path, stop_at: int) -> bool:
    """Whether the states on the disk are those that the second phase, or its start, goes on from."""
    return bool(state.newest(folder / "state") or state.newest(folder / FROZEN / "state") >= stop_at)


def lineage_entry(stage: GrowStage, parent: Parent, growth: dict[str, Any], materials: Materials) -> dict[str, Any]:
    """The lineage's entry for a growth, of denoisers and generators alike."""
    return {
        "stage": stage.name,
        "verb": "grow",
        "recipe": materials.recipe.name,
        "init": stage.init,
        "from": parent.config.network.resolution,
        "to": stage.to[-1],
        "tensors": {k: len(growth[k]) for k in ("loaded", "new", "dropped", "frozen")},
        "images": stage.images,
        "parent": parent.config.sha256,
    }


def make_start(stage: GrowStage, parent: Parent, folder: Path, materials: Materials) -> dict[str, Any]:
    """Write `start/`, the grown model before its first step, `growth.json`, and samples of parent and grown model."""
    before, _ = checkpoint.load(parent.folder, materials.device)
    stride = before.net.config.stride * stage.to[-1] // before.resolution
    held = materials.heldout(WATCHED, Shapes((stage.to[-1], stage.to[-1]), stride))
    cond = materials.cond(held.captions)
    images = [image.to(materials.device) for image in held.images]
    model, report = grow(
        before,
        stage.to,
        stage.init,
        images=images,
        cond=cond,
        seed=materials.recipe.seed,
        patch=stage.patch,
        blocks=stage.blocks,
        exact=stage.exact,
        until=stage.until,
        batch=stage.micro_batch,
    )
    frozen = [] if stage.trains_core else report.loaded
    prompts = looks.prompts_of(materials, held).cond
    sample_both(folder, before, model, prompts, materials.recipe.seed, guided_batch(stage), materials.decode)
    save(folder / START, model, materials, parent.config.lineage)
    summary = report.to_dict() | {"frozen": frozen}
    write_json(folder / REPORT, summary)
    logger.info("%s", describe(summary))
    return summary


def sample_both(
    folder: Path,
    before: Denoiser,
    after: Denoiser,
    cond: Cond,
    seed: int,
    batch: int = 16,
    decode: Callable[[Tensor], Tensor] = lambda images: images,
) -> None:
    """Write `before.png` and `after.png`: samples of a parent and of the grown model, of the same prompts and noise.

    `decode`: the models' images to pixels.
    """
    for name, denoiser in (("before", before), ("after", after)):
        found = sample(
            denoiser,
            cond[: looks.GRID],
            size=(denoiser.resolution, denoiser.resolution),
            seed=seed,
            steps=looks.GRID_STEPS,
            guidance=looks.GRID_GUIDANCE,
            batch=batch,
        )
        save_grid(decode(found.images).cpu(), folder / f"{name}.png")


def _kept(growth: dict[str, Any]) -> str:
    return ", the same before and after: preserve keeps the function" if growth["init"] == "preserve" else ""


def describe(growth: dict[str, Any]) -> str:
    """The growth in a few lines, for the terminal."""
    low, high = growth["resolution"]
    counts = ", ".join(f"{len(growth[k])} {k}" for k in ("loaded", "new", "dropped", "frozen") if k in growth)
    size = growth["parameters"]
    gate = f" until sigma {growth['until']:g} at the core" if growth.get("until") else ""
    exact = f", exact{gate}" if growth.get("exact") else ""
    lines = [
        f"grown from {low} to {high} px ({growth['init']}{exact}): {counts} tensors; "
        f"{size['loaded']:,} parameters loaded, {size['new']:,} new",
        *([f"held-out error by noise level at the core{_kept(growth)}:"] if growth["before"] else []),
    ]
    after = {float(k): v for k, v in growth["after"].items()}
    for sigma, error in growth["before"].items():
        lines.append(f"  sigma {float(sigma):<6g} before {error:.5f}  after {after[float(sigma)]:.5f}")
    return "\n".join(lines)


__all__ = ["REPORT", "describe", "grow_stage", "lineage_entry", "make_start", "sample_both"]
