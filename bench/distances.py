"""Does the Frechet distance by EfficientNet-Lite0 order what it must: real images, blurred, JPEG, noise?

    python -m bench.distances [--images 500]    # of each half; five minutes of one core

Of scenes at 64 px, and of crops of scikit-image's photographs at 64 px, two disjoint halves are taken. The distance of
one half to the other, as it is and distorted in three ways at three strengths each: blurred (Gaussian, of so many
pixels), compressed as JPEG (quality), and with Gaussian noise (standard deviation of 8-bit values).

The claims, and the exit status: the distance rises with every strength; at each, undistorted < blurred < JPEG < noise;
and the strongest JPEG, of quality 10, is above every blur and below every noise. The strengths were chosen so.

Then precision and recall of the photographs' second half against the first, by the same features: as it is, of half of
the pictures alone (deleted classes), and where the first half are a quarter of the images, each four times
(duplicates). The claims: deleted classes lower recall by a third or more, and precision by a tenth at most; duplicates
the reverse.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from pixelgrow.evaluation.features import Extractor, load_extractor
from pixelgrow.evaluation.measures import EXTRACTOR
from pixelgrow.evaluation.metrics import frechet
from pixelgrow.evaluation.neighbours import Neighbours, neighbours
from pixelgrow.evaluation.real import open_real
from pixelgrow.evaluation.statistics import Moments

SIDE, BATCH = 64, 16
STRENGTHS: dict[str, Sequence[float]] = {"blur": (0.5, 0.7, 0.9), "jpeg": (30, 20, 10), "noise": (60, 90, 130)}


def distort(image: np.ndarray, kind: str, strength: float, seed: int) -> np.ndarray:
    """An image uint8 (h, w, 3), distorted; noise is a function of the seed."""
    if kind == "noise":
        noise = np.random.default_rng(seed).normal(0, strength, image.shape)
        return np.clip(np.round(image + noise), 0, 255).astype(np.uint8)
    picture = Image.fromarray(image)
    if kind == "blur":
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(strength)))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=int(strength))
    return np.asarray(Image.open(data))


def scenes(count: int) -> Callable[[Sequence[int]], np.ndarray]:
    real = open_real("scenes", (SIDE, SIDE), count)
    return lambda numbers: real.images(numbers)[0].permute(0, 2, 3, 1).numpy()


def photographs(count: int) -> Callable[[Sequence[int]], np.ndarray]:
    """Crops of scikit-image's photographs, neighbours in number of different ones."""
    from examples.photographs import PICTURES, crops

    each = -(-count // len(PICTURES))
    made = [np.asarray(Image.open(io.BytesIO(data))) for _, data, _ in crops(each, SIDE)]
    order = [p * each + i for i in range(each) for p in range(len(PICTURES))]
    return lambda numbers: np.stack([made[order[i]] for i in numbers])


def moments(extractor: Extractor, images: Iterator[np.ndarray]) -> Moments:
    """Moments of the features of images (B, h, w, 3), batch by batch."""
    found = Moments(extractor.width)
    for batch in images:
        found.add(extractor(to_tensor(batch)).features)
    return found


def to_tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def distances(
    extractor: Extractor,
    images: Callable[[Sequence[int]], np.ndarray],
    half: int,
    kinds: Sequence[str] = tuple(STRENGTHS),
) -> dict[str, list[float]]:
    """By kind of distortion, the distances of the second half at each strength to the first; `none` has one."""

    def second(kind: str, strength: float) -> Iterator[np.ndarray]:
        for start in range(half, 2 * half, BATCH):
            numbers = range(start, min(start + BATCH, 2 * half))
            batch = images(numbers)
            yield (
                batch
                if kind == "none"
                else np.stack([distort(x, kind, strength, i) for x, i in zip(batch, numbers, strict=True)])
            )

    first = moments(extractor, (images(range(s, min(s + BATCH, half))) for s in range(0, half, BATCH)))
    asked = {"none": (0.0,)} | {kind: STRENGTHS[kind] for kind in kinds}
    return {
        kind: [frechet(moments(extractor, second(kind, strength)), first) for strength in strengths]
        for kind, strengths in asked.items()
    }


def faults(found: dict[str, list[float]]) -> list[str]:
    """Which of the claims do not hold."""
    none = found["none"][0]
    wrong = [f"{k} does not rise" for k in STRENGTHS if not none < found[k][0] < found[k][1] < found[k][2]]
    for level in range(3):
        row = [none, *(found[kind][level] for kind in STRENGTHS)]
        if row != sorted(row):
            wrong.append(f"strength {level + 1} is not in order")
    row = [max(found["blur"]), found["jpeg"][-1], min(found["noise"])]
    if row != sorted(row):
        wrong.append("the strongest JPEG is not between blur and noise")
    return wrong


def kept(extractor: Extractor, images: Callable[[Sequence[int]], np.ndarray], numbers: Sequence[int]) -> Tensor:
    """Features (N, width) of the images of these numbers."""
    starts = range(0, len(numbers), BATCH)
    return torch.cat([extractor(to_tensor(images(numbers[s : s + BATCH]))).features for s in starts])


def sets(
    extractor: Extractor, images: Callable[[Sequence[int]], np.ndarray], half: int, classes: int
) -> dict[str, Neighbours]:
    """Precision and recall with classes deleted and with images duplicated; image i is of class i mod `classes`."""
    real, generated = (kept(extractor, images, range(start, start + half)) for start in (0, half))
    few = torch.arange(half, 2 * half) % classes < classes // 2
    return {
        "all": neighbours(real, generated),
        "half of the classes": neighbours(real, generated[few]),
        "real images four times": neighbours(real[: half // 4].repeat(4, 1), generated),
    }


def set_faults(found: dict[str, Neighbours]) -> list[str]:
    """Which of the claims on precision and recall do not hold."""
    whole, deleted, copied = found.values()
    wrong = []
    if not (deleted.recall < whole.recall * 2 / 3 and deleted.precision > 0.9 * whole.precision):
        wrong.append("deleted classes do not move recall alone")
    if not (copied.precision < whole.precision * 2 / 3 and copied.recall > 0.9 * whole.recall):
        wrong.append("duplicates do not move precision alone")
    return wrong


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="of each half")
    args = parser.parse_args(argv)
    extractor, missed = load_extractor(EXTRACTOR), []
    for name, source in (("scenes", scenes), ("photographs", photographs)):
        began = time.process_time()
        found = distances(extractor, source(2 * args.images), args.images)
        rounded = {kind: [round(v, 2) for v in values] for kind, values in found.items()}
        seconds = round(time.process_time() - began)
        print(json.dumps({"images": name, "half": args.images, **rounded, "cpu_seconds": seconds}), flush=True)
        missed += [f"{name}: {fault}" for fault in faults(found)]
    from examples.photographs import PICTURES

    by_set = sets(extractor, photographs(2 * args.images), args.images, len(PICTURES))
    for name, one in by_set.items():
        print(json.dumps({"photographs": name, "precision": one.precision, "recall": one.recall}), flush=True)
    missed += set_faults(by_set)
    if missed:
        sys.exit("; ".join(missed))


if __name__ == "__main__":
    main()
