"""The metrics by name: what each takes, and how it comes out of what was kept of the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.results import Judged, summarise
from pixelgrow.evaluation.alignment.retrieval import Retrieval, retrieval
from pixelgrow.evaluation.kernels import cmmd, kid, mmd
from pixelgrow.evaluation.metrics import clip_score, extrapolated, fd_ratio, frechet, inception_score, interval, named
from pixelgrow.evaluation.neighbours import neighbours
from pixelgrow.evaluation.reference import Reference
from pixelgrow.evaluation.shards import Shard
from pixelgrow.evaluation.statistics import Gathered, Marginals, Moments

Row = dict[str, Any]
Takes = Literal["real", "captions", "logits", "texts", "train", "judge"]
EXTRACTOR = "efficientnet-lite0"  # needs no hub
LEAST = 10  # images: below, no metric of features says anything


@dataclass(frozen=True)
class Metric:
    """title: as it is printed. takes: beside features of generated images. higher: whether more is better."""

    title: str
    higher: bool
    takes: tuple[Takes, ...]


METRICS: Mapping[str, Metric] = {
    "fd": Metric("FD", False, ("real",)),
    "fd-infinity": Metric("FD-infinity", False, ("real",)),
    "fd-ratio": Metric("FD-ratio", False, ("real", "train")),
    "kid": Metric("KID", False, ("real",)),
    "mmd": Metric("MMD", False, ("real",)),
    "cmmd": Metric("CMMD", False, ("real",)),
    "is": Metric("IS", True, ("logits",)),
    "precision": Metric("precision", True, ("real",)),
    "recall": Metric("recall", True, ("real",)),
    "density": Metric("density", True, ("real",)),
    "coverage": Metric("coverage", True, ("real",)),
    "clipscore": Metric("CLIPScore", True, ("texts",)),
    "retrieval": Metric("retrieval", True, ("real", "captions")),
    "scenes": Metric("scenes", True, ("judge",)),
    "counting": Metric("counting", True, ("judge",)),
    "dsg": Metric("DSG", True, ("judge",)),
    "soft-tifa": Metric("Soft-TIFA", True, ("judge",)),
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


def takes(names: Sequence[str], what: Takes) -> list[str]:
    """Those metrics that take something."""
    return [name for name in names if what in METRICS[name].takes]


def of_features(names: Sequence[str]) -> list[str]:
    """Those metrics that compare features."""
    return [name for name in names if "judge" not in METRICS[name].takes]


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
        assert self.real is not None
        if self.real.features is None:
            raise UserError("the reference holds no features of its images, only moments: make it again")
        return self.real.features


def rows_of_features(
    names: Sequence[str], seen: Sequence[Seen], against: Against, own: Sequence[str], wide: str
) -> list[Row]:
    """Rows of the metrics of one extractor. seen: of each seed. own: the generated images' prompts. wide: its name."""
    by_seed = [dict(_of_seed(names, one, against)) for one in seen]
    rows: list[Row] = []
    for name in names:
        metric, n = METRICS[name], seen[0].count
        if name == "retrieval":
            captions = list(against.captions)[: len(against.features)]
            real = against.features[: len(captions)]  # a reference may be of more images than have captions here
            found = [retrieval(one.features, real, captions, list(own)) for one in seen]
            rows += _of_retrieval(found, n, wide)
        elif name != "fd-ratio":
            title = "FID" if (name, wide) == ("fd", "inception") else metric.title
            rows.append(row(name, named(title, n), metric.higher, [v[name] for v in by_seed], extractor=wide))
    return rows


def _of_seed(names: Sequence[str], seen: Seen, against: Against) -> Iterator[tuple[str, float]]:
    if set(names) & set(NEIGHBOURS):
        found = neighbours(against.features, seen.features)
        yield from ((name, getattr(found, name)) for name in NEIGHBOURS)
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


def _of_retrieval(found: Sequence[Retrieval], n: int, extractor: str) -> Iterator[Row]:
    """Rows of retrieval; their intervals are over captions, all seeds together."""
    summary = summarise(j for one in found for j in one.judged)
    for name, share in summary.scores.items():
        values = [_mean(one.judged, name) for one in found]
        made = row("retrieval", named(f"retrieval {name}", n), True, values, extractor=extractor)
        made |= {"low": share.low, "high": share.high, "interval": "captions"}
        yield made | {"chance": found[0].chance[name], "candidates": found[0].candidates}


def ratio_row(seen: Mapping[str, Sequence[Seen]], against: Mapping[str, Against], n: int) -> Row:
    """FD-ratio over all extractors, by their names."""
    train = {name: a.train for name, a in against.items() if a.train is not None}
    heldout = {name: frechet(a.real.moments, train[name]) for name, a in against.items() if a.real is not None}
    seeds = range(len(next(iter(seen.values()))))
    values = [fd_ratio({name: frechet(s[k].moments, train[name]) for name, s in seen.items()}, heldout) for k in seeds]
    made = row("fd-ratio", named("FD-ratio", n), False, values, extractor=", ".join(seen))
    return made | {"heldout": heldout}


def rows_of_judge(metric: str, judged: Sequence[Sequence[Judged]]) -> list[Row]:
    """Rows of an alignment metric: its measures, then each kind of question. judged: of each seed. Intervals are over
    prompts, all seeds together."""
    summary, seeds = summarise(j for one in judged for j in one), [summarise(one) for one in judged]
    images = seeds[0].images
    shares = [(m, m, share, [s.scores[m].mean for s in seeds]) for m, share in summary.scores.items()]
    shares += [(k, f"{metric}: {k}", share, [s.kinds[k].mean for s in seeds]) for k, share in summary.kinds.items()]
    rows = []
    for measure, name, share, values in shares:
        made = row(metric, named(name, images), True, values) | {"measure": measure}
        rows.append(made | {"mean": share.mean, "low": share.low, "high": share.high, "interval": "prompts"})
    return rows


def _mean(judged: Sequence[Judged], name: str) -> float:
    scores = [j.scores[name] for j in judged if name in j.scores]
    return sum(scores) / len(scores)


def row(metric: str, name: str, higher: bool, values: Sequence[float], extractor: str | None = None) -> Row:
    """A row of results: a value of each seed, their mean, and its interval over seeds if there are several."""
    found = interval(values) if len(values) > 1 else None
    return {
        "metric": metric,
        "extractor": extractor,
        "name": name if extractor is None else f"{name} ({extractor})",
        "better": "higher" if higher else "lower",
        "values": list(values),
        "mean": values[0] if found is None else found.mean,
        "low": None if found is None else found.low,
        "high": None if found is None else found.high,
        "interval": None if found is None else "seeds",
    }
