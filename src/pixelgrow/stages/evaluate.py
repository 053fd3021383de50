"""The `evaluate` stage: held-out prompts drawn, scenes looked at by the checker, held-out error by noise level."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from pixelgrow import checkpoint
from pixelgrow.data.scenes.checker import score
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.generator import Generator
from pixelgrow.diffusion.heldout import denoising_error
from pixelgrow.diffusion.sampling import generate, sample
from pixelgrow.model import DEFAULTS, noise_grid, one_step_settings
from pixelgrow.pictures import to_uint8
from pixelgrow.recipe.stages import EvaluateStage
from pixelgrow.stages.materials import HeldOut, Materials
from pixelgrow.stages.record import write_json
from pixelgrow.stages.train import Parent, write_prompts
from pixelgrow.training.monitor import peak_memory, save_grid, seams

SHOWN = 64  # pictures of the grid
logger = logging.getLogger(__name__)


def evaluate_stage(stage: EvaluateStage, parent: Parent, folder: Path, materials: Materials) -> dict[str, Any]:
    """Run an `evaluate` stage: writes `metrics.json` and `samples/grid.png`; returns the metrics."""
    one_step = parent.config.objective == "generate"
    load: Any = checkpoint.load_generator if one_step else checkpoint.load
    model: Denoiser | Generator = load(parent.folder, materials.device)[0]
    side = model.resolution
    held = materials.heldout(stage.prompts, (side, side))
    if len(held.captions) < stage.prompts:
        logger.warning("%s: %d held-out prompts, of %d asked for", stage.name, len(held.captions), stage.prompts)
    cond = materials.cond(held.captions)
    began = time.perf_counter()
    settings: dict[str, Any] = {}
    if isinstance(model, Generator):
        settings = one_step_settings(parent.config, stage.given)
        drawn = generate(model, cond, size=(side, side), seed=materials.recipe.seed, batch=stage.batch, **settings)
    else:
        settings = DEFAULTS | parent.config.sampling | stage.given
        drawn = sample(
            model,
            cond,
            size=(side, side),
            seed=materials.recipe.seed,
            batch=stage.batch,
            progress=_note,
            **(settings | {"grid": noise_grid(settings.get("grid", "karras"), model, parent.config)}),
        )
    images = materials.pictures(drawn.images).cpu()
    metrics: dict[str, Any] = {
        "prompts": len(held.captions),
        "bad_files": [f"{source.name}: {file.key}: {file.reason}" for source, file in held.bad],
        "sampling": settings,
        "nfe": drawn.nfe,
        "seconds_per_image": round((time.perf_counter() - began) / len(images), 5),
        "seams": seams(images, materials.patches(model)),
        "peak_memory": peak_memory(materials.device),
    }
    if isinstance(model, Denoiser):
        errors = denoising_error(
            model,
            held.images.to(materials.device),
            cond,
            scale=model.noise_scale,
            seed=materials.recipe.seed,
            batch=stage.batch,
        )
        metrics["error"] = {f"{sigma:g}": error for sigma, error in errors.items()}
    if questions := _questions(held):
        metrics["accuracy"] = score(list(to_uint8(images)), questions)
        logger.info("checker: %s", ", ".join(f"{k} {100 * v:.1f}%" for k, v in metrics["accuracy"].items()))
    save_grid(images[:SHOWN], folder / "samples" / "grid.png")
    write_prompts(folder, held.captions[:SHOWN])
    write_json(folder / "metrics.json", metrics)
    return metrics


def _questions(held: HeldOut) -> list[Any]:
    """The checker's questions for each prompt; none unless all of them are scenes."""
    found = [source.scene(i).questions for source, i in held.origins if isinstance(source, Scenes)]
    return found if len(found) == len(held.captions) else []


def _note(done: int, total: int) -> None:
    if done == total or done % max(1, total // 4) == 0:
        logger.info("drawing: %d of %d steps", done, total)
