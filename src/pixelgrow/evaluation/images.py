"""What is evaluated: a model of ours, a folder of images, a diffusers pipeline. Each gives images batch by batch."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pixelgrow import checkpoint
from pixelgrow.data.account import account_of
from pixelgrow.data.buckets import square
from pixelgrow.data.images import BadImage
from pixelgrow.data.order import Permutation
from pixelgrow.data.sources.base import Source, bad_of, sizes_of
from pixelgrow.data.sources.opening import open_images
from pixelgrow.diffusion.sampling_spec import SamplingSpec
from pixelgrow.errors import UserError
from pixelgrow.external import hub
from pixelgrow.external.pipeline import INDEX, Pipeline, is_pipeline
from pixelgrow.model import RECORD, Model, OneStepModel, Sampler, builtin
from pixelgrow.pictures import to_uint8
from pixelgrow.writing import read_json, reading

STEPS = 16  # of a multi-step model whose checkpoint names none: half of `sample`'s, see docs/evaluation.md
BATCH = 16  # images sampled at a time: on a CPU, more leave its caches
Conditions = Literal["text", "classes", "nothing"]
logger = logging.getLogger(__name__)


def device() -> torch.device:
    """Where an evaluation's networks compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Made:
    """images: uint8 (B, 3, h, w) on the CPU. nfe: network evaluations spent on each, None where nobody knows. sums: of
    what the candidate itself measures on its images."""

    images: Tensor
    nfe: int | None = None
    sums: Mapping[str, Tensor] = field(default_factory=dict)


class Candidate(Protocol):
    """Something that makes, or has, images of `size` (h, w) in pixels.

    name        as it was given; no part of what it is
    conditions  what it makes images of
    prompts     of the images that it has; None if it makes images of any prompt
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def conditions(self) -> Conditions: ...
    @property
    def prompts(self) -> Sequence[str] | None: ...

    def describe(self) -> dict[str, Any]:
        """What repeating needs, as JSON: kind, hash, parameters, sampling settings; not the name."""
        ...

    def make(self, prompts: Sequence[str], numbers: Sequence[int], seed: int) -> Made:
        """Images of prompts, each a function of (seed, its number, its prompt). Raises UserError if some are not
        finite."""
        ...


def open_candidate(
    name: str, sampling: SamplingSpec | None = None, *, batch: int = BATCH
) -> OfModel | OfFolder | OfPipeline:
    """The candidate that a name means: a checkpoint, stage or built-in model, a folder of images, a diffusers pipeline.

    `owner/name` is looked up on the hub where no such folder exists. Raises UserError for what is none of these, and
    for sampling settings that it does not take.
    """
    given = {} if sampling is None else sampling.given
    folder = Path(name).expanduser()
    with reading(name):
        here, is_file = folder.is_dir(), folder.is_file()
        ours = any((f / checkpoint.CONFIG).is_file() for f in (folder, folder / "checkpoint"))
        of_a_run = here and ((folder / RECORD).is_file() or any(folder.glob(f"*/{RECORD}")))
    if here and is_pipeline(folder):
        return OfPipeline(name, given)
    if (here and not ours and not of_a_run) or is_file:
        return OfFolder(name, given)
    if not here and name not in builtin() and hub.is_repository(name):
        fetched = hub.fetch(name, [INDEX, checkpoint.CONFIG])
        if is_pipeline(fetched):
            return OfPipeline(name, given)
    return OfModel(name, given, batch)


class OfModel:
    """Samples of a model of ours, by its averaged weights in its checkpoint."""

    prompts = None

    def __init__(self, name: str, given: dict[str, Any], batch: int, model: Model | None = None) -> None:
        self.name, self.batch = name, batch
        self.model = Model.from_pretrained(name) if model is None else model
        one_step = isinstance(self.model, OneStepModel)
        self.given = given if one_step else {"steps": self.model.config.sampling.get("steps", STEPS)} | given
        self.sampling = ({} if one_step else {"grid": "karras"}) | self.model.settings(**self.given)
        self.size = (self.model.side, self.model.side)
        labels = str(self.model.config.text.get("encoder")).startswith("labels:")
        self.conditions: Conditions = "classes" if labels else "text"
        self._sampler: tuple[int, Sampler] | None = None
        self.sampler(0)  # refuses wrong settings

    def varied(self, setting: str, value: Any) -> OfModel:
        """The same model with another sampling setting."""
        return OfModel(self.name, self.given | {setting: value}, self.batch, self.model)

    def sampler(self, seed: int) -> Sampler:
        """The sampling function of a seed."""
        if self._sampler is None or self._sampler[0] != seed:
            self._sampler = seed, self.model.sampler(seed=seed, batch=self.batch, **self.given)
        return self._sampler[1]

    def describe(self) -> dict[str, Any]:
        return describe_model(self.model) | {"sampling": self.sampling}

    def make(self, prompts: Sequence[str], numbers: Sequence[int], seed: int) -> Made:
        found = self.sampler(seed)(self.model.conditions(prompts), numbers, None)
        return Made(eight_bit(self.model.decode(found.images), self.name, numbers), found.nfe)


def describe_model(model: Model) -> dict[str, Any]:
    """What makes a model of ours the same, as JSON."""
    config = model.config
    return {
        "kind": "model",
        "objective": config.objective,
        "sha256": config.sha256 or hash_of(model.network),  # a stage that is not finished has no hash
        "lineage": config.lineage,
        "average": average_of(model.origin, config),
        "text": checkpoint.identity(config.text),
        "latent": checkpoint.identity(config.latent),
        "parameters": {"network": sum(p.numel() for p in model.network.parameters())},
    }


def hash_of(network: nn.Module) -> str:
    """SHA-256 of a network's tensors."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def average_of(folder: Path, config: checkpoint.CheckpointConfig) -> dict[str, Any] | None:
    """Which average of the weights a checkpoint has: {"length": sigma_rel}, and of how many images; None if unknown."""
    last: dict[str, Any] = next((e for e in reversed(config.lineage) if e.get("verb") != "cast"), {})
    if last.get("verb") == "average":
        return {k: last[k] for k in ("length", "images") if k in last}
    folder = folder.resolve()
    stage = folder if (folder / RECORD).is_file() else folder.parent  # of one that is not finished, or of a checkpoint
    with reading(stage):
        record = read_json(stage / RECORD) or {}
    lengths = record.get("settings", {}).get("ema")
    return {"length": lengths[0]} if lengths and last.get("stage") == stage.name else None


