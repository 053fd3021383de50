"""The `train` stage, and the training after a growth: both train a denoiser and write a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from pixelgrow import checkpoint, rng
from pixelgrow.checkpoint import CheckpointConfig
from pixelgrow.data.loader import Loader
from pixelgrow.diffusion.denoiser import Denoiser, NoiseConfig
from pixelgrow.diffusion.generator import Generator
from pixelgrow.errors import UserError
from pixelgrow.models.sizes import core_config, shallow_uvit
from pixelgrow.models.uvit import UViT
from pixelgrow.recipe.stages import ModelStage, TrainStage
from pixelgrow.stages.looks import denoiser_rows, looks_of
from pixelgrow.stages.materials import BAD_FILES, Materials, shapes_of
from pixelgrow.training import loop, unfinished
from pixelgrow.training.denoise import DenoiseObjective, validation_hook
from pixelgrow.training.loop import CHECKPOINT, TrainResult
from pixelgrow.training.monitor import Hook, grid_hook
from pixelgrow.training.settings import TrainSettings
from pixelgrow.writing import writing

WATCHED = 64  # held-out images of the validation loss
SPREAD = 4096  # captions whose tokens are whitened


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a stage starts from."""

    folder: Path
    config: CheckpointConfig


def read_parent(folder: Path, materials: Materials) -> Parent:
    """A parent's configuration. Raises UserError if its text encoder, autoencoder or classes are not the recipe's."""
    config = checkpoint.read_config(folder)
    theirs, ours = config.text.get("fingerprint"), materials.text.fingerprint
    if theirs and theirs != ours:
        spec = materials.recipe.text
        raise UserError(
            f"{folder} was trained with the text encoder {config.text.get('encoder')!r} "
            f"(max_tokens {config.text.get('max_tokens')}), the recipe says {spec.encoder!r} ({spec.max_tokens}): "
            "write the checkpoint's encoder into the recipe's text:"
        )
    if config.latent.get("fingerprint") != materials.latent.get("fingerprint"):
        raise UserError(
            f"{folder} makes {_images(config.latent)}, the recipe says {_images(materials.latent)}: write the "
            "checkpoint's autoencoder into the recipe's latent:"
        )
    names, have = config.text.get("classes"), materials.data.classes
    if names and have and names != list(have):
        raise UserError(
            f"{folder} was trained on the classes {', '.join(names)}, the data have {', '.join(have)}: "
            "give the class folders the names of the checkpoint's classes"
        )
    return Parent(folder, config)


def _images(latent: Mapping[str, Any]) -> str:
    return f"latents of {latent['autoencoder']}, {str(latent.get('fingerprint'))[:12]}" if latent else "pixels"


def new_denoiser(stage: TrainStage, materials: Materials) -> Denoiser:
    """A new Shallow-UViT; its weights are a function of the recipe's seed and the stage's name."""
    assert stage.size is not None and stage.resolution is not None
    text = materials.text
    classes = materials.recipe.text.classes
    core = core_config(stage.size, text_dim=text.dim or None, pooled_dim=text.pooled_dim or None, classes=classes)
    config = shallow_uvit(
        stage.size, stage.resolution, stride=stage.stride, patch=stage.patch, core=core, space=materials.space
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of(materials.recipe.seed, "weights", stage.name))
        return Denoiser(UViT(config), stage.diffusion)


def train_stage(stage: TrainStage, parent: Parent | None, folder: Path, materials: Materials) -> dict[str, Any]:
    """Run or resume a `train` stage; returns the numbers of its run."""
    entry = {"stage": stage.name, "verb": "train", "recipe": materials.recipe.name, "images": stage.images}
    if parent is None:
        denoiser = new_denoiser(stage, materials)
        return fit(denoiser, stage, stage.training(), folder, materials, [entry], fresh=True)
    denoiser, config = checkpoint.load(parent.folder)
    lineage = [*config.lineage, entry | {"parent": config.sha256}]
    return fit(denoiser, stage, stage.training(), folder, materials, lineage)


