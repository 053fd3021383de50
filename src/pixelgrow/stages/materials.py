"""What the stages of a run share: data, held-out images, the text cache, the autoencoder, the device."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pixelgrow import precision
from pixelgrow.data.account import Account
from pixelgrow.data.badfiles import BadFiles, check_share
from pixelgrow.data.buckets import Shapes
from pixelgrow.data.loader import Encoded, Loader, has_several, mirrored, some_usable
from pixelgrow.data.sources.base import Source, Subset, bad_of
from pixelgrow.data.sources.latents import Latents
from pixelgrow.data.sources.streamed import StreamedShards
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.generator import Generator
from pixelgrow.distributed import Shards, Team
from pixelgrow.distributed.shard import mesh_of, split
from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.questions import load_questions
from pixelgrow.evaluation.features import Extractor, load_extractor
from pixelgrow.evaluation.judges import QuestionJudge
from pixelgrow.evaluation.measures import EXTRACTOR, of_features, takes
from pixelgrow.evaluation.planning import OF_FORMS, Asked, judge_of
from pixelgrow.external.autoencoder import Autoencoder
from pixelgrow.external.vision import describe_clip
from pixelgrow.model import find
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import PIXELS, NetConfig, Space
from pixelgrow.onestep.networks import networks_used
from pixelgrow.recipe.stages import (
    DistillStage,
    EstimateStage,
    EvaluateStage,
    GrowStage,
    ModelStage,
    PairsStage,
    Recipe,
    Stage,
    TrainStage,
    is_folder,
)
from pixelgrow.stages.data import Mixture, Origin, StageData, whole
from pixelgrow.stages.examples import Examples, decodable, same
from pixelgrow.text.cache import TextCache
from pixelgrow.text.encoders import as_labels, width_of
from pixelgrow.text.online import OfWidth, OnlineText
from pixelgrow.training.denoise import Conditions
from pixelgrow.training.log import duration
from pixelgrow.training.loop import CHECKPOINT
from pixelgrow.training.settings import TrainSettings

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

BAD_FILES = "bad_files.jsonl"  # in a stage's folder
LOOKED_AT = 4096  # captions that stand for all, where not all are read
PAUSE = 15.0  # seconds between two lines of progress
logger = logging.getLogger(__name__)


def shapes_of(stage: Stage | ModelStage, config: NetConfig) -> Shapes:
    """The shapes of the images that a stage works on: those of buckets where it trains a denoiser. `config`: of its
    network."""
    denoiser = isinstance(stage, TrainStage) or (isinstance(stage, GrowStage) and stage.pairs is None)
    return Shapes((config.resolution, config.resolution), config.stride if denoiser else None)


@dataclass(frozen=True)
class MadePairs:
    """The folder of a stage's pairs, the stage that made them, and the checkpoint folder of their teacher."""

    folder: Path
    stage: PairsStage
    teacher: Path


