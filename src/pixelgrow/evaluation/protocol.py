"""An evaluation: images of several sampling seeds are made, measured and forgotten, batch by batch; then the metrics.

What was measured is kept on disk (`shards.py`), so that an interrupted evaluation goes on. Several processes share the
batches, and the first one reads what all of them have kept. The result is a function of what is evaluated, the plan and
the data; only `measured` in it differs from run to run.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelgrow.distributed import Team
from pixelgrow.errors import UserError
from pixelgrow.evaluation.alignment.results import Judged
from pixelgrow.evaluation.compare import FORMAT
from pixelgrow.evaluation.features import Extractor
from pixelgrow.evaluation.images import BATCH, Candidate, device
from pixelgrow.evaluation.judges import Judge
from pixelgrow.evaluation.measures import (
    LEAST,
    Against,
    Row,
    Seen,
    check_numbers,
    of_features,
    ratio_row,
    rows_of_features,
    rows_of_judge,
    takes,
    takes_features,
)
from pixelgrow.evaluation.real import Real, digest
from pixelgrow.evaluation.reference import Reference, load_reference, save_reference
from pixelgrow.evaluation.shards import Shard, Shards
from pixelgrow.external.vision import load_clip
from pixelgrow.writing import reading

SHOWN = 64  # images of the first seed that are kept to be looked at
Progress = Callable[[str, int, int], None]  # what is measured, images done, images in all


@dataclass(frozen=True)
class Plan:
    """What is measured, on what; the same for all candidates of a comparison.

    metrics: names of `measures.METRICS`. seeds: of the sampling. prompts: of the images; for images that have prompts
    of their own, those. real, train: real images, if a metric takes them. reference: a file of the real images'
    statistics, read if it is there, else written; of one extractor.
    """

    metrics: Sequence[str]
    seeds: Sequence[int]
    prompts: Sequence[str]
    extractors: Sequence[Extractor] = ()
    judge: Judge | None = None
    real: Real | None = None
    train: Real | None = None
    reference: Path | None = None
    batch: int = BATCH

    def describe(self, *candidates: Candidate) -> dict[str, Any]:
        """What decides what is kept of the images, as JSON."""
        return {
            "candidates": [c.describe() for c in candidates],
            "images": len(self.prompts),
            "prompts": digest(self.prompts),
            "extractors": {e.name: e.identity for e in self.extractors},
            "judge": None if self.judge is None else self.judge.describe(),
            # What metrics add to what is kept of each image.
            "logits": bool(takes(self.metrics, "logits")),
            "texts": bool(takes(self.metrics, "texts")),
            "judged": takes(self.metrics, "judge"),
            "real": _described(self.real),
            "train": _described(self.train),
        }

    def real_images(self) -> int:
        """How many real images there are to compare with: those of the reference, if it is there."""
        kept = _kept(self, self.extractors[0]) if self.extractors else None
        return _taken(kept) if kept is not None else 0 if self.real is None else len(self.real)


@dataclass(frozen=True)
class Result:
    """values: the JSON. shown: uint8 (B, 3, h, w), the first images. sums: of what the candidate measured itself."""

    values: dict[str, Any]
    shown: Tensor
    sums: Mapping[str, Tensor] = field(default_factory=dict)


def check(plan: Plan, candidate: Candidate) -> None:
    """Raise UserError if the plan lacks what its metrics take, has too few images for them, or another's reference."""
    names, n = plan.metrics, len(plan.prompts)
    features = of_features(names)
    if features and n < LEAST:
        raise UserError(
            f"{candidate.name}: got {n} image{'s' if n > 1 else ''} to evaluate, expected at least {LEAST} for "
            f"{', '.join(features)}; some thousands are usual"
        )
    for what, there, remedy in (
        ("real", plan.real is not None, "name real images with --data"),
        ("train", plan.train is not None, "name training images with --train"),
        ("captions", plan.real is None or plan.real.captioned, "give the images of --data captions"),
    ):
        if (lacking := takes(names, what)) and not there:  # type: ignore[arg-type]
            raise UserError(f"metric {lacking[0]}: {remedy}, or drop it from --metrics")
    if (wordy := [*takes(names, "captions"), *takes(names, "texts"), *takes(names, "judge")]) and not all(plan.prompts):
        raise UserError(
            f"metric {wordy[0]}: {candidate.name} has images without prompts; expected a metadata.jsonl with file_name "
            f"and text, or a .txt beside each image; or drop it from --metrics"
        )
    if plan.real is not None and (few := len(plan.real)) < LEAST and takes(names, "real"):
        raise UserError(f"{plan.real.name}: got {few} real images, expected at least {LEAST}; name a larger source")
    if takes(names, "logits") and (without := [e.name for e in plan.extractors if not e.describe().get("classes")]):
        raise UserError(
            f"metric is: {without[0]} is no classifier; name inception or efficientnet-lite0 as --extractor"
        )
    if plan.reference is not None and not takes(names, "real"):
        raise UserError(f"--reference {plan.reference}: no metric compares with real images; drop it, or ask for fd")
    if plan.reference is not None and len(plan.extractors) != 1:
        raise UserError(
            f"--reference {plan.reference}: got {len(plan.extractors)} extractors, and a reference is of one; name one"
        )
    for extractor in plan.extractors:
        kept = _kept(plan, extractor)
        if kept is not None and kept.features is None and takes_features(names):
            raise UserError(f"reference {plan.reference} has moments, no features: delete it, and it is made again")
        if kept is not None and plan.real is not None and _taken(kept) < len(plan.real):
            raise UserError(
                f"reference {plan.reference} is of {_taken(kept)} real images, expected at least {len(plan.real)}: "
                "delete it, and it is made again"
            )
        real = None if plan.real is None else len(plan.real) if kept is None else _taken(kept)
        check_numbers(names, n, real)
    if "retrieval" in names and plan.real is not None:
        known = set(plan.real.prompts)
        if (strange := next((p for p in plan.prompts if p not in known), None)) is not None:
            raise UserError(
                f"metric retrieval: {candidate.name} has the caption {strange!r}, which none of the {len(plan.real)} "
                "real images has; expected captions of theirs, or drop it from --metrics"
            )
    if plan.train is not None and plan.real is not None and plan.train.fingerprint == plan.real.fingerprint:
        raise UserError(
            f"metric fd-ratio: {plan.real.name} is both the training and the real images, which are 0 apart; name "
            "held-out images as --data"
        )


