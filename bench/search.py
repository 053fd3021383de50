"""What a search among previews gains, and what it costs.

    python -m bench.search [MODEL] [--prompts 200] [--of 16]        # `tiny`: about 20 minutes of one core

For each held-out caption of the scenes, `best_of` samples previews at the lowest resolution, the checker scores them,
and the winner is sampled at full size; beside it the first sample of the same caption. "All of a caption" is the share
of captions of which the full image shows everything, by the checker. Cost: seconds of previews and winner over seconds
of as many full images, of a few captions within one run. The exit status says whether each full image averages down to
the preview that won, within one of 255 grey levels.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
from PIL import Image

import pixelgrow
from pixelgrow.data.scenes.checker import accuracy, check
from pixelgrow.data.scenes.seeing import look
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.evaluation.alignment.intervals import over_prompts
from pixelgrow.model import Model
from pixelgrow.search import best_of

TIMED = 3  # captions


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def averaged(images: np.ndarray, k: int) -> np.ndarray:
    n, h, w, channels = images.shape
    return images.reshape(n, h // k, k, w // k, k, channels).astype(float).mean((2, 4))


def costs(model: Model, captions: list[str], of: int, **settings: Any) -> float:
    """Seconds of a search over seconds of as many full images; the two take turns."""
    found = []
    for caption in captions:
        began = time.perf_counter()
        (winner,) = best_of(model, caption, judge="checker", of=of, **settings)
        model.sample(caption, index=winner.index, **settings)
        middle = time.perf_counter()
        model.sample([caption] * of, **settings)
        found.append((middle - began) / (time.perf_counter() - middle))
    return float(np.median(found))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--of", type=int, default=16)
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args(argv)
    model = pixelgrow.load(args.model)
    held = Scenes(args.prompts, split="heldout", captions=args.prompts)
    captions = [held.text(i) for i in range(args.prompts)]
    questions = [held.scene(i).questions for i in range(args.prompts)]
    ratio = costs(model, captions[:TIMED], args.of, steps=args.steps)
    print(f"cost of the search over {args.of} full images: {ratio:.2f}", flush=True)

    winners = best_of(model, captions, judge="checker", of=args.of, steps=args.steps)
    chosen = [winner.index[0] for winner in winners]
    first = [number * args.of for number in range(args.prompts)]
    large = {}
    for name, index in (("one sample", first), (f"best of {args.of}", chosen)):
        large[name] = pixels(model.sample(captions, index=index, steps=args.steps))
        right = over_prompts([float(all(check(i, q))) for i, q in zip(large[name], questions, strict=True)])
        seen = accuracy([look(image) for image in large[name]], questions)
        rest = ", ".join(f"{kind} {100 * value:.1f}" for kind, value in seen.items())
        print(
            f"{name}: all {100 * right.mean:.1f}% [{100 * right.low:.1f}, {100 * right.high:.1f}]; {rest}", flush=True
        )
    previews = pixels(model.preview(captions, index=chosen, steps=args.steps))
    k = large["one sample"].shape[1] // previews.shape[1]
    apart = np.abs(averaged(large[f"best of {args.of}"], k) - previews).max()
    print(f"full images averaged, against their previews: at most {apart:.2f} grey levels apart")
    if apart > 1:
        sys.exit("bench search: a full image is not its preview")


if __name__ == "__main__":
    main()
