"""The metrics by name: what each takes, and how it comes out of what was kept of the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.intervals import over_prompts
from pixelgrow.evaluation.alignment.results import Judged, summarise
from pixelgrow.evaluation.alignment.retrieval import Retrieval, retrieval
from pixelgrow.evaluation.kernels import BLOCK, cmmd, kid, mmd
from pixelgrow.evaluation.metrics import (
    GROWING,
    clip_score,
    extrapolated,
    fd_ratio,
    frechet,
    frechet_interval,
    inception_score,
    interval,
    named,
)
from pixelgrow.evaluation.neighbours import neighbours
from pixelgrow.evaluation.reference import Reference
from pixelgrow.evaluation.shards import Shard
from pixelgrow.evaluation.statistics import Gathered, Marginals, Moments

Row = dict[str, Any]
Takes = Literal["real", "captions", "logits", "texts", "train", "judge"]
EXTRACTOR = "efficientnet-lite0"  # needs no hub
LEAST = 10  # images: below, no metric of features says anything
FEWEST = {"kid": BLOCK, "fd-infinity": GROWING}  # images


SHARE, UNBOUNDED = (0.0, 1.0), (-math.inf, math.inf)
PARTS = 10  # of one seed's images, for the interval of a distance


@dataclass(frozen=True)
class Metric:
    """title: as it is printed. higher: whether more is better. takes: beside features of generated images. ends: of its
    range, where intervals end too."""

    title: str
    higher: bool
    takes: tuple[Takes, ...]
    ends: tuple[float, float] = (0.0, math.inf)


METRICS: Mapping[str, Metric] = {
    "fd": Metric("FD", False, ("real",)),
    "fd-infinity": Metric("FD-infinity", False, ("real",), UNBOUNDED),  # a line may end below 0
    "fd-ratio": Metric("FD-ratio", False, ("real", "train")),
    "kid": Metric("KID", False, ("real",), UNBOUNDED),  # unbiased, so that it may be negative
    "mmd": Metric("MMD", False, ("real",), UNBOUNDED),
    "cmmd": Metric("CMMD", False, ("real",)),
    "is": Metric("IS", True, ("logits",)),
    "precision": Metric("precision", True, ("real",), SHARE),
    "recall": Metric("recall", True, ("real",), SHARE),
    "density": Metric("density", True, ("real",)),
    "coverage": Metric("coverage", True, ("real",), SHARE),
    "clipscore": Metric("CLIPScore", True, ("texts",)),
    "retrieval": Metric("retrieval", True, ("real", "captions"), SHARE),
    "scenes": Metric("scenes", True, ("judge",), SHARE),
    "counting": Metric("counting", True, ("judge",), SHARE),
    "dsg": Metric("DSG", True, ("judge",), SHARE),
    "soft-tifa": Metric("Soft-TIFA", True, ("judge",), SHARE),
}
NEIGHBOURS = ("precision", "recall", "density", "coverage")


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names without repeats. Raises UserError for one that is no metric."""
    for name in names:
        if name not in METRICS:
            near = get_close_matches(name, METRICS)
            expected = f"did you mean {' or '.join(near)}?" if near else f"expected some of {', '.join(METRICS)}"
            raise UserError(f"metric {name!r} is unknown: {expected}")
    return tuple(dict.fromkeys(names))


def check_numbers(names: Sequence[str], generated: int, real: int | None) -> None:
    """Raise UserError for a metric that takes more images than there are. real: None if there are none."""
    for name in (name for name in names if name in FEWEST):
        fewest = min(generated, generated if real is None or name != "kid" else real)
        if fewest < FEWEST[name]:
            raise UserError(
                f"metric {name}: got {fewest:,} images, expected at least {FEWEST[name]:,}: evaluate more, or "
                f"{'take mmd, which takes all pairs' if name == 'kid' else 'drop it'}"
            )


def takes(names: Sequence[str], what: Takes) -> list[str]:
    """Those metrics that take something."""
    return [name for name in names if what in METRICS[name].takes]


def of_features(names: Sequence[str]) -> list[str]:
    """Those metrics that compare features."""
    return [name for name in names if "judge" not in METRICS[name].takes]


def takes_features(names: Sequence[str]) -> bool:
    """Whether some metric takes the real images' features one by one, not their moments alone."""
    return any(name not in ("fd", "fd-infinity", "fd-ratio") for name in takes(names, "real"))


