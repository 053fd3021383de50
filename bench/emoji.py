"""Does a model of emoji draw what its captions name? Retrieval among real pictures, distance, sharpness, seams.

    python -m bench.emoji [MODEL] [FOLDER] [--number 500] [--sheet sheet.png]     # `emoji`, and `emoji` as made by
                                                                                # examples/emoji.py; ten minutes

All pictures are on white, with the model's own settings of sampling, and compared by features of EfficientNet-Lite0.
Real pictures that are larger than the model's are averaged down to its resolution.

- Training captions: one picture each of so many concepts in Fluent's style. Top-1 and top-5: how often the concept's
  real picture is the nearest, or among the five nearest, of these concepts' real pictures.
- Held-out pairs of concept and style: the same for each style's pairs, among so many real pictures of that style. With
  `--against MODEL`, also how many more of them than another model's are among the five nearest, with an interval over
  pairs.
- Frechet distance of the generated pictures to as many real ones of other concepts, beside that of the real pictures
  of the same concepts: two halves of the real pictures.
- Power in the top octave of the spectrum (above half the highest frequency), generated over real.
- Seams: see `training.monitor.Seams`; the largest.

`--upscale 32` measures the rungs without the core's mistakes: the same concepts' real pictures, averaged down to 32 px
and upscaled by the model, beside bicubic ones. Root mean square of the pixels' error in 8-bit values, mean squared
distance of features, top octave.

`--sheet` draws so many (`--named`) of the generated pictures without captions, to be named by people, and writes the
captions to a text file beside it. No claim, no exit status: a model decides what is enough.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.distances import to_tensor
from PIL import Image
from torch import Tensor

import pixelgrow
from pixelgrow.editing import upscale
from pixelgrow.evaluation.alignment.intervals import Share, over_prompts
from pixelgrow.evaluation.alignment.retrieval import Retrieval, retrieval
from pixelgrow.evaluation.features import Extractor, load_extractor
from pixelgrow.evaluation.measures import EXTRACTOR
from pixelgrow.evaluation.metrics import frechet, interval
from pixelgrow.evaluation.statistics import Moments
from pixelgrow.model import Model, OneStepModel
from pixelgrow.pictures import grid
from pixelgrow.training.monitor import Seams

SHOWN = "fluent"  # the style of the training captions that are judged
BATCH, COLUMNS = 16, 10


@dataclass(frozen=True)
class Picture:
    """A real picture on white: its file, concept (code points), style and first caption."""

    path: Path
    concept: str
    style: str
    text: str

    def image(self, side: int) -> np.ndarray:
        """uint8 (h, w, 3), averaged down to `side` if it is larger."""
        image = Image.open(self.path).convert("RGB")
        factor = image.width // side
        return np.asarray(image.reduce(factor) if factor > 1 else image)


def pictures(folder: Path) -> list[Picture]:
    """Those on white of one part of the set, in its order."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        Picture(folder / row["file_name"], row["concept"], row["style"], row["text"][0])
        for row in rows
        if row["ground"] == "white"
    ]


def features(extractor: Extractor, images: Sequence[np.ndarray]) -> Tensor:
    """(N, width) of images uint8 (h, w, 3), which may differ in size."""
    return torch.cat([extractor(to_tensor(image[None])).features for image in images])


def drawn(model: Model | OneStepModel, wanted: Sequence[Picture]) -> list[np.ndarray]:
    """A generated picture for each real one's caption."""
    found = model.stream([picture.text for picture in wanted], batch=BATCH)
    images = []
    for i, image in enumerate(found, 1):
        images.append(np.asarray(image))
        if i % BATCH == 0:
            print(f"\r{i} of {len(wanted)} pictures", end="", file=sys.stderr, flush=True)
    return images


def top_octave(images: Sequence[np.ndarray]) -> float:
    """Mean power of grey images at frequencies above a quarter of a cycle a pixel, in 8-bit values squared."""
    total = 0.0
    for image in images:
        h, w = image.shape[:2]
        power = np.abs(np.fft.fft2(image.mean(2))) ** 2 / (h * w) ** 2
        fine = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None]) > 0.25
        total += power[fine].sum()
    return total / len(images)


def seams(images: Sequence[np.ndarray], patches: Sequence[int]) -> float:
    """The largest of the ratios at the patches' sides."""
    found = Seams(patches)
    for image in images:
        found.add(to_tensor(image[None]) / 127.5 - 1)
    return max(found.ratios().values())


def held_out(
    extractor: Extractor, images: Sequence[np.ndarray], test: Sequence[Picture], train: Sequence[Picture], side: int,
    number: int,
) -> dict[str, Retrieval]:  # fmt: skip
    """Retrieval of generated images of held-out pairs by style, each among `number` real pictures of the style."""
    found = {}
    for style in dict.fromkeys(picture.style for picture in test):
        own = [(p, image) for p, image in zip(test, images, strict=True) if p.style == style]
        others = [p for p in train if p.style == style][: max(0, number - len(own))]
        among = [*(p for p, _ in own), *others]
        real = features(extractor, [p.image(side) for p in among])
        generated = features(extractor, [image for _, image in own])
        found[style] = retrieval(generated, real, [p.concept for p in among], [p.concept for p, _ in own])
    return found


def hits(found: dict[str, Retrieval], top: str) -> list[float]:
    """Of each pair, whether it is among the nearest."""
    return [judged.scores[top] for of_style in found.values() for judged in of_style.judged]