def fit(
    denoiser: Denoiser,
    stage: ModelStage,
    settings: TrainSettings,
    folder: Path,
    materials: Materials,
    lineage: list[dict[str, Any]],
    *,
    fresh: bool = False,
    stop_at: int | None = None,
    after: Path | None = None,
) -> dict[str, Any]:
    """Train the parameters that require gradients, or resume; write the first average to `folder/checkpoint`.

    The first process watches it and writes.
    `fresh`: the network is new, so its text whitening is set from the captions. `stop_at`, `after`: of a stage in
    phases, see `loop.train`.
    """
    recipe = materials.recipe
    denoiser = denoiser.to(materials.device)
    shapes = shapes_of(stage, denoiser.net.config)
    # Each stage has its own stream: a grown model does not repeat the order and noise of its core's training.
    seed = rng.seed_of(recipe.seed, "stage", stage.name, "")
    mixture = materials.data.mixture(stage)
    bad_path = materials.folder / stage.name / BAD_FILES  # shared by the phases of a stage
    loader = materials.loader(mixture, shapes, settings, seed, bad_path)
    materials.sees(stage.name, materials.images(stage, shapes))
    sampling = stage.sampling.given if stage.sampling else {}
    hooks: list[Hook] = []
    if not materials.team.first:
        materials.encode(stage.name, ())
    else:
        held = materials.heldout(WATCHED, shapes)
        materials.account(held, mixture, loader.bad)
        materials.encode(stage.name, chain(loader.texts(), held.captions))  # in one call, which loads the encoder once
        if fresh and not materials.recipe.text.classes:
            denoiser.net.core.whiten(materials.tokens(list(loader.texts(SPREAD))))
        cond, period = materials.cond(held.captions), settings.validate_every or 0
        looks = looks_of(materials, mixture, shapes, held)
        rows = denoiser_rows(looks, denoiser, materials, guided_batch(settings))
        hooks = [
            validation_hook(denoiser, held.images, cond, period, seed=recipe.seed, batch=settings.micro_batch),
            grid_hook(rows, folder, settings.sample_every or 0, materials.patches(denoiser)),
        ]
        unfinished.describe(folder, denoiser, config_of(denoiser, materials, lineage, sampling, settings.noise))

    def keep(where: Path, images: int) -> None:
        stopped = lineage[-1] | {"stopped_after": images}
        save(where, denoiser, materials, [*lineage[:-1], stopped], sampling, settings.noise)

    shards = materials.shards("denoiser", denoiser, settings)
    result = loop.train(
        DenoiseObjective(shards.network("denoiser", denoiser), materials.conditions(settings), settings, seed),
        loader.batches,
        settings,
        folder,
        seed=seed,
        hooks=hooks,
        name=f"{recipe.name}/{folder.relative_to(materials.folder)}",
        keep=keep,
        stop_at=stop_at,
        after=after,
        team=materials.team,
        shards=shards,
        bad=loader.bad,
    )
    return finish(
        result, "denoiser", denoiser, folder / CHECKPOINT, materials, lineage, loader, sampling, settings.noise
    )


def finish(
    result: TrainResult,
    part: str,
    model: Denoiser | Generator,
    folder: Path,
    materials: Materials,
    lineage: list[dict[str, Any]],
    loader: Loader,
    sampling: dict[str, Any] | None = None,
    noise: NoiseConfig | None = None,
) -> dict[str, Any]:
    """Write the first average of a finished training as a checkpoint; returns the numbers of the run."""
    averages = result.averages[part]

    with averages[0].applied() if averages else nullcontext():
        digest = materials.team.alone(partial(save, folder, model, materials, lineage, sampling, noise))
    return {
        "sha256": digest,
        "images": result.images,
        "skipped_steps": result.skipped,
        "seconds": round(result.seconds, 1),
        "images_per_second": result.images_per_second,
        "matmul_share": result.matmul_share,
        "peak_memory": result.peak_memory,
        "parameters": parameters_of(model),
        "bad_files": len(loader.bad),
        "bad_report": loader.bad.report(),
        "usable_images": len(loader),
    }


def guided_batch(settings: TrainSettings) -> int:
    """Images sampled at a time: guidance doubles the rows, which must be no more than a micro-batch."""
    return max(1, settings.micro_batch // 2)


def write_prompts(folder: Path, captions: Sequence[str]) -> None:
    """Write `samples/prompts.txt`, the prompts of a grid's images, one a line."""
    path = folder / "samples" / "prompts.txt"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(captions) + "\n", encoding="utf-8")


def save(
    folder: Path,
    model: Denoiser | Generator,
    materials: Materials,
    lineage: list[dict[str, Any]],
    sampling: dict[str, Any] | None = None,
    noise: NoiseConfig | None = None,
) -> str:
    """Write a checkpoint; returns the hash of its weights. Raises UserError if the disk is full."""
    with writing(folder):
        return checkpoint.save(folder, model, config_of(model, materials, lineage, sampling, noise))


def config_of(
    model: Denoiser | Generator,
    materials: Materials,
    lineage: list[dict[str, Any]],
    sampling: dict[str, Any] | None = None,
    noise: NoiseConfig | None = None,
) -> CheckpointConfig:
    """The configuration of a checkpoint that a stage makes."""
    text = materials.recipe.text
    return CheckpointConfig(
        network=model.net.config,
        diffusion=model.config,
        text={"encoder": text.encoder, "max_tokens": text.max_tokens, "fingerprint": materials.text.fingerprint}
        | ({"classes": list(materials.data.classes)} if materials.data.classes else {}),
        latent=materials.latent,
        sampling=sampling or {},
        noise=noise,
        lineage=lineage,
    )


def parameters_of(model: Denoiser | Generator) -> Mapping[str, int]:
    """Number of all parameters, and of those that train."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {"all": sum(n for n, _ in sizes), "training": sum(n for n, trains in sizes if trains)}
