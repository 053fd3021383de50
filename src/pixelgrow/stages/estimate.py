"""The `estimate` stage: train an estimator of the guidance weight that an image was sampled with."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelgrow import checkpoint, rng
from pixelgrow.data.account import Account
from pixelgrow.errors import UserError
from pixelgrow.onestep.estimator import (
    FACTS,
    PART,
    EstimateObjective,
    Estimator,
    batches_of,
    described,
    save_estimator,
)
from pixelgrow.onestep.features import TeacherFeatures
from pixelgrow.onestep.pairs import Pairs
from pixelgrow.onestep.stream import caption
from pixelgrow.recipe.stages import EstimateStage
from pixelgrow.stages.materials import Materials
from pixelgrow.stages.train import Parent
from pixelgrow.training import loop
from pixelgrow.training.monitor import Hook
from pixelgrow.writing import write_json

HELD = 10  # one pair in ten is held out: the last ones
logger = logging.getLogger(__name__)


def estimate_stage(stage: EstimateStage, parent: Parent, folder: Path, materials: Materials) -> dict[str, Any]:
    """Run or resume an `estimate` stage; returns the numbers of its run."""
    made, settings = materials.pairs_of(stage), stage.training()
    pairs, mixture = Pairs(made.folder), materials.data.mixture(made.stage)
    pairs.check([parent.config.sha256], mixture.describe())
    # The recipe has been checked for these.
    assert pairs.distribution is not None and pairs.images is not None and pairs.guidance is not None
    if len(pairs) < 2:
        raise UserError(f"stage {stage.name!r}: {stage.pairs} has {len(pairs)} pair, expected 2 or more; raise its n:")
    kept = len(pairs) - max(1, len(pairs) // HELD)
    materials.sees(stage.name, Account(len(pairs), {"held out": len(pairs) - kept}, "pairs"))
    texts = [caption(mixture.sources, origin) for origin in pairs.origins]
    materials.encode(stage.name, texts)
    features = TeacherFeatures(checkpoint.load(parent.folder, materials.device)[0])
    logger.info("%s: extracting the teacher's features of %d images", stage.name, len(pairs))
    every = [range(at, min(at + settings.micro_batch, len(pairs))) for at in range(0, len(pairs), settings.micro_batch)]

    def describe(rows: range) -> Tensor:
        assert pairs.images is not None
        cond = materials.text.cond([texts[n] for n in rows]).to(materials.device)
        return described(features, pairs.images[rows].float().to(materials.device), cond).cpu()

    descriptions = torch.cat(materials.team.share(every, describe))
    seed = rng.seed_of(materials.recipe.seed, "stage", stage.name)
    known, held = pairs.guidance[:kept], pairs.guidance[kept:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of(seed, "weights"))
        estimator = Estimator(descriptions.shape[1], pairs.distribution)
    estimator.standardise(descriptions[:kept])
    estimator = estimator.to(materials.device)

    def error(of: Tensor, truth: Tensor) -> float:
        estimate = estimator(of.to(materials.device)).float().cpu()
        return float((estimate - truth).square().mean().sqrt())

    def validate(_: int) -> dict[str, float]:
        rmse = error(descriptions[kept:], held)
        return {"rmse": rmse, "share": rmse / estimator.spread.std}

    result = loop.train(
        EstimateObjective(estimator),
        lambda start, step: batches_of(descriptions[:kept], known, settings.micro_batch, seed, start, step),
        settings,
        folder,
        seed=seed,
        hooks=[Hook("validation", settings.validate_every or 0, validate, at_start=True)],
        name=f"{materials.recipe.name}/{stage.name}",
        team=materials.team,
    )
    estimator.eval()
    averages = result.averages[PART]

    def write() -> float:
        with averages[0].applied() if averages else nullcontext(), torch.no_grad():
            rmse = error(descriptions[kept:], held)
            facts = save_estimator(folder, estimator, parent.config.sha256, rmse)
        write_json(folder / FACTS, facts)
        return rmse

    rmse = materials.team.alone(write)
    deviation = estimator.spread.std
    logger.info("%s: held-out RMSE %.3g of the weight; a constant guess has %.3g", stage.name, rmse, deviation)
    return {
        "images": result.images,
        "pairs": len(pairs),
        "skipped_steps": result.skipped,
        "seconds": round(result.seconds, 1),
        "images_per_second": result.images_per_second,
        "heldout_rmse": rmse,
        "guidance_deviation": deviation,
    }