def percent(share: Share) -> str:
    return f"{100 * share.mean:.1f}% [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def of_pairs(
    model: Model | OneStepModel, extractor: Extractor, test: Sequence[Picture], train: Sequence[Picture], number: int
) -> dict[str, Retrieval]:
    """`held_out` of a model's pictures of the pairs' captions."""
    return held_out(extractor, drawn(model, test), test, train, model.resolution, number)


def shares(pairs: dict[str, Retrieval]) -> dict[str, str]:
    """Of all pairs and by style, how many are the nearest and among the five nearest."""
    results = {}
    for top in ("top-1", "top-5"):
        results[f"held-out {top}"] = percent(over_prompts(hits(pairs, top)))
        for style, of_style in pairs.items():
            results[f"held-out {top}, {style}"] = percent(of_style.summary().scores[top])
    return results


def compared(pairs: dict[str, Retrieval], theirs: dict[str, Retrieval]) -> dict[str, str]:
    """Another model's pairs among the five nearest, and how many more are so of this one."""
    more = interval((100 * np.subtract(hits(pairs, "top-5"), hits(theirs, "top-5"))).tolist())
    return {
        "held-out top-5, against": percent(over_prompts(hits(theirs, "top-5"))),
        "held-out top-5, more": f"{more.mean:+.1f} points [{more.low:+.1f}, {more.high:+.1f}]",
    }


def of_captions(
    model: Model | OneStepModel, extractor: Extractor, wanted: Sequence[Picture], others: Sequence[Picture]
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """A picture of each training caption, and what is measured of them."""
    side = model.resolution
    images, real = drawn(model, wanted), [p.image(side) for p in wanted]
    of_images, of_real = features(extractor, images), features(extractor, real)
    found = retrieval(of_images, of_real, [p.concept for p in wanted]).summary()
    results: dict[str, Any] = {f"training {top}": percent(share) for top, share in found.scores.items()}
    halves = []
    for some in (features(extractor, [p.image(side) for p in others]), of_images, of_real):
        halves.append(Moments(extractor.width))
        halves[-1].add(some)
    results["FD"] = round(frechet(halves[1], halves[0]), 2)
    results["FD of the real halves"] = round(frechet(halves[2], halves[0]), 2)
    results["top octave over real"] = round(top_octave(images) / top_octave(real), 3)
    patches = [side for side in model.network.net.config.patches if side > 1]
    results["seams"], results["seams of the real"] = (round(seams(i, patches), 3) for i in (images, real))
    return images, results


def upscaled(
    model: Model, extractor: Extractor, wanted: Sequence[Picture], side: int
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Real pictures averaged down to `side` and upscaled by the model, and how near they are, beside bicubic ones."""
    small, real = [p.image(side) for p in wanted], [p.image(model.resolution) for p in wanted]
    images = []
    for at in range(0, len(wanted), BATCH):
        texts = [p.text for p in wanted[at : at + BATCH]]
        images += [np.asarray(image) for image in upscale(model, small[at : at + BATCH], texts)]
        print(f"\r{len(images)} of {len(wanted)} pictures", end="", file=sys.stderr, flush=True)
    size = (model.resolution, model.resolution)
    bicubic = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in small]
    results, of_real = {}, features(extractor, real)
    for name, some in (("upscaled", images), ("bicubic", bicubic)):
        error = np.mean([(np.subtract(a, b, dtype=float)) ** 2 for a, b in zip(some, real, strict=True)]) ** 0.5
        results[f"{name}: error"] = round(float(error), 2)
        results[f"{name}: distance of features"] = round(
            (features(extractor, some) - of_real).square().sum(1).mean().item(), 2
        )
        results[f"{name}: top octave over real"] = round(top_octave(some) / top_octave(real), 3)
    return images, results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("emoji"))
    parser.add_argument("--number", type=int, default=500)
    parser.add_argument("--against", metavar="MODEL", help="held-out pairs alone, of both models")
    parser.add_argument("--upscale", type=int, metavar="SIDE", help="rungs alone: real pictures of this side, upscaled")
    parser.add_argument("--seed", type=int, default=0, help="chooses the concepts")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--named", type=int, default=50)
    parser.add_argument("--output", type=Path, help="results as JSON")
    args = parser.parse_args(argv)
    if not (args.folder / "test" / "metadata.jsonl").exists():
        print(f"no pictures in {args.folder}, nothing is measured: docs/real-pictures.md says how to get them")
        return
    model, extractor = pixelgrow.load(args.model), load_extractor(EXTRACTOR)
    train, test = pictures(args.folder / "train"), pictures(args.folder / "test")
    random.Random(args.seed).shuffle(train)
    shown = [p for p in train if p.style == SHOWN]
    wanted, others = shown[: args.number], shown[args.number : 2 * args.number]
    results: dict[str, Any] = {"model": args.model, "resolution": model.resolution}
    sheet: list[np.ndarray] = []
    if args.upscale:
        sheet, found = upscaled(model, extractor, wanted, args.upscale)
    else:
        pairs = of_pairs(model, extractor, test, train, args.number)
        found = shares(pairs)
        if args.against:
            found |= compared(pairs, of_pairs(pixelgrow.load(args.against), extractor, test, train, args.number))
        else:
            sheet, more = of_captions(model, extractor, wanted, others)
            found |= more
    results |= found
    if args.sheet:
        first = sheet[: args.named]
        grid(first, COLUMNS, len(first), numbered=True).save(args.sheet)
        names = "".join(f"{i}: {p.text}\n" for i, p in enumerate(wanted[: args.named]))
        args.sheet.with_suffix(".txt").write_text(names, encoding="utf-8")
    print(file=sys.stderr)
    print("\n".join(f"{name:<32}{value}" for name, value in results.items()))
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
