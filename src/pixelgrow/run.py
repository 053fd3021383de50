"""Running a recipe: missing stages run, unfinished ones resume, changed ones are refused."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pixelgrow import checkpoint
from pixelgrow.distributed import Team
from pixelgrow.errors import UserError, out_of_memory
from pixelgrow.model import RECORD, find
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
from pixelgrow.stages.materials import Materials, shapes_of
from pixelgrow.stages.pairs import pairs_stage
from pixelgrow.stages.record import Record
from pixelgrow.stages.train import Parent, read_parent, train_stage
from pixelgrow.training import state
from pixelgrow.training.log import duration
from pixelgrow.training.monitor import reset_peak
from pixelgrow.training.stopping import Interrupted
from pixelgrow.writing import going_on, writing

logger = logging.getLogger(__name__)
PATIENCE = 5.0  # seconds: workers of a killed run hold its lock until they notice


def run(recipe: Recipe, root: Path = Path("runs"), team: Team | None = None) -> Path:
    """Run every stage of a recipe in `root/<name>/` that is not done; returns the path of the report.

    team: the processes that run it, each of which calls this function; the first writes.
    Raises UserError for what the user can fix, and `training.loop.Interrupted` when a signal stops it.
    """
    folder, team = root / recipe.name, team or Team()
    with ExitStack() as stack:
        if team.first:
            stack.enter_context(locked(folder))
        materials = Materials(recipe, folder, team=team)
        records = {stage.name: Record(folder / stage.name, team.first) for stage in recipe.stages}
        team.alone(partial(_check, recipe, materials, records))
        try:
            for number, stage in enumerate(recipe.stages, 1):
                where = f"stage {number} of {len(recipe.stages)}, {stage.name}"
                _run_stage(stage, records[stage.name], materials, where)
        except Interrupted:
            team.wait()  # for the record of the first process: torchrun ends all when one has ended
            raise
        return team.alone(partial(write_report, recipe, folder))


def _check(recipe: Recipe, materials: Materials, records: Mapping[str, Record]) -> None:
    """Check every stage before any of them runs: settings, networks, parents on disk, data."""
    _check_shares(recipe, materials.team.size, records)
    for stage in recipe.stages:
        explain = partial(materials.data.explain, stage)
        records[stage.name].check(materials.describe(stage), free=stage.free, explain=explain)
    if recipe.text.classes and recipe.preview:
        materials.preview_cond()  # a class may not exist
    _warn_of_missing_parents(recipe, records)
    nets = networks(recipe)
    for stage in recipe.stages:
        if not records[stage.name].done:
            if stage.parent is not None and is_folder(stage.parent):
                read_parent(find(stage.parent), materials)
            network = nets.get(stage.name) or parent_network(str(stage.parent), nets)
            materials.check(stage, shapes_of(stage, network))


def _check_shares(recipe: Recipe, processes: int, records: Mapping[str, Record]) -> None:
    """Raise UserError unless so many processes can share each network, and the micro-batches of each step, evenly."""
    shard = recipe.parallel.shard
    if processes % shard:
        fits = [n for n in range(1, shard) if processes % n == 0]
        raise UserError(
            f"parallel: {shard} processes share a network, and {processes} are not a multiple of {shard}: start "
            f"{shard} or a multiple, or add --set parallel.shard={fits[-1]}"
        )
    settings, uneven = [], []
    for stage in recipe.stages:
        if isinstance(stage, TrainedStage) and stage.accumulate % processes and not records[stage.name].done:
            uneven.append(f"accumulate of {stage.name} is {stage.accumulate}")
            more = _shared(stage, processes, stage.accumulate)
            if more is None:
                raise UserError(
                    f"stage {stage.name!r}: {processes} processes cannot share its batch of {stage.batch} images "
                    f"evenly: start as many as divide it, or make it a multiple of {processes}"
                )
            settings.append(f"--set stages.{stage.name}.accumulate={more}")
    if uneven:
        raise UserError(
            f"{processes} processes share the micro-batches of each step, so accumulate must be a multiple of "
            f"{processes}, and {', '.join(uneven)}: add {' '.join(settings)}"
        )


def _shared(stage: TrainedStage, processes: int, least: int) -> int | None:
    """The next number of micro-batches that divides a stage's batch and that so many processes can share."""
    return next((n for n in range(least, stage.batch + 1) if not (n % processes or stage.batch % n)), None)