class OfFolder:
    """A folder of images of one size, made by any program; or a tar of them.

    Prompts are its captions, if it has a metadata file or a .txt beside each image. The images are shuffled, always in
    the same order, so that the first of them are a sample of all.
    """

    conditions: Conditions = "nothing"

    def __init__(self, name: str, given: dict[str, Any]) -> None:
        if given:
            raise UserError(f"{', '.join(given)}: {name} is a folder of images, which are there already; drop it")
        self.name = name
        self.source: Source = open_images(name)
        logger.info("%s: %s", name, account_of([self.source], square(1)).line())
        if bad := bad_of(self.source):
            raise UserError(
                f"{name}: {len(bad)} of its images cannot be read (the first: {bad[0].key}: {bad[0].reason}); expected "
                "all of them, as the number of images counts: repair or remove them"
            )
        sizes, where = np.unique(sizes_of(self.source), axis=0, return_index=True)
        if len(sizes) > 1:
            (a, b), (i, j) = sizes[:2], where[:2]
            raise UserError(
                f"{name}: images of {len(sizes)} sizes ({self.source.key(int(i))}: {a[0]}x{a[1]}, "
                f"{self.source.key(int(j))}: {b[0]}x{b[1]}); expected one size: put each size into a folder of its own"
            )
        self.size = (int(sizes[0][0]), int(sizes[0][1]))
        self.order = Permutation(len(self.source), "evaluation")  # as of real images
        texts = [self.source.text(self.order[i]) for i in range(len(self.source))]
        self.prompts: list[str] = texts if all(texts) else [""] * len(texts)

    def varied(self, setting: str, value: Any) -> OfFolder:
        """Raises UserError."""
        raise UserError(f"{setting}: {self.name} is a folder of images, which are there already; drop the sweep")

    def describe(self) -> dict[str, Any]:
        return {"kind": "folder", "fingerprint": self.source.fingerprint, "images": len(self.source)}

    def make(self, prompts: Sequence[str], numbers: Sequence[int], seed: int) -> Made:
        images = []
        for i in (self.order[number] for number in numbers):
            try:
                images.append(self.source.image(i, self.size))
            except BadImage as bad:
                raise UserError(
                    f"{self.name}: {self.source.key(i)} cannot be read ({bad.reason}); expected all of its images: "
                    "repair or remove it"
                ) from None
        return Made(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous())


class OfPipeline:
    """Samples of a diffusers pipeline."""

    prompts = None

    def __init__(self, name: str, given: dict[str, Any], pipeline: Pipeline | None = None) -> None:
        self.name, self.given = name, given
        self.pipeline = pipeline or Pipeline(name, device())
        self.pipeline.check(given)
        self.conditions: Conditions = self.pipeline.conditions
        first = "0" if self.conditions == "classes" else ""
        h, w = self.make([first], [0], 0).images.shape[-2:]  # no setting of a pipeline tells it
        self.size = (h, w)

    def varied(self, setting: str, value: Any) -> OfPipeline:
        """The same pipeline with another setting."""
        return OfPipeline(self.name, self.given | {setting: value}, self.pipeline)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "pipeline",
            "class": self.pipeline.class_name,
            "sha256": self.pipeline.sha256,
            "parameters": self.pipeline.parameters,
            "sampling": self.given,
        }

    def make(self, prompts: Sequence[str], numbers: Sequence[int], seed: int) -> Made:
        images, nfe = self.pipeline(prompts, numbers, seed, self.given)
        return Made(eight_bit(2 * images - 1, self.name, numbers), nfe)


def eight_bit(images: Tensor, name: str, numbers: Sequence[int]) -> Tensor:
    """Images (B, 3, h, w) in [-1, 1] as uint8 on the CPU. Raises UserError if some are not finite."""
    bad = [n for n, ok in zip(numbers, images.isfinite().flatten(1).all(1).tolist(), strict=True) if not ok]
    if bad:
        raise UserError(
            f"{name}: {len(bad)} of images {numbers[0]} to {numbers[-1]} hold NaN or infinity (the first: {bad[0]}); "
            "expected finite pixels: try an earlier checkpoint, or float32"
        )
    return torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2).contiguous()