def evaluate(
    candidate: Candidate, plan: Plan, shards: Shards, *, key: str = "", progress: Progress | None = None
) -> Result:
    """Measure a candidate; goes on from what `shards` has. key: of its images there, if there are several candidates.

    Raises UserError if the plan does not fit (`check`), for images that are not finite, and for a full disk.
    """
    measure(candidate, plan, shards, key=key, progress=progress)
    return result(candidate, plan, shards, key=key)


def measure(
    candidate: Candidate,
    plan: Plan,
    shards: Shards,
    *,
    key: str = "",
    progress: Progress | None = None,
    team: Team | None = None,
) -> None:
    """Measure what `shards` lacks of a candidate and of the real images.

    team: the processes that share the batches, each of which calls this function with `shards` on a disk of all. A
    process that fails waits for no other: it ends them.
    """
    check(plan, candidate)
    team = team or Team()
    say = progress if progress is not None and team.first else _say_nothing
    n, looked_at = len(plan.prompts), _Instruments(plan)
    kept = team.alone(lambda: all(_kept(plan, e) is not None for e in plan.extractors))
    for real, part in ((None if kept else plan.real, "real"), (plan.train, "train")):
        if real is not None:
            for start, stop in _mine(shards, part, len(real), plan.batch, team):
                say(f"{part} images", start, len(real))
                shards.put(part, _seen(real, plan.extractors, range(start, stop)))
                say(f"{part} images", stop, len(real))
    for number, seed in enumerate(plan.seeds):
        part = f"{key}seed-{seed}"
        name = f"{key.rstrip('/')} {f'seed {seed}' if len(plan.seeds) > 1 else 'images'}".lstrip()
        for start, stop in _mine(shards, part, n, plan.batch, team):
            say(name, start, n)
            shown = max(0, SHOWN - start) if number == 0 else 0
            shards.put(part, _made(candidate, plan, looked_at, range(start, stop), seed, shown))
            say(name, stop, n)
    team.wait()


def _say_nothing(name: str, done: int, total: int) -> None:
    pass


def _mine(shards: Shards, part: str, n: int, batch: int, team: Team) -> list[tuple[int, int]]:
    """Those of the missing batches that are this process's."""
    missing = team.alone(lambda: list(shards.missing(part, n, batch)))
    return missing[team.rank :: team.size]