def _run_stage(stage: Stage, record: Record, materials: Materials, where: str) -> None:
    """Run a stage that is not done. `where`: the stage's number and name, for messages."""
    team = materials.team
    if not team.alone(partial(_begin, stage, record, materials, where)):
        return
    parent = _parent(stage, materials)
    reset_peak(materials.device)
    began = time.monotonic()
    before = float(record.values.get("wall_seconds", 0))
    materials.note = record.note
    try:
        with going_on():
            result = _execute(stage, parent, record.folder, materials)
        team.wait()
    except Exception as error:
        if out_of_memory(error):
            reason = str(error).partition("\n")[0][:120]
            raise UserError(f"{where}: out of memory ({reason}): {less_memory(stage, team.size)}") from error
        raise
    finally:  # a run that is stopped counts too
        seconds = before + time.monotonic() - began
        record.write({**record.values, "wall_seconds": round(seconds, 1)})
    if team.first:
        record.finish(result=result)
        state.clear(record.folder / "state")
    logger.info("%s: done in %s", where, duration(seconds))
    if report := result.get("bad_files") and result.get("bad_report"):
        logger.warning("%s: %s", where, report)


def _begin(stage: Stage, record: Record, materials: Materials, where: str) -> bool:
    """Check a stage, and write down that it begins; False if it is done."""
    settings, parents = materials.describe(stage), _hashes(stage, _parent(stage, materials), materials)
    record.check(settings, parents, stage.free, partial(materials.data.explain, stage))
    if record.done:
        logger.info("%s: already done", where)
        return False
    logger.info("%s: %s", where, "resuming" if record.values else "starting")
    materials.data.list_samples(stage)
    _warn_of_micro_batches(stage, record)
    record.begin(settings, parents)
    return True


def _parent(stage: Stage, materials: Materials) -> Parent | None:
    return None if stage.parent is None else _model(stage.parent, materials)


def _model(name: str, materials: Materials) -> Parent:
    """The model that a stage names: of a stage of this run, or a checkpoint folder."""
    path = materials.checkpoint(name)
    if materials.team.first:
        checkpoint.recover(path)
    if not is_folder(name):
        _need(path / checkpoint.CONFIG, materials.folder / name)
    return read_parent(path, materials)


def _hashes(stage: Stage, parent: Parent | None, materials: Materials) -> dict[str, str]:
    """Hashes of the files that a stage starts from, by the stage or checkpoint folder that made them."""
    folder = materials.folder
    found = {} if parent is None else {str(stage.parent): parent.config.sha256}
    used: list[tuple[str | None, str]] = []
    if isinstance(stage, DistillStage | GrowStage | EstimateStage):
        used.append((stage.pairs, INDEX))
    if isinstance(stage, DistillStage | GrowStage):
        used.append((stage.estimator, FACTS))
    for name, file in used:
        if name is not None:
            _need(folder / name / file, folder / name)
            found[name] = checkpoint.file_hash(folder / name / file)
    if isinstance(stage, PairsStage) and stage.upscales is not None:
        found[stage.upscales] = _model(stage.upscales, materials).config.sha256
    return found


def _need(path: Path, stage: Path) -> None:
    """Raise UserError if a file of a finished stage is missing. `stage`: its folder."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing, though stage {stage.name!r} is done: put it back, or delete {stage / RECORD} and run "
            "the recipe again to make it anew"
        )


def _warn_of_missing_parents(recipe: Recipe, records: Mapping[str, Record]) -> None:
    """Warn of stages that were made from a stage whose folder is missing."""
    for stage in recipe.stages:
        for name in records[stage.name].values.get("parents", {}):
            if name in records and not records[name].values:
                logger.warning(
                    "stage %s depends on %s, whose folder is missing; if its new weights differ, %s will be refused: "
                    "delete %s to redo it",
                    stage.name, name, stage.name, records[stage.name].folder,
                )  # fmt: skip


def _warn_of_micro_batches(stage: Stage, record: Record) -> None:
    """Warn if another `accumulate` changes results: some terms of a generator's loss depend on its micro-batches."""
    if not (isinstance(stage, ModelStage) and makes_generator(stage)):
        return
    was = record.values.get("settings", {}).get("accumulate", stage.accumulate)
    if was != stage.accumulate:
        logger.warning(
            "%s: accumulate was %s, now %s: each micro-batch has its own adaptive weight and mismatched captions, "
            "so the result differs a little from that of an unchanged run",
            stage.name, was, stage.accumulate,
        )  # fmt: skip


def less_memory(stage: Stage, processes: int = 1) -> str:
    """Options to add to the command of so many processes for a stage that ran out of memory."""
    at, options = f"--set stages.{stage.name}", []
    if isinstance(stage, TrainedStage):
        if more := _shared(stage, processes, stage.accumulate + 1):
            options.append(f"{at}.accumulate={more} (micro-batches of {stage.batch // more} images)")
        if stage.activation_checkpointing is not True and not isinstance(stage, EstimateStage):
            options.append(f"{at}.activation_checkpointing=true (slower)")
    else:
        whole = stage.shard if isinstance(stage, PairsStage) else 0  # a shard holds whole batches
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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder against other runs. The lock ends with this process and its workers, however they end.

    Raises UserError if another run still holds it after `PATIENCE`.
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