@dataclass
class Materials:
    """What the stages of a run share. Each part is opened once, when it is first used.

    team: the processes of the run; the first one makes what all need, and writes all files.
    """

    recipe: Recipe
    folder: Path
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    team: Team = field(default_factory=Team)
    _said: set[str] = field(default_factory=set, init=False)
    _extractors: dict[str, Extractor] = field(default_factory=dict, init=False)
    _judges: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    note: Callable[[str, Any], None] = field(default_factory=lambda: _forget, init=False)  # of the stage's record

    @cached_property
    def data(self) -> StageData:
        """The sources of the recipe."""
        return StageData(self.recipe, self.folder)

    @cached_property
    def text(self) -> TextCache | OnlineText:
        spec = self.recipe.text
        if spec.online:
            return OnlineText(spec.encoder, spec.max_tokens, device=self.device)
        return TextCache(text_folder(self.recipe, self.folder), spec.encoder, spec.max_tokens, device=self.device)

    def conditions(self, settings: TrainSettings) -> Conditions:
        """The text of a training: under `compile`, all captions are padded to one length."""
        return OfWidth(self.text, width_of(self.recipe.text.max_tokens)) if settings.compile else self.text

    @cached_property
    def autoencoder(self) -> Autoencoder | None:
        """The autoencoder between pixels and the stages' images; None if the stages work on pixels."""
        spec = self.recipe.latent
        return Autoencoder(spec.autoencoder, self.device) if spec else None

    @property
    def space(self) -> Space:
        """Channels and range of the stages' images."""
        return self.autoencoder.space if self.autoencoder else PIXELS

    @property
    def factor(self) -> int:
        """Pixels per side of one latent; 1 without an autoencoder."""
        return self.autoencoder.factor if self.autoencoder else 1

    @property
    def latent(self) -> dict[str, str]:
        """Name and fingerprint of the autoencoder, for checkpoints and `stage.json`; empty for pixels."""
        made = self.autoencoder
        return {"autoencoder": made.name, "fingerprint": made.fingerprint} if made else {}

    def decode(self, images: Tensor) -> Tensor:
        """The stages' images (B, C, h, w) as pixels (B, 3, H, W) in [-1, 1]."""
        return self.autoencoder.decode(images) if self.autoencoder else images

    def patches(self, model: Denoiser | Generator) -> list[int]:
        """Sides of a model's patches in pixels: where seams would show."""
        return [self.factor * side for side in model.net.config.patches]

    def seen(self, sources: Sequence[Source], side: int) -> list[Source]:
        """The sources as a stage of `side` trains on them: as they are, or encoded to latents."""
        if self.autoencoder is None:
            return list(sources)
        folder = self.folder / "latents"
        made = [Latents(source, self.autoencoder, self.space.channels, folder) for source in sources]
        for latents in made:
            self.team.alone(partial(latents.make, (side, side)))
            latents.make((side, side))  # what is made is opened
        return list(made)

    def pairs_of(self, stage: DistillStage | GrowStage | EstimateStage) -> MadePairs:
        """The pairs that a stage names."""
        made = self.recipe.stage(str(stage.pairs))
        assert isinstance(made, PairsStage) and made.parent is not None
        return MadePairs(self.folder / made.name, made, self.checkpoint(made.parent))

    def checkpoint(self, parent: str) -> Path:
        """The checkpoint folder that a `from` names: of a stage of this run, or any other."""
        return find(parent) if is_folder(parent) else self.folder / parent / CHECKPOINT

    def sees(self, stage: str, *accounts: Account) -> None:
        """Log how many of its images a stage uses, and write it into the stage's record."""
        for account in accounts:
            self._say(logging.INFO, f"{stage}: {account.line()}")
        self.note("sees", [account.stored() for account in accounts])

    def _say(self, level: int, line: str) -> None:
        """Log a line, once: a stage of two phases would repeat it."""
        if line not in self._said:
            self._said.add(line)
            logger.log(level, "%s", line)

    def images(self, stage: ModelStage | PairsStage, shapes: Shapes) -> Account:
        """How many images of some shapes, which a stage works on, it trains on or makes pairs of."""
        return self.data.images(stage, shapes.times(self.factor))

    def shards(self, part: str, model: Denoiser | Generator, settings: TrainSettings) -> Shards:
        """The model that trains as a part, sharded if the recipe says so."""
        if self.mesh is None:
            return Shards()
        dtype, last = precision.training_dtype(settings.precision, self.device), list(model.net.exit.values())
        return Shards({part: split(model, model.net.blocks, last, self.mesh, self.device, dtype, self.team)})

    @cached_property
    def mesh(self) -> DeviceMesh | None:
        """Which processes share a network; None if none do."""
        return mesh_of(self.team, self.recipe.parallel.shard, self.device)

    def loader(self, mixture: Mixture, shapes: Shapes, settings: TrainSettings, seed: int, bad_path: Path) -> Loader:
        """A loader of training images of some shapes. `bad_path`: the list of bad files."""
        if self.autoencoder is None:  # else the images are here, encoded
            here = min(1.0, int(os.environ.get("LOCAL_WORLD_SIZE", self.team.size)) / self.team.size)
            for source in map(whole, mixture.sources):
                if isinstance(source, StreamedShards):
                    for line in source.advice(settings.batch, settings.accumulate, here):
                        self._say(logging.WARNING, line)
        return Loader(
            self.seen(mixture.sources, shapes.size[0]),
            mixture.weights,
            size=shapes.size,
            stride=shapes.stride,
            batch=settings.micro_batch,
            group=settings.batch,
            seed=seed,
            flip=settings.flip,
            workers=settings.workers,
            bad_limit=settings.bad_limit,
            bad_path=bad_path if self.team.first else None,
            device=self.device,
            text=self._encoded(settings),
        )

    def _encoded(self, settings: TrainSettings) -> Encoded | None:
        """The encodings that a loader sends with its images."""
        if isinstance(self.text, OnlineText):
            return None
        return OfWidth(self.text, width_of(self.recipe.text.max_tokens)) if settings.compile else self.text

    def heldout(self, n: int, shapes: Shapes) -> Examples:
        """Up to `n` held-out images of some shapes, centre crops; the same ones at every call.

        Images that are unreadable or have none of the shapes are passed over.
        """
        found = self._examples(n, shapes, self.data.heldout_order)
        if not found:
            raise self._none_held_out(found.size)
        return found

    def trained(self, n: int, shapes: Shapes) -> Examples:
        """Up to `n` of the recipe's training images, as `heldout` has them."""
        return self.known(self.data.whole, n, shapes)

    def known(self, mixture: Mixture, n: int, shapes: Shapes) -> Examples:
        """Up to `n` images of a mixture that is trained on, as `heldout` has them."""
        found = self._examples(n, shapes, partial(self.data.training_order, mixture))
        if not found:
            names = ", ".join(source.name for source in mixture.sources)
            raise UserError(
                f"none of the images of {names} that were looked at can be decoded; pixelgrow data shows why"
            )
        return found

    def _examples(self, n: int, shapes: Shapes, order: Callable[[Shapes], Iterator[Origin]]) -> Examples:
        """The first `n` images of an order that can be decoded; `shapes`: of the stages' images."""
        shapes = shapes.times(self.factor)
        return decodable(n, shapes, order(shapes), self.autoencoder.encode if self.autoencoder else same)

    def _none_held_out(self, size: tuple[int, int]) -> UserError:
        names = ", ".join(s.name for s in self.data.heldout_sources)
        return UserError(f"held-out data ({names}) has no readable image of {size[0]}x{size[1]} or larger; add some")

    def check(self, stage: Stage, shapes: Shapes) -> None:
        """Raise UserError if the data do not serve a stage that works on images of some shapes.

        Some images must be large enough, both to train on and held out, and not too many bad. Training and held-out
        data must differ. A stage with `flip` needs a source that may be mirrored.
        """
        shapes = shapes.times(self.factor)
        if isinstance(stage, ModelStage | PairsStage):
            losses = stage.losses if isinstance(stage, DistillStage | GrowStage) else None
            if losses and self.autoencoder and networks_used(losses):
                raise UserError(
                    f"stage {stage.name!r}: losses: models from outside read pixels, not latents: leave distance and "
                    "discriminator to the teacher, and similarity out"
                )
            if stage.flip and self.autoencoder:
                raise UserError(
                    f"stage {stage.name!r}: flip mirrors images, but each image is encoded to latents once, as it is: "
                    "drop it"
                )
            sources = self.data.mixture(stage).sources
            mirrored(sources, stage.flip)
            if isinstance(stage, PairsStage) and stage.distribution == "mixed" and not has_several(sources):
                raise UserError(
                    f"stage {stage.name!r}: guidance: mixed has a distribution for captions and one for recaptions, "
                    "and each sample has one caption: write guidance: captions, or caption the images anew "
                    "(pixelgrow data recaption)"
                )
            self.data.check_apart(sources)
            for source in sources:
                some_usable(source, shapes)
                check_share(source, {bad.key: bad.reason for bad in bad_of(source)}, stage.bad_limit)
        if next(self.data.heldout_order(shapes), None) is None:
            raise self._none_held_out(shapes.size)

    def account(self, held: Examples, mixture: Mixture, bad: BadFiles) -> None:
        """Add held-out files that could not be read to the account of the source that they were held out of."""
        for source, file in held.bad:
            of = [whole(s) for s in mixture.sources]
            if isinstance(source, Subset) and source.parent in of:
                bad.add(of.index(source.parent), [file])
            else:
                logger.warning("%s: bad file %s: %s", source.name, file.key, file.reason)

    def encode(self, stage: str, captions: Iterable[str]) -> list[str]:
        """Encode every caption that a stage uses into the text cache; warn of those longer than the encoder reads.

        Returns the distinct captions in the first process, none in the others, which need not know them. Captions that
        are encoded while the stage trains are not all read: the first ones are looked at.
        """

        def fill() -> None:
            distinct.extend(dict.fromkeys(islice(captions, LOOKED_AT) if self.recipe.text.online else captions))
            if done := self.text.ensure(distinct, Encoding(stage)):
                logger.info("encoded %s captions", f"{done:,}")
            cut = self.text.cut(distinct)
            if cut.captions:
                self._say(logging.WARNING, f"{stage}: {cut.line()}")
            self.note("cut", asdict(cut))

        distinct: list[str] = []
        self.team.alone(fill)
        if not self.team.first:
            self.text.reload()
        return distinct

    def cond(self, captions: Sequence[str]) -> Cond:
        """The conditions of captions, which are encoded first if they are not in the cache."""
        self.text.ensure(captions)
        return self.text.cond(captions).to(self.device)

    def preview_cond(self) -> Cond:
        """The conditions of the recipe's `preview`. Raises UserError for a class that does not exist.

        They have a cache of their own: encodings depend, in their last bits, on what is encoded beside them, and other
        prompts may not change those of captions.
        """
        prompts, classes = list(self.recipe.preview), self.recipe.text.classes
        if classes:
            return self.text.cond(as_labels(prompts, self.data.classes, classes)).to(self.device)
        spec = self.recipe.text
        if spec.online:
            return self.cond(prompts)
        cache = TextCache(self.folder / "text" / "preview", spec.encoder, spec.max_tokens, device=self.device)
        cache.ensure(prompts)
        if (cut := cache.cut(list(dict.fromkeys(prompts)))).captions:
            self._say(logging.WARNING, f"preview: {cut.line('prompt')}")
        return cache.cond(prompts).to(self.device)

    def spoken(self, captions: Sequence[str]) -> list[str]:
        """Captions in words: the names of classes for labels."""
        names = self.data.classes
        return [names[int(caption)] for caption in captions] if names else list(captions)

    def tokens(self, captions: Sequence[str], batch: int = 64) -> Iterator[Tensor]:
        """The tokens (N, dim) of encoded captions without padding, `batch` captions at a time."""
        for start in range(0, len(captions), batch):
            some = self.text.cond(captions[start : start + batch])
            assert some.tokens is not None and some.mask is not None
            yield some.tokens[some.mask]

    def extractors(self, stage: EvaluateStage) -> list[Extractor]:
        """The feature extractors of an evaluation, none if no metric takes features; each is loaded once."""
        metrics = stage.metrics or ()
        names = stage.extractor or (EXTRACTOR,) if of_features(metrics) else ()
        for name in names:
            if takes(metrics, "texts"):
                describe_clip(name)  # refuses what is none
            if name not in self._extractors:
                self._extractors[name] = load_extractor(name, self.device)
        return [self._extractors[name] for name in names]

    def question_judge(self, stage: EvaluateStage) -> QuestionJudge | None:
        """What answers the file of questions of an evaluation, loaded anew; None if it has none."""
        if stage.questions is None:
            return None
        if self.recipe.text.classes:
            raise UserError(f"stage {stage.name!r}: questions: the recipe makes images of classes, expected captions")
        form = stage.form or "dsg"
        asked = Asked(questions=stage.questions, form=form, vqa=stage.vqa, detector=stage.detector)
        items = load_questions(stage.questions, form)[: stage.prompts]
        judge = judge_of(stage.metrics or (OF_FORMS[form],), [item.prompt for item in items], items, asked)
        assert isinstance(judge, QuestionJudge)
        return judge

    def describe(self, stage: Stage) -> dict[str, Any]:
        """A stage's settings and the fingerprints of what it uses, except its parents, for `stage.json`."""
        spec = self.recipe.text
        settings = stage.model_dump(mode="json", by_alias=True, exclude={"data"})
        settings |= {"seed": self.recipe.seed}
        settings["text"] = {
            "encoder": spec.encoder,
            "max_tokens": spec.max_tokens,
            "fingerprint": self.text.fingerprint,
        }
        if self.autoencoder:
            settings["latent"] = self.latent
        settings |= self.data.describe(stage)
        if isinstance(stage, DistillStage | GrowStage) and stage.losses and (networks := networks_used(stage.losses)):
            settings["networks"] = networks
        if isinstance(stage, EvaluateStage) and (extractors := self.extractors(stage)):
            settings["extractors"] = {e.name: e.identity for e in extractors}
        if isinstance(stage, EvaluateStage) and stage.questions is not None:
            if stage.name not in self._judges:  # what is loaded for this is let go: stages that train come first
                judge = self.question_judge(stage)
                assert judge is not None
                self._judges[stage.name] = judge.describe()
            settings["judge"] = self._judges[stage.name]
        return settings


class Encoding:
    """Logs how far an encoding of captions is, from time to time."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.began = self.said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.said > PAUSE:
            self.said = now
            left = duration((total - done) * (now - self.began) / done)
            logger.info("%s: encoded %s of %s captions, %s left", self.stage, f"{done:,}", f"{total:,}", left)


def text_folder(recipe: Recipe, folder: Path) -> Path:
    """Where a recipe whose run has this folder keeps encoded captions."""
    return Path(recipe.text.cache).expanduser() if recipe.text.cache else folder / "text"


def _forget(name: str, value: Any) -> None:
    """Notes of work that no stage keeps a record of."""
