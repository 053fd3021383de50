"""The `distill` stage, and the `grow` stage of a generator: both train a one-step generator on a teacher's pairs."""

from __future__ import annotations

import logging
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from pixelgrow import checkpoint, rng
from pixelgrow.data.account import Account
from pixelgrow.data.buckets import square
from pixelgrow.diffusion.generator import Generator, with_guidance
from pixelgrow.diffusion.guidance import Guided
from pixelgrow.diffusion.sampling import initial_noise, sample
from pixelgrow.errors import UserError
from pixelgrow.growth import detail_std, freeze, grow_network, grown_config, last_blocks, smaller, with_detail
from pixelgrow.models.layers import box_down
from pixelgrow.onestep.distill import GENERATOR, DistillObjective
from pixelgrow.onestep.estimator import Labels, load_estimator
from pixelgrow.onestep.features import TeacherFeatures
from pixelgrow.onestep.losses import spread_of
from pixelgrow.onestep.networks import load_networks, networks_used
from pixelgrow.onestep.pairs import Ode, Pairs, reduced
from pixelgrow.onestep.settings import LossSettings
from pixelgrow.onestep.stream import PairStream
from pixelgrow.onestep.watch import Watch, Watched
from pixelgrow.recipe.stages import DistillStage, GrowStage
from pixelgrow.stages import looks
from pixelgrow.stages.examples import Examples
from pixelgrow.stages.grow import REPORT, describe, lineage_entry
from pixelgrow.stages.materials import BAD_FILES, LOOKED_AT, Materials
from pixelgrow.stages.train import WATCHED, Parent, config_of, finish, guided_batch
from pixelgrow.training import loop, unfinished
from pixelgrow.training.denoise import recompute_blocks
from pixelgrow.training.loop import CHECKPOINT
from pixelgrow.training.monitor import Hook, grid_hook
from pixelgrow.training.unfinished import START
from pixelgrow.writing import read_json, write_json

logger = logging.getLogger(__name__)


def distill_stage(stage: DistillStage, parent: Parent, folder: Path, materials: Materials) -> dict[str, Any]:
    """Run or resume a `distill` stage; returns the numbers of its run."""
    teacher, config = checkpoint.load(parent.folder)
    distribution = materials.pairs_of(stage).stage.distribution
    seed = rng.seed_of(materials.recipe.seed, "weights", stage.name)
    generator = Generator(with_guidance(teacher.net, seed) if distribution else teacher.net, teacher.config)
    entry = {"stage": stage.name, "verb": "distill", "recipe": materials.recipe.name, "images": stage.images}
    entry |= measured_by(stage.losses) | ({"guidance": distribution} if distribution else {})
    lineage = [*config.lineage, entry | {"parent": config.sha256}]
    return _fit(generator, stage, stage.losses, folder, materials, lineage)


def measured_by(losses: LossSettings) -> dict[str, Any]:
    """Names and fingerprints of the feature networks from outside that a loss uses, for the lineage."""
    used = networks_used(losses)
    return {"networks": used} if used else {}


def grow_generator_stage(stage: GrowStage, parent: Parent, folder: Path, materials: Materials) -> dict[str, Any]:
    """Run or resume the `grow` stage of a one-step generator: adds decoder halves to its features, freezes the rest."""
    if stage.pairs is None:
        raise UserError(f"stage {stage.name!r}: {stage.parent} is a one-step generator: write pairs: STAGE to grow it")
    growth = materials.team.alone(lambda: read_json(folder / REPORT) or _make_start(stage, parent, folder, materials))
    generator, _ = checkpoint.load_generator(folder / START)
    freeze(generator.net, growth["frozen"])
    losses = stage.losses or LossSettings()
    entry = lineage_entry(stage, parent, growth, materials) | measured_by(losses)
    return _fit(generator, stage, losses, folder, materials, [*parent.config.lineage, entry])


