"""Running a recipe: what is missing is done, what was cut off goes on, what changed is refused."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pixelgrow import checkpoint
from pixelgrow.errors import UserError, out_of_memory
from pixelgrow.model import find
from pixelgrow.onestep.estimator import FACTS
from pixelgrow.onestep.pairs import INDEX
from pixelgrow.plan.shapes import networks, parent_network
from pixelgrow.recipe.stages import (
    DistillStage,
    EstimateStage,
    GrowStage,
    ModelStage,
    PairsStage,
    Recipe,
    Stage,
    TrainedStage,
    TrainStage,
    is_folder,
    makes_generator,
)
from pixelgrow.report.report import write_report
from pixelgrow.stages.distill import distill_stage, grow_generator_stage
from pixelgrow.stages.estimate import estimate_stage
from pixelgrow.stages.evaluate import evaluate_stage
from pixelgrow.stages.grow import grow_stage
from pixelgrow.stages.materials import Materials
from pixelgrow.stages.pairs import pairs_stage
from pixelgrow.stages.record import Record
from pixelgrow.stages.train import Parent, read_parent, train_stage
from pixelgrow.training import state
from pixelgrow.training.log import duration
from pixelgrow.training.monitor import reset_peak
from pixelgrow.writing import going_on, writing

logger = logging.getLogger(__name__)
PATIENCE = 5.0  # seconds: workers of a run that was killed hold its lock until they see that it has gone


def run(recipe: Recipe, root: Path = Path("runs")) -> Path:
    """Run every stage of a recipe in `root/<name>/` that is not done; returns the path of the report.

    Raises UserError for whatever the user can mend, and `training.loop.Interrupted` where it was asked to stop.
    """
    folder = root / recipe.name
    with locked(folder):
        materials = Materials(recipe, folder)
        records = {stage.name: Record(folder / stage.name) for stage in recipe.stages}
        for stage in recipe.stages:  # before any work: a change in the last stage is no surprise after the first
            explain = partial(materials.data.explain, folder, stage)
            records[stage.name].check(materials.describe(stage), free=stage.free, explain=explain)
        _warn_of_gone(recipe, records)
        nets = networks(recipe)
        for stage in recipe.stages:
            if not records[stage.name].done:
                if stage.parent is not None and is_folder(stage.parent):
                    read_parent(find(stage.parent), materials)
                materials.check(stage, (nets.get(stage.name) or parent_network(str(stage.parent), nets)).resolution)
        for number, stage in enumerate(recipe.stages, 1):
            record = records[stage.name]
            where = f"stage {number} of {len(recipe.stages)}, {stage.name}"
            parent = _parent(stage, materials)
            settings = materials.describe(stage)
            parents = {} if parent is None else {str(stage.parent): parent.config.sha256}
            if isinstance(stage, DistillStage | GrowStage | EstimateStage) and stage.pairs is not None:
                parents[stage.pairs] = checkpoint.file_hash(folder / stage.pairs / INDEX)
            if isinstance(stage, DistillStage | GrowStage) and stage.estimator is not None:
                parents[stage.estimator] = checkpoint.file_hash(folder / stage.estimator / FACTS)
            record.check(settings, parents, stage.free, partial(materials.data.explain, folder, stage))
            if record.done:
                logger.info("%s: done before", where)
                continue
            logger.info("%s: %s", where, "going on" if record.values else "starting")
            materials.data.list_samples(folder, stage)
            _warn_of_micro_batches(stage, record)
            record.begin(settings, parents)
            reset_peak(materials.device)
            began = time.monotonic()
            before = float(record.values.get("wall_seconds", 0))
            materials.note = record.note
            try:
                with going_on():
                    result = _execute(stage, parent, folder / stage.name, materials)
            except Exception as error:
                if out_of_memory(error):
                    reason = str(error).partition("\n")[0][:120]
                    raise UserError(f"{where}: out of memory ({reason}): {less_memory(stage)}") from error
                raise
            finally:  # also of a start that is stopped
                seconds = before + time.monotonic() - began
                record.write({**record.values, "wall_seconds": round(seconds, 1)})
            record.finish(result=result)
            state.clear(folder / stage.name / "state")
            logger.info("%s: done in %s", where, duration(seconds))
            if report := result.get("bad_files") and result.get("bad_report"):
                logger.warning("%s: %s", where, report)
        return write_report(recipe, folder)


def _warn_of_gone(recipe: Recipe, records: Mapping[str, Record]) -> None:
    """Warn, before anything is trained, of stages that were made from one whose folder is missing."""
    for stage in recipe.stages:
        for name in records[stage.name].values.get("parents", {}):
            if name in records and not records[name].values:
                logger.warning(
                    "stage %s depends on %s, whose folder is missing; if its new weights differ, %s will be refused: "
                    "delete %s to redo it",
                    stage.name, name, stage.name, records[stage.name].folder,
                )  # fmt: skip


def _warn_of_micro_batches(stage: Stage, record: Record) -> None:
    """A denoiser's gradient is a mean over images, however they are split; some terms of a generator's are not."""
    if not (isinstance(stage, ModelStage) and makes_generator(stage)):
        return
    was = record.values.get("settings", {}).get("accumulate", stage.accumulate)
    if was != stage.accumulate:
        logger.warning(
            "%s: accumulate was %s, now %s: each micro-batch has an adaptive weight, mismatched captions and a step of "
            "spectral norm of its own, so the result differs a little from that of a run without the change",
            stage.name, was, stage.accumulate,
        )  # fmt: skip


def less_memory(stage: Stage) -> str:
    """What to add to the command so that a stage needs less memory and goes on from what it saved."""
    at, options = f"--set stages.{stage.name}", []
    if isinstance(stage, TrainedStage):
        more = next((n for n in range(stage.accumulate + 1, stage.batch + 1) if stage.batch % n == 0), None)
        if more:
            options.append(f"{at}.accumulate={more} (micro-batches of {stage.batch // more} images)")
        if not stage.activation_checkpointing and not isinstance(stage, EstimateStage):
            options.append(f"{at}.activation_checkpointing=true (slower)")
    else:
        whole = stage.shard if isinstance(stage, PairsStage) else 0  # a shard is made of whole batches
        less = next((n for n in range(stage.batch // 2, 0, -1) if whole % n == 0), None)
        if less:
            options.append(f"{at}.batch={less}")
    if not options:
        return "the stage computes one image at a time already: use a device with more memory"
    return f"what was saved is kept: run the same command again with {', or '.join(options)}"


def _execute(stage: Stage, parent: Parent | None, folder: Path, materials: Materials) -> dict[str, Any]:
    if isinstance(stage, TrainStage):
        return train_stage(stage, parent, folder, materials)
    assert parent is not None
    if isinstance(stage, DistillStage):
        return distill_stage(stage, parent, folder, materials)
    if isinstance(stage, GrowStage):
        grow = grow_generator_stage if parent.config.objective == "generate" else grow_stage
        return grow(stage, parent, folder, materials)
    if isinstance(stage, PairsStage):
        return pairs_stage(stage, parent, folder, materials)
    if isinstance(stage, EstimateStage):
        return estimate_stage(stage, parent, folder, materials)
    return evaluate_stage(stage, parent, folder, materials)


def _parent(stage: Stage, materials: Materials) -> Parent | None:
    if stage.parent is None:
        return None
    path = materials.checkpoint(stage.parent)
    checkpoint.recover(path)
    return read_parent(path, materials)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder against a second run; the lock goes with the process and its workers, however they end.

    Raises UserError if it is still held after `PATIENCE`.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    with file:
        patience = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > patience:
                    file.seek(0)
                    raise UserError(
                        f"{folder} is in use by process {file.read().strip() or '?'}: wait, or give the recipe another "
                        "name"
                    ) from error
                time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
