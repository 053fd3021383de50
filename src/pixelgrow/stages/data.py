"""The data of a run's stages: opens sources once, holds a part out, and says how data differ from an earlier run's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any

from pixelgrow.data.account import Account, account_of
from pixelgrow.data.buckets import Shapes, usable
from pixelgrow.data.order import Permutation
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.data.sources.base import Lanes, Source, Subset, heldout_split, large_enough
from pixelgrow.data.sources.folders import ClassFolder, PairedFolder
from pixelgrow.data.sources.identity import FORM, differences, frame_and_samples, write_samples
from pixelgrow.data.sources.index import FileSource
from pixelgrow.data.sources.opening import open_mixture
from pixelgrow.errors import UserError
from pixelgrow.recipe.data import DataSpec
from pixelgrow.recipe.stages import DistillStage, GrowStage, ModelStage, PairsStage, Recipe, Stage
from pixelgrow.rng import Key

SAMPLES = "data"  # in a run's folder: lists of samples, to name the files that differ
Origin = tuple[Source, int]  # a source and the number of one of its samples


@dataclass(frozen=True)
class Mixture:
    """Sources to train on. `weights`: their shares; None for shares in proportion to their sizes."""

    sources: list[Source]
    weights: list[float] | None

    def describe(self) -> list[dict[str, Any]]:
        """Names, fingerprints and weights, for `stage.json`."""
        weights: Sequence[float | None] = self.weights or [None] * len(self.sources)
        return [
            {"source": s.name, "fingerprint": s.fingerprint, "weight": w} | _lanes(s)
            for s, w in zip(self.sources, weights, strict=True)
        ]


@dataclass
class StageData:
    """The sources of a recipe's stages. Each is indexed once a run, when it is first needed.

    `folder`: the run's; None where nothing is run.
    """

    recipe: Recipe
    folder: Path | None
    classes: tuple[str, ...] = field(default=(), init=False)  # names of classes by label
    _opened: dict[tuple[DataSpec, ...], tuple[Mixture, list[Source]]] = field(default_factory=dict, init=False)

    def specs(self, stage: ModelStage | PairsStage) -> tuple[DataSpec, ...]:
        """The data that a stage trains on: those of its pairs; else its own; else the recipe's."""
        if isinstance(stage, DistillStage | GrowStage) and stage.pairs is not None:
            made = self.recipe.stage(stage.pairs)
            assert isinstance(made, PairsStage)
            stage = made
        return stage.data if stage.data is not None else self.recipe.data

    def mixture(self, stage: ModelStage | PairsStage) -> Mixture:
        """The opened sources that a stage trains on, without their held-out part."""
        return self._open(self.specs(stage))[0]

    @property
    def whole(self) -> Mixture:
        """The opened sources of the recipe, without their held-out part."""
        return self._open(self.recipe.data)[0]

    @cached_property
    def heldout_sources(self) -> list[Source]:
        """The held-out sources, the same for every stage of a run."""
        spec = self.recipe.heldout
        if not spec.source:
            return self._open(self.recipe.data)[1]
        sources, _ = open_mixture(spec.opening)
        self._check_place(sources)
        self.check_classes(sources)
        return sources

    def images(self, stage: ModelStage | PairsStage, shapes: Shapes) -> Account:
        """How many images of some shapes, in pixels, a stage uses, to train on or to make pairs of."""
        mixture = self.mixture(stage)
        account = account_of(mixture.sources, shapes)
        if isinstance(stage, PairsStage) and mixture.weights is None:
            account = account.but("beyond n", max(0, account.seen - stage.n))
        return account

    def prompts(self, count: int, size: tuple[int, int], unreadable: int = 0) -> Account:
        """How many held-out images an evaluation on `count` prompts at `size` (h, w) pixels uses.

        `unreadable`: number of images that could not be decoded.
        """
        held = self.heldout_sources
        if self.recipe.heldout.source:
            account = account_of(held, Shapes(size))
        else:  # the account of the stages that train covers the rest of these sources
            small = sum(len(source) - len(large_enough(source, size)) for source in held)
            account = Account(sum(map(len, held)), {"too small": small})
        account = replace(account.but("bad", unreadable), things="held-out images")
        return account.but("beyond prompts", max(0, account.seen - count))

    def heldout_order(self, shapes: Shapes) -> Iterator[Origin]:
        """Held-out samples that have one of some shapes, in pixels, one of each source in turn.

        Scenes keep their order. Files are shuffled, in the same order for all shapes.
        """
        return _in_turn(self.heldout_sources, shapes, self.recipe.seed, "held-out order")

    def training_order(self, mixture: Mixture, shapes: Shapes) -> Iterator[Origin]:
        """Samples of a mixture as `heldout_order` has those held out."""
        return _in_turn(mixture.sources, shapes, self.recipe.seed, "order to look at")

    def check_apart(self, sources: Sequence[Source]) -> None:
        """Raise UserError if a source is both trained on and held out, or scenes of both have the same split."""
        for source, held in product(sources, self.heldout_sources):
            if isinstance(source, Scenes) and isinstance(held, Scenes) and source.split == held.split:
                raise UserError(
                    f"scenes to train on and held-out scenes both have split: {held.split}, so nothing is held out: "
                    "write split: train into data and split: heldout into heldout"
                )
            if frame_and_samples(source.fingerprint)[1] == frame_and_samples(held.fingerprint)[1]:
                raise UserError(
                    f"{source.name} is trained on and held out: name another source in heldout, or write heldout: "
                    "{fraction: 0.02} to hold out a part of it"
                )

    def describe(self, stage: Stage) -> dict[str, Any]:
        """Names and fingerprints of a stage's sources, for `stage.json`."""
        found: dict[str, Any] = {
            "heldout": [{"source": s.name, "fingerprint": s.fingerprint} for s in self.heldout_sources]
        }
        if isinstance(stage, ModelStage | PairsStage):
            found["data"] = self.mixture(stage).describe()
        return found

    def explain(self, stage: Stage, key: str, was: Any) -> str:
        """How a source differs from the one with the fingerprint `was`, in words.

        `key`: of `describe(stage)`; "" is returned for keys that are not fingerprints. Raises UserError if the
        fingerprint is one of an earlier version, which cannot be compared.
        """
        found = re.fullmatch(r"(data|heldout)\[(\d+)\]\.fingerprint", key)
        sources = self._used(stage)[found[1]] if found else []
        number = int(found[2]) if found else 0
        if not isinstance(was, str) or number >= len(sources):
            return ""
        source = whole(sources[number])
        if not isinstance(source, FileSource):
            return "the data (scenes: their n, captions, seed or split) changed since it was begun"
        assert self.folder is not None
        if not was.startswith(FORM):
            raise UserError(
                f"stage {stage.name!r}: an earlier version began it and identified {source.name} by the times of its "
                "files, so this version cannot check that it is unchanged: give the recipe another name, or delete "
                f"{self.folder / stage.name} and the stages made from it"
            )
        if frame_and_samples(was)[0] != frame_and_samples(source.fingerprint)[0]:
            return f"the ground, fit or buckets of {source.name} changed since it was begun"
        if was.startswith(source.fingerprint):
            return f"what is held out of {source.name} changed since it was begun (heldout or seed)"
        what = differences(self.folder / SAMPLES, was[: len(source.fingerprint)], source)
        return f"{source.name} changed since it was begun{what and ': '}{what}"

    def list_samples(self, stage: Stage) -> None:
        """Write lists of the samples in a stage's sources of files to the run's folder, for `explain`."""
        assert self.folder is not None
        for source in map(whole, chain(*self._used(stage).values())):
            if isinstance(source, FileSource):
                write_samples(self.folder / SAMPLES, source)

    def _used(self, stage: Stage) -> dict[str, list[Source]]:
        """The sources of a stage under the keys of `describe`."""
        data = self.mixture(stage).sources if isinstance(stage, ModelStage | PairsStage) else []
        return {"data": data, "heldout": self.heldout_sources}

    def _open(self, specs: tuple[DataSpec, ...]) -> tuple[Mixture, list[Source]]:
        """The mixture without its held-out part, and the held-out sources."""
        if specs not in self._opened:
            self._opened[specs] = self._index(specs)
        return self._opened[specs]

    def _index(self, specs: tuple[DataSpec, ...]) -> tuple[Mixture, list[Source]]:
        sources, weights = open_mixture([spec.opening | _weight(spec) for spec in specs])
        self._check_place(sources)
        self.check_classes(sources)
        held: list[Source] = []
        for i, source in enumerate(sources):
            if isinstance(source, Scenes):  # they have a split of held-out captions
                held.append(Scenes(n=1024, captions=1024, seed=source.seed, split="heldout"))
            elif not self.recipe.heldout.source:
                spec = self.recipe.heldout
                sources[i], rest = heldout_split(source, spec.fraction, self.recipe.seed, at_most=spec.at_most)
                held.append(rest)
        return Mixture(sources, weights), held

    def _check_place(self, sources: Sequence[Source]) -> None:
        """Raise UserError if the run writes its own images into a folder that it trains on."""
        for source in sources:
            if self.folder is None or not isinstance(source, ClassFolder | PairedFolder):
                continue
            if self.folder.resolve().is_relative_to(Path(source.name).resolve()):
                raise UserError(
                    f"{self.folder}: this run's folder lies in {source.name}, whose images it trains on, and its own "
                    "would be among them; name a folder elsewhere with --runs"
                )

    def check_classes(self, sources: Sequence[Source]) -> None:
        """Raise UserError unless the sources fit the recipe's text: captions for an encoder, classes for labels.

        All sources must have the same classes, no more than the recipe says.
        """
        spec = self.recipe.text
        for source in sources:
            names: tuple[str, ...] = getattr(source, "classes", ())
            if not names and spec.classes:
                raise UserError(
                    f"{source.name} has captions, not class folders, and the recipe says text: {{classes: "
                    f"{spec.classes}}}: write text: {{encoder: minilm}}, or name a folder of class folders"
                )
            if not names:
                continue
            if not spec.classes:
                raise UserError(
                    f"{source.name} has class folders, not captions, and the text encoder {spec.encoder!r} reads "
                    f"captions: write text: {{classes: {len(names)}}} into the recipe, or put a metadata.jsonl or a "
                    ".txt beside each image"
                )
            if len(names) > spec.classes:
                raise UserError(
                    f"{source.name} has {len(names)} class folders, the recipe says text: {{classes: {spec.classes}}}: "
                    f"write {{classes: {len(names)}}}"
                )
            if self.classes not in ((), names):
                raise UserError(
                    f"{source.name} has folders of other classes ({_some(names)}) than the data before it "
                    f"({_some(self.classes)}), so a label would mean two things: give both the same folders"
                )
            self.classes = names


def whole(source: Source) -> Source:
    """The source itself, or the whole source of a subset."""
    return source.parent if isinstance(source, Subset) else source


def _in_turn(sources: Sequence[Source], shapes: Shapes, *keys: Key) -> Iterator[Origin]:
    """Samples of some shapes, one of each source in turn; those of files in an order of `keys`."""
    turns = []
    for source in sources:
        numbers: Iterator[int] = iter(range(len(source)))
        if not isinstance(source, Scenes):
            shaped = usable(source, shapes)
            numbers = filter(shaped.__contains__, Permutation(len(source), *keys))
        turns.append(_each(source, numbers))
    while turns:
        for turn in list(turns):
            item = next(turn, None)
            if item is None:
                turns.remove(turn)
            else:
                yield item


def _each(source: Source, numbers: Iterator[int]) -> Iterator[Origin]:
    return ((source, i) for i in numbers)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _lanes(source: Source) -> dict[str, int]:
    lanes: Lanes | None = getattr(source, "lanes", None)
    return {} if lanes is None else {"lanes": lanes.count, "window": lanes.window}


def _weight(spec: DataSpec) -> dict[str, float]:
    return {} if spec.weight is None else {"weight": spec.weight}
