"""A recipe's settings, validated: its stages in order, and what all stages share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from pixelgrow.diffusion.denoiser import DiffusionConfig
from pixelgrow.diffusion.sampling_spec import Interval, SamplingSpec, Spec
from pixelgrow.evaluation.judges import OF_QUESTIONS
from pixelgrow.evaluation.measures import LEAST, check_names, check_numbers, of_features, takes
from pixelgrow.models.sizes import SIZES
from pixelgrow.onestep.losses import GUIDANCE_DISTRIBUTIONS, GuidanceDistribution
from pixelgrow.onestep.settings import LossSettings, Preset, with_preset
from pixelgrow.recipe.data import HeldoutSpec, LatentSpec, Mixture, TextSpec
from pixelgrow.training.settings import TrainSettings

NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_-])?$"  # of recipes and stages, which become folders
RESERVED = ("data", "latents", "text", "report.html")  # a run's own files and folders, beside those of its stages


class TrainedStage(TrainSettings):
    """Base of the stages that train: a name, a parent, and the training settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)
    free: ClassVar[frozenset[str]] = frozenset(  # settings that may change while the stage is unfinished
        {"accumulate", "activation_checkpointing", "compile", "workers", "bad_limit", "max_bad_steps"}
        | {name for name in TrainSettings.model_fields if name.endswith("_every")}
    )

    name: str = Field(pattern=NAME)
    parent: str | None = Field(None, alias="from")

    def training(self) -> TrainSettings:
        """The training settings alone."""
        return TrainSettings(**{name: getattr(self, name) for name in TrainSettings.model_fields})


class ModelStage(TrainedStage):
    """Base of the stages that make a checkpoint: `data` of their own, and the checkpoint's `sampling` defaults."""

    data: Mixture | None = None
    sampling: SamplingSpec | None = None


def is_folder(parent: str) -> bool:
    """Whether a `from` names a checkpoint folder, not a stage."""
    return "/" in parent


class TrainStage(ModelStage):
    """Train a new Shallow-UViT; with `from`, train a checkpoint further, with other data or settings."""

    size: str | None = None
    resolution: int | None = Field(None, ge=1)
    stride: int = Field(4, ge=1, description="pixels per core token")
    patch: int | None = Field(None, ge=1, description="pixels per cell of the entry's map; the stride if left out")
    diffusion: DiffusionConfig = DiffusionConfig()

    @field_validator("size")
    @classmethod
    def _size(cls, size: str | None) -> str | None:
        if size is not None and size not in SIZES:
            raise ValueError(f"got {size!r}, expected one of {', '.join(SIZES)}")
        return size

    @model_validator(mode="after")
    def _new_or_from(self) -> TrainStage:
        shape = {"size", "resolution", "stride", "patch", "diffusion"} & self.model_fields_set
        if self.parent is not None and shape:
            raise ValueError(f"{min(shape)} comes from the checkpoint named in `from`; drop one of the two")
        if self.parent is None and (self.size is None or self.resolution is None):
            raise ValueError("a stage without `from` needs `size` and `resolution`")
        if self.resolution is not None and self.resolution % self.stride:
            raise ValueError(f"resolution {self.resolution} is not a multiple of the stride {self.stride}")
        return self


