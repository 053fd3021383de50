"""The `evaluate` stage: samples of held-out prompts, the checker's scores (scenes only), and held-out error.

Images are sampled and measured batch by batch, so the memory used does not grow with their number.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixelgrow import checkpoint
from pixelgrow.data.loader import to_tensor
from pixelgrow.data.scenes.checker import accuracy
from pixelgrow.data.scenes.seeing import View, look
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.generator import Generator
from pixelgrow.diffusion.heldout import denoising_error
from pixelgrow.diffusion.sampling import Samples, generate, sample, slices
from pixelgrow.model import DEFAULTS, noise_grid, one_step_settings
from pixelgrow.models.layers import details
from pixelgrow.pictures import to_uint8
from pixelgrow.recipe.stages import EvaluateStage
from pixelgrow.stages.materials import Examples, Materials
from pixelgrow.stages.train import Parent, write_prompts
from pixelgrow.training.log import Display
from pixelgrow.training.monitor import Seams, peak_memory, save_grid
from pixelgrow.writing import write_json

SHOWN = 64  # images of the grid
logger = logging.getLogger(__name__)


def evaluate_stage(stage: EvaluateStage, parent: Parent, folder: Path, materials: Materials) -> dict[str, Any]:
    """Run an `evaluate` stage: writes `metrics.json` and `samples/grid.png`; returns the metrics.

    Its `details`: mean square of x - up(down(x)) over 2 x 2 pixels, of the samples and of the held-out images.
    """
    one_step = parent.config.objective == "generate"
    load: Any = checkpoint.load_generator if one_step else checkpoint.load
    model: Denoiser | Generator = load(parent.folder, materials.device)[0]
    side = model.resolution
    held = materials.heldout(stage.prompts, (side, side))
    if len(held.captions) < stage.prompts:
        logger.warning("%s: got %d held-out prompts, expected %d", stage.name, len(held.captions), stage.prompts)
    size = (materials.factor * side, materials.factor * side)
    materials.sees(stage.name, materials.data.prompts(stage.prompts, size, len(held.bad)))
    materials.encode(stage.name, held.captions)
    seed = materials.recipe.seed
    keywords: dict[str, Any] = {"size": (side, side), "seed": seed, "batch": stage.batch}
    if isinstance(model, Generator):
        settings = one_step_settings(parent.config, stage.given)
        samples_of: Callable[..., Samples] = partial(generate, model, **keywords, **settings)
    else:
        settings = DEFAULTS | parent.config.sampling | stage.given
        levels = noise_grid(settings.get("grid", "karras"), model, parent.config)
        samples_of = partial(sample, model, **keywords, **(settings | {"grid": levels}))
    seams, views, shown = Seams(materials.patches(model)), list[View](), list[Tensor]()
    errors: dict[float, float] = {}
    detail: dict[str, float] = {}
    questions, seconds, nfe, n = _questions(held), 0.0, 0, len(held)
    with Display(f"{materials.recipe.name}/{stage.name}", n, 0) as display:
        for rows in slices(n, stage.batch):
            numbers, cond = range(rows.start, rows.stop), materials.cond(held.captions[rows])
            began = time.perf_counter()
            samples = samples_of(cond, index=numbers)
            images = materials.decode(samples.images)
            pixels = to_uint8(images)
            seconds, nfe = seconds + time.perf_counter() - began, samples.nfe
            seams.add(images)
            if rows.start < SHOWN:
                shown.append(images[: SHOWN - rows.start].to("cpu", copy=True))
            if images.shape[-1] % 2 == 0:
                of = {"samples": images, "images": to_tensor(np.stack(held.pixels[rows]))}
                found = {k: details(x, 2).square().mean().item() for k, x in of.items()}
                detail = {k: detail.get(k, 0.0) + v * len(numbers) / n for k, v in found.items()}
                del of
            views += map(look, pixels if questions else ())
            if isinstance(model, Denoiser):
                held_images = held.batch(rows).to(materials.device)
                by_level = denoising_error(model, held_images, cond, scale=model.noise_scale, seed=seed, index=numbers)
                errors = {level: errors.get(level, 0.0) + e * len(numbers) / n for level, e in by_level.items()}
            del samples, images  # before the next ones are made
            display.update(rows.stop)
    metrics: dict[str, Any] = {
        "prompts": n,
        "bad_files": [f"{source.name}: {file.key}: {file.reason}" for source, file in held.bad],
        "sampling": settings,
        "nfe": nfe,
        "seconds_per_image": round(seconds / n, 5),
        "seams": seams.ratios(),
        "peak_memory": peak_memory(materials.device),
    }
    if detail:
        metrics["details"] = detail
    if errors:
        metrics["error"] = {f"{sigma:g}": error for sigma, error in errors.items()}
    if questions:
        metrics["accuracy"] = accuracy(views, questions)
        logger.info("checker: %s", ", ".join(f"{k} {100 * v:.1f}%" for k, v in metrics["accuracy"].items()))
    save_grid(torch.cat(shown), folder / "samples" / "grid.png")
    write_prompts(folder, held.captions[:SHOWN])
    write_json(folder / "metrics.json", metrics)
    return metrics


def _questions(held: Examples) -> list[Any]:
    """The checker's questions for each prompt; empty unless all prompts are of scenes."""
    found = [source.scene(i).questions for source, i in held.origins if isinstance(source, Scenes)]
    return found if len(found) == len(held.captions) else []
