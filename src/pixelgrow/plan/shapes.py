"""The network that each stage of a recipe makes, before anything is trained or allocated."""

from __future__ import annotations

from os.path import expanduser
from pathlib import Path

import torch

from pixelgrow.checkpoint import read_config
from pixelgrow.diffusion.denoiser import Denoiser, DiffusionConfig, NoiseSchedule
from pixelgrow.errors import UserError
from pixelgrow.external.autoencoder import Autoencoder
from pixelgrow.growth import check_gate, freeze, grown_config, inherited, last_blocks
from pixelgrow.model import find, one_step_settings
from pixelgrow.models.config import PIXELS, CoreConfig, NetConfig, Space, exact_sides
from pixelgrow.models.sizes import core_config, shallow_uvit
from pixelgrow.models.uvit import UViT
from pixelgrow.recipe.data import TextSpec
from pixelgrow.recipe.stages import (
    DistillStage,
    EvaluateStage,
    GrowStage,
    ModelStage,
    PairsStage,
    Recipe,
    Stage,
    TrainStage,
    is_folder,
    wrong_kind,
)
from pixelgrow.text.spec import describe
from pixelgrow.writing import reading


def networks(recipe: Recipe) -> dict[str, NetConfig]:
    """The network of every stage that makes one, by name. Raises UserError for shapes that do not fit together."""
    nets: dict[str, NetConfig] = {}
    space = Autoencoder(recipe.latent.autoencoder).space if recipe.latent else PIXELS
    for stage in recipe.stages:
        if stage.parent is not None and is_folder(stage.parent):
            _check_kind(stage, stage.parent)
        if isinstance(stage, ModelStage):
            try:
                nets[stage.name] = network(stage, nets, recipe, space)
                if isinstance(stage, GrowStage):
                    _check_noise(stage, nets, recipe)
            except UserError as error:
                raise UserError(f"stage {stage.name!r}: {error}") from None
        elif isinstance(stage, PairsStage) and stage.upscales is not None:
            _check_upscaling(stage, nets)
    return nets


def _check_upscaling(stage: PairsStage, nets: dict[str, NetConfig]) -> None:
    """UserError unless the teacher has exact rungs from the generator's resolution to its own."""
    teacher, low = parent_network(str(stage.parent), nets), parent_network(str(stage.upscales), nets)
    *sides, _ = exact_sides(teacher.rungs)
    if low.resolution not in sides:
        has = f"which adds exact rungs to images of {' or '.join(map(str, sides))} px" if sides else "which has none"
        raise UserError(
            f"stage {stage.name!r}: upscales: {stage.upscales} makes images of {low.resolution} px, expected exact "
            f"rungs from there to the {teacher.resolution} px of {stage.parent}, {has}; name another generator"
        )


def _check_noise(stage: GrowStage, nets: dict[str, NetConfig], recipe: Recipe) -> None:
    """UserError if a stage that trains gated rungs alone has no training noise below their gates."""
    config = nets[stage.name]
    if stage.trains_core or config.rungs[-1].until is None:
        return
    with torch.device("meta"):
        denoiser = Denoiser(UViT(config), diffusion_of(stage.name, recipe))
    old = parent_network(str(stage.parent), nets)
    freeze(denoiser.net, inherited(denoiser.net.state_dict(), config, old))
    NoiseSchedule(stage.noise, denoiser, denoiser.trained_until)


def _check_kind(stage: Stage, folder: str) -> None:
    """Raise UserError if a stage cannot start from a checkpoint of this kind."""
    config = read_config(find(folder))
    generator = config.objective == "generate"
    if isinstance(stage, EvaluateStage) and generator:
        one_step_settings(config, stage.given)
    if wrong := wrong_kind(stage, folder, generator):
        raise UserError(f"stage {stage.name!r}: {wrong}")


def network(stage: ModelStage, nets: dict[str, NetConfig], recipe: Recipe, space: Space = PIXELS) -> NetConfig:
    """The network that a stage makes, given those of the stages before it."""
    if isinstance(stage, TrainStage) and stage.parent is None:
        assert stage.size is not None and stage.resolution is not None
        core = planned_core(stage.size, recipe.text)
        return shallow_uvit(
            stage.size, stage.resolution, stride=stage.stride, patch=stage.patch, core=core, space=space
        )
    config = parent_network(str(stage.parent), nets)
    if isinstance(stage, DistillStage):
        return config.model_copy(update={"guided": _guidance_varies(stage.pairs, recipe)})
    if isinstance(stage, GrowStage):
        one_step = stage.pairs is not None
        last_blocks(config, stage.base_blocks)  # raises where there are fewer
        if stage.pairs is not None and config.guided != _guidance_varies(stage.pairs, recipe):
            is_, follows = ("is", "follows no") if config.guided else ("is not", "follows a")
            raise UserError(
                f"{stage.parent} {is_} conditioned on the guidance weight, but the guidance of the pairs {stage.pairs} "
                f"{follows} distribution: name pairs like those that it was distilled on"
            )
        check_gate(stage.until, diffusion_of(str(stage.parent), recipe))
        for to in stage.to:
            config = grown_config(
                config,
                to,
                stage.init,
                patch=stage.patch,
                blocks=stage.blocks,
                generator=one_step,
                exact=stage.exact,
                until=stage.until,
            )
    return config


def _guidance_varies(pairs: str, recipe: Recipe) -> bool:
    """Whether the pairs of a stage have different guidance weights."""
    made = recipe.stage(pairs)
    return isinstance(made, PairsStage) and made.distribution is not None


def parent_network(parent: str, nets: dict[str, NetConfig]) -> NetConfig:
    """The network of a stage or of a checkpoint folder, as named by a `from`."""
    return read_config(find(parent)).network if is_folder(parent) else nets[parent]


def diffusion_of(name: str, recipe: Recipe) -> DiffusionConfig:
    """Preconditioning and noise levels of the model of a stage or checkpoint folder, set by the first stage."""
    while not is_folder(name):
        stage = recipe.stage(name)
        assert isinstance(stage, ModelStage)
        if isinstance(stage, TrainStage) and stage.parent is None:
            return stage.diffusion
        name = str(stage.parent)
    return read_config(find(name)).diffusion


def planned_core(size: str, text: TextSpec) -> CoreConfig:
    """The core of a size for a text encoder; if that is not on this machine, with the size's reference width."""
    if is_here(text):
        spec = describe(text.encoder, text.max_tokens)
        return core_config(size, text_dim=spec.dim or None, pooled_dim=spec.pooled_dim or None, classes=text.classes)
    return core_config(size)


def is_here(text: TextSpec) -> bool:
    """Whether an encoder's width can be read without the hub."""
    with reading(text.encoder):
        return bool(text.classes) or text.encoder == "minilm" or Path(expanduser(text.encoder)).is_dir()
