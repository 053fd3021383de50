"""What the metrics cost in memory and time, and what images' number, copies and lost modes do to them.

    python -m bench.metrics [--images 50000] [--width 2048]
    python -m bench.metrics --number
    python -m bench.metrics --copies
    python -m bench.metrics --intervals

One JSON line for each metric: seconds of CPU, and the most memory that the process has held so far, Python, torch and
mapped files included. Features are random. They go the way an evaluation's do: real images' into a reference file,
which is mapped, generated images' batch by batch into moments and gathered rows.

`--number`: features of known distributions, 256 wide, with variances 1/i. The generated ones are either as the real
ones or 5% larger; their Frechet distance is known. N of each against N real ones (50,000 for the Frechet distances).

`--copies`: 1,000 images of ten modes that lie well apart in 16 features, against as many of fewer modes, or fewer
images that come several times.

`--intervals`: over many draws of 500 images, 16 wide: how often the interval of one draw's Frechet distance holds its
expectation; and the spread of precision, recall and coverage over that of as many independent yes or no.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelgrow.evaluation.kernels import cmmd, kid, mmd
from pixelgrow.evaluation.metrics import extrapolated, frechet, frechet_interval
from pixelgrow.evaluation.neighbours import neighbours
from pixelgrow.evaluation.reference import Reference, load_reference, save_reference
from pixelgrow.evaluation.statistics import Gathered, Moments

LIMIT_GIB = 2.0
BATCH = 500


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def gather(images: int, width: int, seed: int) -> tuple[Moments, Gathered]:
    """Moments and rows of random features, batch by batch."""
    g = torch.Generator().manual_seed(seed)
    moments, rows = Moments(width), Gathered(images, width)
    for start in range(0, images, BATCH):
        index = range(start, min(start + BATCH, images))
        features = torch.randn(len(index), width, generator=g)
        moments.add(features)
        rows.add(index, features)
    return moments, rows


def scale(images: int, width: int) -> float:
    """Run every metric; returns the peak memory in GiB."""

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        found = work()
        seconds = time.process_time() - began
        line = {"metric": name, "images": images, "width": width, "seconds": seconds, "peak_gib": peak_gib()}
        print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in line.items()}), flush=True)
        return found

    timed("nothing yet", lambda: None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.safetensors"

        def make() -> None:
            moments, rows = gather(images, width, 0)
            save_reference(path, Reference(moments, {"images": images}, {"name": "random"}, rows.features))

        timed("reference", make)
        reference = load_reference(path)
        moments, rows = timed("moments, gathered", lambda: gather(images, width, 1))
        real, generated = reference.features, rows.features
        assert real is not None
        timed("FD", lambda: frechet(moments, reference.moments))
        timed("KID", lambda: kid(real, generated))
        timed("MMD", lambda: mmd(real, generated))
        timed("CMMD", lambda: cmmd(real, generated))
        timed("precision, recall, density, coverage", lambda: neighbours(real, generated))
        timed("FD extrapolated", lambda: extrapolated(generated, reference.moments))
    return peak_gib()


def moments_of(features: Tensor) -> Moments:
    made = Moments(features.shape[1])
    for batch in features.split(BATCH):
        made.add(batch)
    return made


def by_number(sizes: list[int], width: int = 256, wider: float = 1.05) -> None:
    """Metrics by number of images, of a perfect model and of one whose features are `wider` times as large."""
    deviations = torch.arange(1, width + 1, dtype=torch.float64) ** -0.5
    truth = (wider - 1) ** 2 * deviations.square().sum().item()  # of the worse model; the perfect one's is 0

    def draw(n: int, seed: int) -> Tensor:
        return (torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * deviations).float()

    reference = moments_of(draw(50_000, 0))
    for n in sizes:
        real, perfect, worse = draw(n, 1), draw(n, 2), wider * draw(n, 3)
        row = {"images": n}
        for name, images, distance in (("perfect", perfect, 0.0), ("worse", worse, truth)):
            row |= {f"{name}, true FD": distance, f"{name}, FD": frechet(moments_of(images), reference)}
            row |= {f"{name}, FD extrapolated": extrapolated(images, reference).value}
            row |= {f"{name}, {metric}": value for metric, value in vars(neighbours(real, images)).items()}
        print(json.dumps({k: round(v, 4) for k, v in row.items()}), flush=True)


def by_copies(n: int = 1000, modes: int = 10, width: int = 16) -> None:
    """Precision, recall, density and coverage with lost modes, and with copies on either side."""
    g = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(modes, width, generator=g)

    def draw(n: int, kept: int = modes) -> Tensor:
        return centres[torch.arange(n) % kept] + torch.randn(n, width, generator=g)

    real = draw(n)
    cases = {"as the real ones": (real, draw(n))}
    cases |= {f"{kept} of {modes} modes": (real, draw(n, kept)) for kept in (8, 5, 2)}
    cases |= {f"generated images {times} times": (real, draw(n // times).repeat(times, 1)) for times in (2, 4)}
    cases |= {f"real images {times} times": (draw(n // times).repeat(times, 1), draw(n)) for times in (2, 4)}
    cases |= {
        "the real images themselves": (real, real),
        "blurred modes": (real, draw(n) + 2 * torch.randn(n, width, generator=g)),
    }
    for name, (left, right) in cases.items():
        found = {k: round(v, 2) for k, v in vars(neighbours(left, right)).items()}
        print(json.dumps({"generated": name, "FD": round(frechet(moments_of(left), moments_of(right)), 1)} | found))


def by_draws(draws: int = 200, n: int = 500, width: int = 16) -> None:
    """What intervals of one draw of images hold, over many draws."""
    deviations, g = torch.arange(1, width + 1) ** -0.5, torch.Generator().manual_seed(0)

    def draw(n: int, size: float = 1.1) -> Tensor:
        return size * torch.randn(n, width, generator=g) * deviations

    reference = moments_of(draw(50_000, 1.0))
    expected = sum(frechet(moments_of(draw(n)), reference) for _ in range(draws)) / draws
    found = [frechet_interval([moments_of(p) for p in draw(n).split(n // 10)], reference) for _ in range(draws)]
    inside = sum(i.low <= expected <= i.high for i in found) / draws
    print(json.dumps({"expected FD": round(expected, 4), "intervals that hold it": inside}), flush=True)
    real = draw(n, 1.0)
    for name, fresh in (("the same real images", False), ("fresh real images", True)):
        near = [vars(neighbours(draw(n, 1.0) if fresh else real, draw(n))) for _ in range(draws)]
        row = {}
        for metric in ("precision", "recall", "coverage"):
            values = torch.tensor([one[metric] for one in near], dtype=torch.float64)
            mean = values.mean()
            row[metric] = round((values.std() / (mean * (1 - mean) / n).sqrt()).item(), 2)
        print(json.dumps({"spread over binomial": name} | row), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--number", action="store_true", help="what the number of images does to the metrics")
    parser.add_argument("--copies", action="store_true", help="what copies and lost modes do to the metrics")
    parser.add_argument("--intervals", action="store_true", help="what intervals of one draw of images hold")
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000, 5000, 10_000])
    args = parser.parse_args(argv)
    if args.number:
        by_number(args.sizes)
    elif args.copies:
        by_copies()
    elif args.intervals:
        by_draws()
    elif (peak := scale(args.images, args.width)) > LIMIT_GIB:
        sys.exit(f"held {peak:.2f} GiB, expected at most {LIMIT_GIB:g}")


if __name__ == "__main__":
    main()