def _made(candidate: Candidate, plan: Plan, looked_at: _Instruments, numbers: range, seed: int, shown: int) -> Shard:
    """What is kept of the images `numbers` of a seed: what was measured, and the first `shown` of them."""
    prompts = plan.prompts[numbers.start : numbers.stop]
    began = time.perf_counter()
    made = candidate.make(prompts, numbers, seed)
    seconds = time.perf_counter() - began
    _check_made(made.images, candidate, len(numbers))
    tensors, facts = looked_at(made.images, prompts, numbers)
    tensors |= {f"sums/{k}": v for k, v in made.sums.items()} | ({"shown": made.images[:shown]} if shown else {})
    return Shard(numbers.start, len(numbers), tensors, facts | {"seconds": seconds, "nfe": made.nfe})


def _check_made(images: Tensor, candidate: Candidate, count: int) -> None:
    if images.dtype != torch.uint8 or tuple(images.shape) != (count, 3, *candidate.size):
        h, w = candidate.size
        raise UserError(
            f"{candidate.name}: got images of shape {tuple(images.shape)}, {images.dtype}, expected "
            f"{(count, 3, h, w)}, uint8: all images must have one size"
        )


class _Instruments:
    """What looks at each batch: the extractors and the judge."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.logits = bool(takes(plan.metrics, "logits"))
        self.texts = {}
        if takes(plan.metrics, "texts"):
            self.texts = {e.name: load_clip(e.name, device()) for e in plan.extractors}

    def __call__(
        self, images: Tensor, prompts: Sequence[str], numbers: Sequence[int]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        for extractor in self.plan.extractors:
            found = extractor(images)
            tensors[f"features/{extractor.name}"] = found.features
            if self.logits and found.logits is not None:
                tensors[f"logits/{extractor.name}"] = found.logits
        for name, clip in self.texts.items():
            tensors[f"texts/{name}"] = clip.texts(list(prompts)).cpu()
        judged: dict[str, list[dict[str, Any]]] = {}
        if self.plan.judge is not None:
            for number, image in zip(numbers, images, strict=True):
                for metric, one in self.plan.judge(number, image).items():
                    judged.setdefault(metric, []).append(one.to_json())
        return tensors, {"judged": judged}


# --- real images ------------------------------------------------------------------------------------------------------


def _reference(plan: Plan, extractor: Extractor, shards: Shards) -> Reference:
    """Statistics of the real images: of the plan's file, or of what was measured, and then written there."""
    if found := _kept(plan, extractor):
        return found
    assert plan.real is not None
    data = plan.real.describe()
    seen = _real_seen(shards, plan.real, "real", extractor)
    kept = [int(i) for shard in seen.each() for i in shard.tensors["numbers"]]
    bad = [b for shard in seen.each() for b in shard.facts["bad"]]
    data |= {"images": len(kept), "missing": sorted(set(range(len(plan.real))) - set(kept)), "bad_files": bad}
    rows = plan.reference is not None or takes_features(plan.metrics)  # a file serves all metrics
    found = Reference(seen.moments, data, extractor.describe(), seen.features if rows else None)
    if plan.reference is not None:
        save_reference(plan.reference, found)
    return found


def _taken(reference: Reference) -> int:
    """How many images a reference was made of, those that could not be read included."""
    return reference.moments.count + len(reference.data.get("missing", ()))


def _described(real: Real | None) -> dict[str, Any] | None:
    return None if real is None else real.describe() | {"images": len(real)}


def _kept(plan: Plan, extractor: Extractor) -> Reference | None:
    """The reference in the plan's file; None if there is no file. Raises UserError if it is of something else."""
    if plan.reference is None or plan.real is None:
        return None
    with reading(plan.reference):
        if not plan.reference.exists():
            return None
    data = {k: v for k, v in plan.real.describe().items() if k != "source"}
    described = {k: v for k, v in extractor.describe().items() if k != "name"}
    return load_reference(plan.reference, data=data, extractor=described)


def _seen(real: Real, extractors: Sequence[Extractor], numbers: range) -> Shard:
    """Some of the real images as all extractors see them."""
    images, kept, bad = real.images(numbers)
    tensors = {f"features/{e.name}": e(images).features for e in extractors}
    tensors["numbers"] = torch.tensor(kept, dtype=torch.int64)
    return Shard(numbers.start, len(numbers), tensors, {"bad": bad})