class Seen:
    """What an extractor saw of a set of images, read from its shards when it is first asked for.

    each: the shards, in order, as often as it is called. Tensors: `features/NAME`, `logits/NAME`, `texts/NAME`; and, of
    real images, `numbers`, those that could be read.
    """

    def __init__(self, each: Callable[[], Iterator[Shard]], extractor: str, count: int) -> None:
        self.each, self.extractor, self.count = each, extractor, count

    def _tensors(self, kind: str) -> Iterator[tuple[Sequence[int] | Tensor, Tensor]]:
        for shard in self.each():
            numbers = shard.tensors.get("numbers", range(shard.start, shard.stop))
            yield numbers, shard.tensors[f"{kind}/{self.extractor}"]

    @cached_property
    def moments(self) -> Moments:
        found: Moments | None = None
        for _, features in self._tensors("features"):
            found = found or Moments(features.shape[1])
            found.add(features)
        assert found is not None
        return found

    def parts(self) -> list[Moments]:
        """Moments of `PARTS` equal parts of the images: every tenth."""
        found: list[Moments] = []
        for numbers, features in self._tensors("features"):
            found = found or [Moments(features.shape[1]) for _ in range(PARTS)]
            rest = torch.as_tensor(numbers) % PARTS
            for k, part in enumerate(found):
                part.add(features[rest == k])
        return found

    def forget(self) -> None:
        """Let go of what is large; it is read again if it is asked for."""
        for name in ("features", "texts"):
            self.__dict__.pop(name, None)

    @cached_property
    def features(self) -> Tensor:
        """(n, width) fp32, by number; without images that could not be read."""
        return self._gathered("features")

    @cached_property
    def texts(self) -> Tensor:
        """(n, width) fp32: embeddings of the prompts."""
        return self._gathered("texts")

    def _gathered(self, kind: str) -> Tensor:
        found: Gathered | None = None
        for numbers, features in self._tensors(kind):
            found = found or Gathered(self.count, features.shape[1])
            found.add(numbers, features)
        assert found is not None
        return found.features

    @cached_property
    def marginals(self) -> Marginals:
        found: Marginals | None = None
        for numbers, logits in self._tensors("logits"):
            found = found or Marginals(self.count, logits.shape[1])
            found.add(numbers, logits)
        assert found is not None
        return found


@dataclass(frozen=True)
class Against:
    """What generated images are compared with, of one extractor: real images, with their captions; training images."""

    real: Reference | None = None
    captions: Sequence[str] = ()  # of the rows of real.features
    train: Moments | None = None

    @property
    def features(self) -> Tensor:
        """(n, width) of the real images."""
        assert self.real is not None and self.real.features is not None
        return self.real.features


def rows_of_features(
    names: Sequence[str], seen: Sequence[Seen], against: Against, own: Sequence[str], extractor: str
) -> list[Row]:
    """Rows of the metrics of one extractor. seen: of each seed. own: the generated images' prompts."""
    n = seen[0].count
    values: dict[str, list[float]] = {name: [] for name in names}
    retrieved = []
    for one in seen:
        for name, value in _of_seed(names, one, against):
            values[name].append(value)
        if "retrieval" in names:
            retrieved.append(_retrieval(one, against, own))
        one.forget()
    rows: list[Row] = []
    for name in names:
        if name == "retrieval":
            rows += _of_retrieval(retrieved, extractor)
        elif name != "fd-ratio":
            title = "FID" if (name, extractor) == ("fd", "inception") else METRICS[name].title
            made = row(name, named(title, n), values[name], extractor)
            rows.append(made | (_of_one_seed(name, values[name][0], seen[0], against) if len(seen) == 1 else {}))
    return rows


def _of_seed(names: Sequence[str], seen: Seen, against: Against) -> Iterator[tuple[str, float]]:
    if asked := [name for name in names if name in NEIGHBOURS]:
        found = neighbours(against.features, seen.features)
        yield from ((name, getattr(found, name)) for name in asked)
    for name in names:
        if name == "fd":
            assert against.real is not None
            yield name, frechet(seen.moments, against.real.moments)
        elif name == "fd-infinity":
            assert against.real is not None
            yield name, extrapolated(seen.features, against.real.moments).value
        elif name == "kid":
            yield name, kid(against.features, seen.features).mean
        elif name in ("mmd", "cmmd"):
            yield name, (mmd if name == "mmd" else cmmd)(against.features, seen.features)
        elif name == "is":
            yield name, inception_score(seen.marginals).mean
        elif name == "clipscore":
            yield name, clip_score(seen.features, seen.texts).mean().item()


