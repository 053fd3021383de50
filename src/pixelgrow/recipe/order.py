"""Checks that the stages of a recipe fit together: names, parents, kinds of model, resolutions, pairs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from pixelgrow.diffusion.sampling_spec import check_one_step
from pixelgrow.errors import UserError
from pixelgrow.onestep.losses import GUIDANCE_DISTRIBUTIONS
from pixelgrow.recipe.data import TextSpec
from pixelgrow.recipe.stages import (
    RESERVED,
    DistillStage,
    EstimateStage,
    EvaluateStage,
    GrowStage,
    Head,
    ModelStage,
    PairsStage,
    Stage,
    TrainStage,
    is_folder,
    makes_generator,
    wrong_kind,
)


def _models(stages: Iterable[Stage]) -> list[str]:
    return [s.name for s in stages if isinstance(s, ModelStage)]


def check_place(stages: Sequence[Stage], where: str) -> None:
    """Check the last of `stages` against the stages before it. `where`: the recipe, for messages. Raises UserError."""
    *before, stage = stages
    earlier = with_parents(before)
    folders = {s.name.lower(): s.name for s in earlier}  # some file systems ignore case
    if (other := folders.get(stage.name.lower())) is not None:
        both = repr(other) if other == stage.name else f"{other!r} and {stage.name!r}, one folder on some file systems"
        raise UserError(f"{where}: two stages are called {both}; give each a name of its own")
    if stage.name.lower() in RESERVED:
        raise UserError(
            f"{where}: a stage is called {stage.name!r}, which is the name of a run's own file or folder (as are "
            f"{', '.join(r for r in RESERVED if r != stage.name.lower())}); give it another name"
        )
    at = f"stage {stage.name!r}"
    models = _models(earlier)
    parent = _parent_of(stage, earlier)
    if parent is None:
        if not isinstance(stage, TrainStage):
            raise UserError(
                f"{where}: {at} has no model to start from: put a train stage before it, or name a checkpoint in from:"
            )
    elif parent not in models and not is_folder(parent):
        known = unknown(parent, models, "stage") if models else f"no stage before it makes a model, got {parent!r}"
        raise UserError(f"{where}: {at}: from: {known} (a checkpoint folder is written with a slash)")
    _check_kind(earlier, stage, parent, f"{where}: {at}")
    if isinstance(stage, PairsStage) and stage.upscales is not None and not is_folder(stage.upscales):
        generators = [s.name for s in earlier if isinstance(s, ModelStage) and makes_generator(s)]
        if stage.upscales not in generators:
            known = unknown(stage.upscales, generators, "one-step generator") if generators else "no stage makes one"
            raise UserError(f"{where}: {at}: upscales: {known}")
    if isinstance(stage, GrowStage | DistillStage | EstimateStage) and stage.pairs is not None:
        made = {s.name: s for s in earlier if isinstance(s, PairsStage)}
        if stage.pairs not in made:
            raise UserError(f"{where}: {at}: pairs: {unknown(stage.pairs, made, 'stage of pairs')}")
        _check_teacher(earlier, stage, parent, made[stage.pairs], f"{where}: {at}")
        if not isinstance(stage, EstimateStage):
            _check_sides(earlier, stage, parent, made[stage.pairs], f"{where}: {at}")
        _check_guidance(earlier, stage, made[stage.pairs], f"{where}: {at}")
    if isinstance(stage, GrowStage):
        assert parent is not None
        if stage.patch is not None and stage.init != "preserve" and _is_uvit(earlier, parent):
            raise UserError(
                f"{where}: {at}: patch: got {stage.patch}, but init: {stage.init} keeps the levels and the patch of "
                "the earlier growth; drop it"
            )
        low = resolution_of(earlier, parent)
        for to in stage.to:
            if low and (to <= low or to % low or (to // low) & (to // low - 1)):
                raise UserError(
                    f"{where}: {at}: to: got {to}, expected {low} doubled once or more: {2 * low}, {4 * low}, ..."
                )
            low = to


def _check_kind(earlier: Sequence[Stage], stage: Stage, parent: str | None, where: str) -> None:
    """One-step generators grow with pairs, and are no teachers. Checkpoint folders are checked when the recipe runs."""
    made = next((s for s in earlier if s.name == parent), None)
    if made is None:
        return
    if wrong := wrong_kind(stage, made.name, makes_generator(made)):
        raise UserError(f"{where}: {wrong}")
    if isinstance(stage, EvaluateStage) and isinstance(made, DistillStage | GrowStage) and makes_generator(made):
        pairs = {s.name: s.distribution for s in earlier if isinstance(s, PairsStage)}
        try:
            check_one_step(stage.given, guided=pairs[str(made.pairs)] is not None)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _check_teacher(
    earlier: Sequence[Stage],
    stage: GrowStage | DistillStage | EstimateStage,
    parent: str | None,
    pairs: PairsStage,
    where: str,
) -> None:
    """Pairs are of the generator's own teacher. Checkpoint folders are compared by hash when the stage runs."""
    by_name: dict[str | None, Stage] = {s.name: s for s in earlier}
    of: Stage | None = stage
    while isinstance(of, GrowStage):
        of, parent = by_name.get(parent), by_name[parent].parent if parent in by_name else None
    if parent in by_name and pairs.parent in by_name and parent not in _kept_in(by_name, pairs.parent):
        raise UserError(
            f"{where}: pairs: {pairs.name} is of {pairs.parent}, but the teacher is {parent}: name pairs of {parent}"
        )