class GrowStage(ModelStage):
    """Grow a checkpoint to a higher resolution, then train it.

    `to`: the resolution, or several in ascending order, to grow in steps before training.
    `init`: `random` puts new levels with random weights around the core. `preserve` adds levels so that the function
    stays the same, by exact rungs (docs/exact-growth.md) unless `exact: false`. `scratch` is `random` without the
    core's weights.
    `core`: `frozen`, `finetune`, or `{unfreeze_after: N}`, which freezes the core for the first N images of the run.
    Schedules count all `images` and go on through the unfreezing.
    """

    to: tuple[int, ...] = Field(min_length=1)
    init: Literal["preserve", "random", "scratch"] = "preserve"
    core: Literal["frozen", "finetune"] = "frozen"
    unfreeze_after: int | None = Field(None, ge=1)
    patch: int | None = Field(None, ge=1, description="pixels per cell of the new top map")
    blocks: int = Field(1, ge=1, description="residual blocks in each new half level")
    exact: bool = Field(
        True, description="with preserve: box_down of the image is the image from below, for any weights"
    )
    until: float | None = Field(
        None, gt=0, description="exact rungs are evaluated up to this sigma at the core; .inf: all"
    )
    pairs: str | None = Field(None, description="of a one-step generator: the stage that made its teacher's pairs")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the pairs to train on")
    estimator: str | None = Field(None, description="of a guided generator: the stage that estimates weights of images")
    preset: Preset | None = None
    base_blocks: int = Field(0, ge=0, description="of a one-step generator: how many of its last blocks train too")
    losses: LossSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        given = dict(given)
        core = given.get("core")
        if isinstance(core, Mapping) and set(core) == {"unfreeze_after"} and "unfreeze_after" not in given:
            given |= {"core": "frozen", "unfreeze_after": core["unfreeze_after"]}
        if "to" in given and not isinstance(given["to"], list | tuple):
            given["to"] = [given["to"]]
        return given if given.get("pairs") is None else with_preset(given, "grow")

    @model_validator(mode="after")
    def _regimes(self) -> GrowStage:
        if self.unfreeze_after is not None:
            if self.core != "frozen":
                raise ValueError(f"unfreeze_after needs core: frozen, got core: {self.core}; drop one of the two")
            if -(-self.unfreeze_after // self.batch) * self.batch >= self.images:
                raise ValueError(
                    f"unfreeze_after: got {self.unfreeze_after}, which leaves no step of {self.batch} images before "
                    f"images ({self.images}); lower it"
                )
        if self.pairs is None:
            odd = {"fraction", "estimator", "losses", "preset", "base_blocks"} & self.model_fields_set
            if odd:
                raise ValueError(f"{min(odd)} is for the growth of a one-step generator; add pairs:, or drop it")
        else:
            _no_denoiser(self)
            if self.base_blocks and self.trains_core:
                raise ValueError("base_blocks is for a frozen base; drop it or core: finetune")
            if self.unfreeze_after is not None:
                raise ValueError("unfreeze_after is for the growth of a denoiser; drop it or write core: finetune")
        if self.init != "preserve" and (odd := {"exact", "until"} & self.model_fields_set):
            raise ValueError(f"{min(odd)} is for init: preserve, not for init: {self.init}; drop it")
        if self.until is not None and (self.pairs is not None or not self.exact):
            raise ValueError("until is the gate of a denoiser's exact rungs; drop it")
        if self.init == "scratch" and (
            self.unfreeze_after or ("core" in self.model_fields_set and self.core == "frozen")
        ):
            raise ValueError("init: scratch trains everything; drop core: frozen")
        return self

    @property
    def trains_core(self) -> bool:
        """Whether the core trains from the first image on."""
        return self.init == "scratch" or self.core == "finetune"


def _no_denoiser(stage: ModelStage) -> None:
    """Raise ValueError if the stage of a one-step generator has settings that only a denoiser's training has."""
    odd = {"noise", "weighting", "weighting_bias", "multiscale", "cond_dropout", "sampling"} & stage.model_fields_set
    if odd:
        raise ValueError(f"{min(odd)} is for the training of a denoiser, not of a one-step generator; drop it")
    if stage.data is not None:
        raise ValueError("data: a one-step generator trains on the data of its pairs; drop it")


class DistillStage(ModelStage):
    """Distil the teacher of `pairs` to a one-step generator (PaGoDA, arXiv 2405.14822).

    If the pairs' guidance follows a distribution, generator and discriminator are conditioned on the guidance weight,
    and the `estimator` stage estimates the weights of real images. Learning rate, betas and decay are ours; `preset:
    paper` or `released-code` sets the published ones.
    """

    pairs: str
    fraction: float = Field(1.0, gt=0, le=1, description="share of the pairs to train on; 1% is enough in the paper")
    estimator: str | None = None
    preset: Preset | None = None
    losses: LossSettings = LossSettings()
    betas: tuple[float, float] = (0.0, 0.99)
    weight_decay: float = Field(0.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        return with_preset(given, "distill") if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _of_denoisers(self) -> DistillStage:
        _no_denoiser(self)
        return self


class PairsStage(Spec):
    """Make pairs of image and latent with a teacher's ODE, for its distillation (PaGoDA, arXiv 2405.14822).

    `direction: invert` computes the latents of `n` images, with `flip` those of their mirror images too. `direction:
    sample` computes images from `n` random latents (the paper's baseline).
    `upscales` (ours) names a smaller one-step generator: the teacher, which has exact rungs, adds details to the images
    that the generator makes of the latents. Such pairs are for the growth of that generator.
    `guidance`: a weight; 1 is none, as in the paper's inversion. The name of a distribution gives each image its own
    weight, which the distilled generator is conditioned on: `captions`, `recaptions`, or `mixed`. With `mixed`, a
    sample's first caption has a weight of `captions`, its others of `recaptions`, as in the paper.
    """

    free: ClassVar[frozenset[str]] = frozenset({"batch", "workers", "bad_limit"})

    name: str = Field(pattern=NAME)
    parent: str | None = Field(None, alias="from")
    data: Mixture | None = None
    n: int = Field(ge=1)
    direction: Literal["invert", "sample"] = "invert"
    sampler: Literal["heun", "ddim", "dpm++2m"] = "heun"
    steps: int = Field(40, ge=2, description="levels of the grid; heun evaluates 2 * steps - 2 times to invert")
    guidance: float | GuidanceDistribution = 1.0
    interval: Interval | None = Field(None, description="guide from lo to hi only, in sigma of the image")
    upscales: str | None = Field(None, description="a one-step generator, whose images the teacher upscales")
    flip: bool = False
    batch: int = Field(64, ge=1)
    shard: int = Field(1024, ge=1, description="images in a file; a multiple of batch")
    workers: int | None = Field(None, ge=1, description="shards made at the same time; one per GPU if left out")
    bad_limit: float = Field(0.01, ge=0, le=1)

    @field_validator("direction", mode="before")
    @classmethod
    def _renamed(cls, direction: Any) -> Any:
        if direction == "draw":
            raise ValueError("direction: draw is now called direction: sample; write that")
        return direction

    @field_validator("guidance", mode="before")
    @classmethod
    def _guidance(cls, guidance: Any) -> Any:
        number = isinstance(guidance, int | float) and not isinstance(guidance, bool) and 0 <= guidance < math.inf
        if not number and guidance not in GUIDANCE_DISTRIBUTIONS:
            names = ", ".join(GUIDANCE_DISTRIBUTIONS)
            raise ValueError(f"got {guidance!r}, expected a weight >= 0 (1: none) or a distribution: {names}")
        return guidance

    @property
    def distribution(self) -> GuidanceDistribution | None:
        """The distribution of the pairs' guidance weights; None where all have the same."""
        return self.guidance if isinstance(self.guidance, str) else None

    @model_validator(mode="after")
    def _shards(self) -> PairsStage:
        if self.shard % self.batch:
            raise ValueError(f"shard: got {self.shard}, expected a multiple of batch ({self.batch})")
        if self.flip and self.direction == "sample":
            raise ValueError("flip mirrors images that are inverted; drop it, or direction: sample")
        if self.upscales is not None and self.direction != "sample":
            raise ValueError(f"upscales: got {self.upscales!r} with direction: invert; write direction: sample")
        return self


class EstimateStage(TrainedStage):
    """Train an estimator of the guidance weight that an image was sampled with (PaGoDA, arXiv 2405.14822).

    It trains on `pairs` sampled with weights of a distribution. A tenth of them is held out. Network and settings are
    ours.
    """

    pairs: str
    snapshot_every: int | None = Field(0, ge=0)

    @model_validator(mode="after")
    def _of_descriptions(self) -> EstimateStage:
        images = {
            "noise",
            "weighting",
            "weighting_bias",
            "multiscale",
            "cond_dropout",
            "flip",
            "workers",
            "bad_limit",
            "sample_every",
        }
        odd = (images | {"activation_checkpointing"}) & self.model_fields_set
        if odd:
            raise ValueError(f"{min(odd)}: an estimator trains on its teacher's features, not on images; drop it")
        return self


class EvaluateStage(SamplingSpec):
    """Sample held-out prompts, score the samples with the checker (scenes), and measure the held-out error.

    Sampling settings that are left out are the checkpoint's. `metrics`: what else is measured, by the names of
    `pixelgrow evaluate`, with the held-out images as the real ones, and the recipe's data as the training images of
    fd-ratio. `extractor`: one name or several. `seeds`: the number of sampling seeds, from the recipe's on.
    `reference`: a file of the real images' statistics, written if it is not there. `questions`, `form`, `vqa`,
    `detector`: as of `pixelgrow evaluate`; the prompts are then those of the file.
    """

    free: ClassVar[frozenset[str]] = frozenset({"batch"})

    name: str = Field(pattern=NAME)
    parent: str | None = Field(None, alias="from")
    prompts: int = Field(256, ge=1)
    batch: int = Field(64, ge=1)
    metrics: tuple[str, ...] | None = None
    extractor: tuple[str, ...] | None = None
    seeds: int | None = Field(None, ge=1)
    reference: Path | None = None
    questions: Path | None = None
    form: Literal["dsg", "geneval2", "gecko"] | None = None
    vqa: str | None = None
    detector: str | None = None

    @field_validator("extractor", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _measurable(self) -> EvaluateStage:
        names = check_names(self.metrics or ())
        if self.questions is None:
            if odd := [name for name in names if name in ("dsg", "soft-tifa")]:
                raise ValueError(f"metrics: {odd[0]} takes questions: a file of prompts with questions; add it")
            if odd := [key for key in ("form", "vqa", "detector") if getattr(self, key) is not None]:
                raise ValueError(f"{odd[0]} is for questions; add questions, or drop it")
        elif odd := [name for name in names if name not in OF_QUESTIONS]:
            raise ValueError(f"metrics: {odd[0]} is of held-out images, and questions has prompts of its own: drop one")
        if of_features(names) and self.prompts < LEAST:
            raise ValueError(f"prompts: got {self.prompts}, expected at least {LEAST} for {of_features(names)[0]}")
        check_numbers(names, self.prompts, None)
        if self.reference is not None and not takes(names, "real"):
            raise ValueError("reference is for metrics that compare with real images, such as fd; add one, or drop it")
        if self.reference is not None and len(self.extractor or ()) > 1:
            raise ValueError(f"reference is of one extractor, got {len(self.extractor or ())}; name one")
        if self.extractor is not None and not of_features(names):
            raise ValueError("extractor is for metrics of features, such as fd; add metrics: [fd], or drop it")
        return self


Stage = TrainStage | GrowStage | PairsStage | EstimateStage | DistillStage | EvaluateStage
VERBS: dict[str, type[Stage]] = {
    "train": TrainStage,
    "grow": GrowStage,
    "pairs": PairsStage,
    "estimate": EstimateStage,
    "distill": DistillStage,
    "evaluate": EvaluateStage,
}


def makes_generator(stage: Stage | ModelStage) -> bool:
    """Whether a stage makes a one-step generator."""
    return isinstance(stage, DistillStage) or (isinstance(stage, GrowStage) and stage.pairs is not None)


def wrong_kind(stage: Stage, parent: str, generator: bool) -> str | None:
    """What is wrong with a stage whose parent is a one-step `generator`, or a denoiser; None if nothing is."""
    if isinstance(stage, EvaluateStage):
        return None
    if not isinstance(stage, GrowStage):
        return f"from: {parent} is a one-step generator, expected a multi-step model; name one" if generator else None
    if generator and stage.pairs is None:
        return f"{parent} is a one-step generator: add pairs: and the stage of its pairs"
    if not generator and stage.pairs is not None:
        return f"pairs: {parent} is a multi-step model, which grows without pairs; drop it"
    return None


MAX_PREVIEW = 64  # prompts of a recipe's `preview`


def _texts(given: Any) -> Any:
    """One prompt or several; numbers are labels of classes."""
    many = given if isinstance(given, list | tuple) else [given]
    return [str(one) if type(one) is int else one for one in many]


class Parallel(Spec):
    """How the processes of a run share a network.

    `shard`: so many of them have one copy of its weights, averages and optimizer state together. It divides the number
    of processes, changes results in rounding alone, and may change at any time.
    """

    shard: int = Field(1, ge=1)


class Head(Spec):
    """A recipe without its stages.

    `preview`: prompts that every stage that trains samples from time to time, to be looked at (`samples/`); held-out
    captions if there are none. They change no weight, and may change at any time.
    """

    name: str = Field(pattern=NAME)
    seed: int = 0
    preview: Annotated[tuple[str, ...], BeforeValidator(_texts)] = Field((), max_length=MAX_PREVIEW)
    text: TextSpec = TextSpec()
    latent: LatentSpec | None = None
    data: Mixture
    heldout: HeldoutSpec = HeldoutSpec()
    parallel: Parallel = Parallel()


class Recipe(Head):
    """A whole recipe. `pixelgrow.recipe.read.load_recipe` reads one."""

    stages: tuple[Stage, ...] = Field(min_length=1)

    def stage(self, name: str) -> Stage:
        """The stage of a name."""
        return next(s for s in self.stages if s.name == name)