def _real_seen(shards: Shards, real: Real, part: str, extractor: Extractor) -> Seen:
    """What was kept of the real images of an extractor."""
    return Seen(lambda: shards.each(part, len(real)), extractor.name, len(real))


# --- results ----------------------------------------------------------------------------------------------------------


def result(candidate: Candidate, plan: Plan, shards: Shards, *, key: str = "") -> Result:
    """The metrics of what was measured (`measure`). Writes the plan's reference if it is not there."""
    references = {e.name: _reference(plan, e, shards) for e in plan.extractors if plan.real is not None}
    train = {e.name: _real_seen(shards, plan.train, "train", e).moments for e in plan.extractors if plan.train}
    n, features = len(plan.prompts), of_features(plan.metrics)

    def each(seed: int) -> Callable[[], Any]:
        return lambda: shards.each(f"{key}seed-{seed}", n)

    seen = {e.name: [Seen(each(seed), e.name, n) for seed in plan.seeds] for e in plan.extractors}
    against = {}
    for e in plan.extractors:
        reference = references.get(e.name)
        against[e.name] = Against(reference, _captions(plan.real, reference), train.get(e.name))
    rows: list[Row] = []
    for e in plan.extractors:
        rows += rows_of_features(features, seen[e.name], against[e.name], plan.prompts, e.name)
    if "fd-ratio" in plan.metrics:
        rows.append(ratio_row(seen, against, n))
    judged: dict[str, list[list[Judged]]] = {name: [[] for _ in plan.seeds] for name in takes(plan.metrics, "judge")}
    seconds, nfe, shown, sums = 0.0, None, [], dict[str, Tensor]()
    for k, seed in enumerate(plan.seeds):
        for shard in each(seed)():
            seconds, nfe = seconds + shard.facts["seconds"], shard.facts["nfe"]
            for name, found in shard.facts["judged"].items():
                judged[name][k] += map(Judged.from_json, found)
            shown += [shard.tensors["shown"]] if "shown" in shard.tensors else []
            for name, value in shard.tensors.items():
                if name.startswith("sums/"):
                    sums[name[5:]] = sums.get(name[5:], 0) + value
    for name, found in judged.items():
        rows += rows_of_judge(name, found)
    described = candidate.describe()
    values = {
        "format": FORMAT,
        "name": candidate.name,
        "candidate": described,
        "seeds": list(plan.seeds),
        "images": n,
        "prompts": {"sha256": digest(plan.prompts), "distinct": len(set(plan.prompts))} if all(plan.prompts) else None,
        **_of_real(plan, references),
        "train": _described(plan.train),
        "extractors": {e.name: e.describe() | {"identity": e.identity} for e in plan.extractors},
        "judge": None if plan.judge is None else plan.judge.describe(),
        "metrics": rows,
        "cost": {"nfe": nfe, "parameters": described.get("parameters")},
        "versions": versions(),
        "machine": machine(),
        "measured": {"seconds_per_image": seconds / (n * len(plan.seeds)), "batch": plan.batch},
    }
    return Result(values, torch.cat(shown), sums)


def _captions(real: Real | None, reference: Reference | None) -> list[str]:
    """Captions of the rows of a reference's features. More rows than the plan's real images have none."""
    if real is None or reference is None:
        return []
    missing = set(reference.data.get("missing", ()))
    return [caption for i, caption in enumerate(real.prompts) if i not in missing]


def _of_real(plan: Plan, references: Mapping[str, Reference]) -> dict[str, Any]:
    """What the real images are, and which of them could not be read."""
    if plan.real is None:
        return {"data": None, "real": None, "bad_files": []}
    described = plan.real.describe()
    name = described.pop("source")
    used = next(iter(references.values()), None)
    images = len(plan.real) if used is None else used.moments.count
    bad = [] if used is None else used.data.get("bad_files", [])
    return {"data": name, "real": described | {"images": images}, "bad_files": bad}


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": platform.python_version()}
    for name in ("pixelgrow", "torch", "numpy", "pillow", "transformers", "diffusers"):
        with suppress(PackageNotFoundError):  # an extra
            found[name] = version(name)
    return found


def machine() -> dict[str, Any]:
    """Where it computes."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())