def _of_one_seed(name: str, value: float, seen: Seen, against: Against) -> Row:
    """The interval of a metric of one seed, as far as the images themselves give one."""
    if name == "fd":
        assert against.real is not None
        found = frechet_interval(seen.parts(), against.real.moments)
        return {"low": found.low, "high": found.high, "interval": "images"}
    if name in ("precision", "recall", "coverage"):  # shares of generated images, or of real ones
        images = seen.count if name == "precision" else len(against.features)
        inside = round(value * images)
        share = over_prompts([1.0] * inside + [0.0] * (images - inside))  # Wilson's interval
        return {"low": share.low, "high": share.high, "interval": "images"}
    return {}


def _retrieval(seen: Seen, against: Against, own: Sequence[str]) -> Retrieval:
    captions = list(against.captions)[: len(against.features)]
    real = against.features[: len(captions)]  # a reference may be of more images than have captions here
    known = set(captions)  # not those of real images that cannot be read
    asked = [i for i, caption in enumerate(own) if caption in known]
    return retrieval(seen.features[asked], real, captions, [own[i] for i in asked])


def _of_retrieval(found: Sequence[Retrieval], extractor: str) -> Iterator[Row]:
    """Rows of retrieval; their intervals are over captions, all seeds together."""
    summary = summarise(j for one in found for j in one.judged)
    for name, share in summary.scores.items():
        values = [_mean(one.judged, name) for one in found]
        made = row("retrieval", named(f"retrieval {name}", len(found[0].judged)), values, extractor)
        made |= {"low": share.low, "high": share.high, "interval": "captions"}
        yield made | {"chance": found[0].chance[name], "candidates": found[0].candidates}


def ratio_row(seen: Mapping[str, Sequence[Seen]], against: Mapping[str, Against], n: int) -> Row:
    """FD-ratio over all extractors, by their names."""
    train = {name: a.train for name, a in against.items() if a.train is not None}
    heldout = {name: _apart(a.real.moments, train[name]) for name, a in against.items() if a.real is not None}
    seeds = range(len(next(iter(seen.values()))))
    values = [fd_ratio({name: frechet(s[k].moments, train[name]) for name, s in seen.items()}, heldout) for k in seeds]
    made = row("fd-ratio", named("FD-ratio", n), values, ", ".join(seen))
    return made | {"heldout": heldout}


def _apart(a: Moments, b: Moments) -> float:
    """Their Frechet distance; 0 where it is rounding."""
    distance = frechet(a, b)
    return distance if distance > 1e-9 * a.covariance.trace().item() else 0.0


def rows_of_judge(metric: str, judged: Sequence[Sequence[Judged]]) -> list[Row]:
    """Rows of an alignment metric: its measures, then each kind of question. judged: of each seed. Intervals are over
    prompts, all seeds together."""
    summary, seeds = summarise(j for one in judged for j in one), [summarise(one) for one in judged]
    images = seeds[0].images
    shares = [(m, m, share, [s.scores[m].mean for s in seeds]) for m, share in summary.scores.items()]
    shares += [(k, f"{metric}: {k}", share, [s.kinds[k].mean for s in seeds]) for k, share in summary.kinds.items()]
    rows = []
    for measure, name, share, values in shares:
        made = row(metric, named(name, images), values) | {"measure": measure}
        rows.append(made | {"mean": share.mean, "low": share.low, "high": share.high, "interval": "prompts"})
    return rows


def _mean(judged: Sequence[Judged], name: str) -> float:
    scores = [j.scores[name] for j in judged if name in j.scores]
    return sum(scores) / len(scores)


def row(metric: str, name: str, values: Sequence[float], extractor: str | None = None) -> Row:
    """A row of results: a value of each seed, their mean, and its interval over seeds if there are several."""
    found = interval(values) if len(values) > 1 else None
    least, most = METRICS[metric].ends
    return {
        "metric": metric,
        "extractor": extractor,
        "name": name if extractor is None else f"{name} ({extractor})",
        "better": "higher" if METRICS[metric].higher else "lower",
        "values": list(values),
        "mean": values[0] if found is None else found.mean,
        "low": None if found is None else max(least, found.low),
        "high": None if found is None else min(most, found.high),
        "interval": None if found is None else "seeds",
    }