def _make_start(stage: GrowStage, parent: Parent, folder: Path, materials: Materials) -> dict[str, Any]:
    """Write `start/`, the grown generator before its first step, and `growth.json`."""
    before, _ = checkpoint.load_generator(parent.folder)
    config = before.net.config
    images = materials.heldout(WATCHED, square(stage.to[-1])).images
    for side in stage.to:
        low = config.resolution
        config = grown_config(
            config, side, stage.init, patch=stage.patch, blocks=stage.blocks, generator=True, exact=stage.exact
        )
        config = with_detail(config, detail_std(smaller(images, stage.to[-1] // side), side // low))
    net, report = grow_network(before.net, config, stage.init, materials.recipe.seed)
    checkpoint.save(folder / START, Generator(net, before.config), parent.config)
    free = last_blocks(before.net.config, stage.base_blocks)
    frozen = [] if stage.trains_core else [n for n in report.loaded if not n.startswith(free)]
    summary = report.to_dict() | {"frozen": frozen}
    write_json(folder / REPORT, summary)
    logger.info("%s", describe(summary))
    return summary


def _fit(
    generator: Generator,
    stage: DistillStage | GrowStage,
    losses: LossSettings,
    folder: Path,
    materials: Materials,
    lineage: list[dict[str, Any]],
) -> dict[str, Any]:
    """Train a generator on its teacher's pairs, or resume; write the first average to `folder/checkpoint`."""
    recipe, settings = materials.recipe, stage.training()
    made = materials.pairs_of(stage)
    pairs, teacher_folder = Pairs(made.folder, stage.fraction), made.teacher
    mixture = materials.data.mixture(stage)
    pairs.check([str(e["parent"]) for e in lineage if e.get("verb") == "distill"], mixture.describe())
    upscaled = pairs.facts.get("upscales")
    if upscaled is not None and upscaled not in [e.get("parent") for e in lineage if e.get("verb") == "grow"]:
        raise UserError(
            f"stage {stage.name!r}: the pairs {stage.pairs} are upscaled images of the generator {upscaled[:12]}, "
            "which this stage does not grow: name pairs that upscale its own generator, or pairs without upscales"
        )
    teacher, teacher_config = checkpoint.load(teacher_folder, materials.device)
    generator = generator.to(materials.device)
    seed = rng.seed_of(recipe.seed, "stage", stage.name, "")
    shapes = square(generator.resolution)
    loader = materials.loader(mixture, shapes, settings, seed, folder / BAD_FILES)
    stream = PairStream(loader, pairs, generator.latent_resolution)
    unread = {"beyond fraction": int(pairs.facts["pairs"]) - len(pairs), "too small": len(pairs) - len(stream.usable)}
    paired = Account(int(pairs.facts["pairs"]), unread, "pairs")
    materials.sees(stage.name, materials.images(stage, shapes), paired)
    held = None
    if materials.team.first:
        held = materials.heldout(WATCHED, shapes)
        materials.account(held, mixture, loader.bad)
    spoken = chain(loader.texts(), stream.texts(), held.captions if held else ())
    captions = materials.encode(stage.name, spoken)
    features = TeacherFeatures(teacher)
    networks = load_networks(losses, features, materials.device)
    if networks.similarity is not None and captions and (cut := networks.similarity.cut(captions[:LOOKED_AT])).captions:
        logger.warning("%s: for losses.similarity, %s", stage.name, cut.line())
    distribution, labels = pairs.distribution, None
    if distribution is not None and stage.estimator is not None:
        folder_of = materials.folder / stage.estimator
        estimator = load_estimator(folder_of, pairs.facts["teacher"], distribution, materials.device)
        labels = Labels(estimator, features)
    if teacher.resolution > generator.resolution:
        raise UserError(
            f"the teacher of the pairs works at {teacher.resolution} px, this stage at {generator.resolution} px: "
            "name pairs of a teacher that is no larger"
        )
    guidance: float | None = None  # of a guided generator's samples: its teacher's, clipped to the distribution
    if distribution is not None:
        usual = float(teacher_config.sampling.get("guidance", looks.GRID_GUIDANCE))
        guidance = min(max(usual, spread_of(distribution).low), spread_of(distribution).high)
    sampling = {} if guidance is None else {"guidance": guidance}
    hooks: list[Hook] = []
    if held is not None:
        view = looks.looks_of(materials, mixture, shapes, held)
        solver = pairs.facts["solver"]
        weight = float(solver["guidance"]) if guidance is None else guidance
        watch = _watch(generator, features, held, pairs, guidance, weight, settings.micro_batch, materials)
        grid = looks.generator_rows(
            view, watch, teacher, weight, solver.get("interval"), materials, held, guided_batch(settings)
        )
        hooks = [
            Hook("validation", settings.validate_every or 0, watch.numbers, at_start=True),
            grid_hook(grid, folder, settings.sample_every or 0, materials.patches(generator)),
        ]
        unfinished.describe(folder, generator, config_of(generator, materials, lineage, sampling))
    shards = materials.shards(GENERATOR, generator, settings)
    network = shards.network(GENERATOR, generator)
    objective = DistillObjective(
        network,
        networks.features,
        materials.conditions(settings),
        losses,
        seed,
        distance=networks.distance,
        similarity=networks.similarity,
        distribution=distribution,
        labels=labels,
    )
    recompute_blocks(network.net, settings.activation_checkpointing)
    result = loop.train(
        objective,
        stream.batches,
        settings,
        folder,
        seed=seed,
        hooks=hooks,
        name=f"{recipe.name}/{stage.name}",
        team=materials.team,
        shards=shards,
        bad=loader.bad,
    )
    return finish(result, GENERATOR, generator, folder / CHECKPOINT, materials, lineage, loader, sampling)


def _watch(
    generator: Generator,
    features: TeacherFeatures,
    held: Examples,
    pairs: Pairs,
    guidance: float | None,
    weight: float,
    batch: int,
    materials: Materials,
) -> Watch:
    """What validates a generator: held-out images with their latents by the teacher, whose guidance is `weight`."""
    teacher, seed = features.teacher, materials.recipe.seed
    low = (teacher.resolution, teacher.resolution)
    solver = pairs.facts["solver"]
    ode = Ode(solver["sampler"], min(20, int(solver["steps"])), teacher.sigma_min, teacher.sigma_max)
    images, cond = held.batch(range(len(held))).to(materials.device), materials.cond(held.captions)
    with torch.no_grad():
        small = box_down(images, generator.resolution // teacher.resolution)
        rows = [slice(start, start + batch) for start in range(0, len(small), batch)]
        interval = solver.get("interval")
        guided = partial(Guided, teacher, guidance=weight, interval=interval)
        latents = torch.cat([ode.to_latent(guided(cond[r]), small[r]) for r in rows])
        solved = sample(
            teacher,
            cond[: looks.COLUMNS],
            size=low,
            seed=seed,
            steps=looks.GRID_STEPS,
            guidance=weight,
            interval=interval,
        ).images
    prior = initial_noise(low, seed, range(len(images)), generator.space.channels).to(materials.device)
    latents, prior = (reduced(z, generator.latent_resolution) for z in (latents, prior))
    return Watch(generator, features, Watched(images, cond, latents, prior, solved, guidance), batch)