def _check_sides(
    earlier: Sequence[Stage], stage: GrowStage | DistillStage, parent: str | None, pairs: PairsStage, where: str
) -> None:
    """Pairs have the stage's resolution; pairs by inversion may have a lower one."""
    made = resolution_of(earlier, str(pairs.parent))
    side = stage.to[-1] if isinstance(stage, GrowStage) else resolution_of(earlier, str(parent))
    if made is None or side is None or made == side or (made < side and pairs.direction == "invert"):
        return
    raise UserError(
        f"{where}: pairs: {pairs.name} is of {pairs.parent} at {made} px, and the stage works at {side} px: name "
        f"pairs of a teacher of {side} px, or pairs with direction: invert of a smaller one"
    )


def _kept_in(by_name: Mapping[str | None, Stage], name: str | None) -> list[str | None]:
    """A stage and the stages whose models it contains unchanged: it was grown from them by `preserve`, frozen."""
    names = [name]
    while (
        isinstance(stage := by_name.get(names[-1]), GrowStage)
        and stage.init == "preserve"
        and not stage.trains_core
        and stage.unfreeze_after is None
    ):
        names.append(stage.parent)
    return names


def check_buckets(stage: Stage, head: Head, where: str) -> None:
    """Pairs, and so the one-step generators that train on them, are squares; so are latents."""
    data = stage.data if isinstance(stage, ModelStage | PairsStage) and stage.data is not None else head.data
    if not any(spec.buckets for spec in data):
        return
    if head.latent is not None:
        raise UserError(f"{where}: buckets: got true with latent:, which encodes squares; drop one of the two")
    if isinstance(stage, PairsStage):
        raise UserError(
            f"{where}: stage {stage.name!r}: buckets: got true, but pairs are squares: give the stage data: of its "
            "own, the same without buckets"
        )


def check_losses(stage: Stage, text: TextSpec, where: str) -> None:
    """CLIP similarity needs captions, which a recipe of classes does not have."""
    if isinstance(stage, GrowStage | DistillStage) and stage.losses and stage.losses.similarity and text.classes:
        raise UserError(
            f"{where}: stage {stage.name!r}: losses.similarity compares images with captions, and a recipe of "
            f"{{classes: {text.classes}}} has none; drop it"
        )


def _check_guidance(
    earlier: Sequence[Stage], stage: GrowStage | DistillStage | EstimateStage, pairs: PairsStage, where: str
) -> None:
    """An estimator trains on images sampled with guidance weights of a distribution.

    Pairs with such weights need an estimator if there is a discriminator, and only then.
    """
    if isinstance(stage, EstimateStage):
        if pairs.distribution is None or pairs.direction != "sample":
            names = ", ".join(GUIDANCE_DISTRIBUTIONS)
            raise UserError(
                f"{where}: pairs: {pairs.name} has direction: {pairs.direction} and guidance: {pairs.guidance}, "
                f"expected images sampled with weights of a distribution: direction: sample and guidance: {names}"
            )
        return
    made = [s.name for s in earlier if isinstance(s, EstimateStage)]
    adversarial = stage.losses is None or stage.losses.adversarial
    if pairs.distribution is not None and adversarial and stage.estimator is None:
        raise UserError(
            f"{where}: pairs: {pairs.name} has guidance: {pairs.distribution}, so the discriminator needs a weight of "
            "real images too: write estimator: and the name of an estimate stage"
        )
    if stage.estimator is not None:
        if pairs.distribution is None or not adversarial:
            why = (
                f"the pairs have guidance: {pairs.guidance}, no distribution"
                if adversarial
                else "there is no discriminator"
            )
            raise UserError(f"{where}: estimator: got {stage.estimator!r}, but {why}; drop it")
        if stage.estimator not in made:
            raise UserError(f"{where}: estimator: {unknown(stage.estimator, made, 'estimate stage')}")


def _is_uvit(stages: Sequence[Stage], name: str) -> bool:
    """Whether a stage's model was grown with `random` or `scratch`, so that levels stand around its core."""
    by_name = {s.name: s for s in stages}
    while (stage := by_name.get(name)) is not None:
        if isinstance(stage, GrowStage) and stage.init != "preserve":
            return True
        name = stage.parent or ""
    return False


def resolution_of(stages: Iterable[Stage], name: str) -> int | None:
    """Image side of the model that a stage makes; None if it depends on a checkpoint folder."""
    by_name = {s.name: s for s in stages}
    stage = by_name.get(name)
    if isinstance(stage, GrowStage):
        return stage.to[-1]
    if isinstance(stage, TrainStage) and stage.resolution:
        return stage.resolution
    return resolution_of(by_name.values(), stage.parent or "") if isinstance(stage, ModelStage) else None


def with_parents(stages: Sequence[Stage]) -> list[Stage]:
    """The stages with every parent filled in.

    A `distill` or `estimate` stage without `from` starts from the teacher of its pairs, other stages from the last
    model before them.
    """
    done: list[Stage] = []
    for stage in stages:
        if stage.parent is None and not isinstance(stage, TrainStage):
            stage = stage.model_copy(update={"parent": _parent_of(stage, done)})
        done.append(stage)
    return done


def _parent_of(stage: Stage, earlier: Sequence[Stage]) -> str | None:
    """The parent of a stage, given earlier stages whose parents are filled in; None if there is none."""
    if stage.parent is not None or isinstance(stage, TrainStage):
        return stage.parent
    teachers = {s.name: s.parent for s in earlier if isinstance(s, PairsStage)}
    if isinstance(stage, DistillStage | EstimateStage) and stage.pairs in teachers:
        return teachers[stage.pairs]
    return next(reversed(_models(earlier)), None)


def unknown(got: str, known: Iterable[str], what: str) -> str:
    """`unknown key 'imagess'; did you mean 'images'?`, or the list of known ones."""
    known = list(known)
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.5)
    return f"unknown {what} {got!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
    )
