"""Throughput of the loader against a bare Pillow decode-and-resize loop over the same files, at the same worker count.

    python -m bench.loader [--images 400] [--resolution 64] [--workers 0 1 2] [--repeats 3] [--output loader.json]

The bare loop does what the loader must do at least: read, decode at the reduced DCT scale, filter, crop, make an array;
no captions, no order, no batches, no tensors, nothing sent between processes. The two take turns; the best of each is
compared.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data as pictures

from pixelgrow.data import Loader, Source, open_source

BATCH = 32
SIZES = ((640, 480), (500, 375), (512, 512), (480, 640))  # (w, h), as web photographs come


def write_photographs(folder: Path, count: int, scale: float = 1.0) -> None:
    """Captioned JPEG crops of scikit-image's pictures."""
    originals = [Image.fromarray(picture()) for picture in (pictures.astronaut, pictures.chelsea, pictures.coffee)]
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for i in range(count):
            w, h = (round(side * scale) for side in SIZES[i % len(SIZES)])
            name = f"{i:05}.jpg"
            originals[i % 3].rotate(i % 7).resize((w, h)).save(folder / name, quality=90)
            metadata.write(json.dumps({"file_name": name, "text": f"photograph number {i}"}) + "\n")


def bare(paths: list[str], side: int) -> None:
    """The loop to compare with."""
    for path in paths:
        with Image.open(path) as image:
            image.draft("RGB", (2 * side, 2 * side))
            rgb = image.convert("RGB")
        scale = min(rgb.size) / side
        left, top = (rgb.width - side * scale) / 2, (rgb.height - side * scale) / 2
        box = (left, top, left + side * scale, top + side * scale)
        np.array(rgb.resize((side, side), Image.Resampling.LANCZOS, box=box, reducing_gap=2.0))


def time_bare(paths: list[str], side: int, workers: int) -> float:
    """Images per second of `bare`, each worker with its share of the files, started before the clock."""
    if not workers:
        start = time.perf_counter()
        bare(paths, side)
        return len(paths) / (time.perf_counter() - start)
    shares = [paths[k::workers] for k in range(workers)]
    with multiprocessing.Pool(workers) as pool:
        pool.map(os.path.exists, paths[:workers])
        start = time.perf_counter()
        pool.starmap(bare, [(share, side) for share in shares], chunksize=1)
        return len(paths) / (time.perf_counter() - start)


def time_loader(source: Source, side: int, workers: int, images: int) -> float:
    """Images per second of the loader, warm: first batches out of the way."""
    stream = Loader(source, size=(side, side), batch=BATCH, workers=workers).batches()
    for _ in range(max(1, 3 * workers)):
        next(stream)
    start = time.perf_counter()
    count = sum(len(batch) for batch in itertools.islice(stream, -(-images // BATCH)))
    rate = count / (time.perf_counter() - start)
    stream.close()  # type: ignore[attr-defined]
    return rate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--scale", type=float, default=1.0, help="of the photographs' sides, 1 is about 640x480")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), args.images, args.scale)
        source = open_source(folder)
        paths = [os.path.join(folder, source.key(i)) for i in range(len(source))]
        for workers in args.workers:
            rates = [
                (
                    time_bare(paths, args.resolution, workers),
                    time_loader(source, args.resolution, workers, len(paths)),
                )
                for _ in range(args.repeats)
            ]
            plain, ours = (max(column) for column in zip(*rates, strict=True))
            rows.append({"workers": workers, "bare": plain, "loader": ours, "ratio": ours / plain})
            print(f"workers {workers}: bare {plain:7.1f} images/s, loader {ours:7.1f}, ratio {ours / plain:.3f}")
    if args.output:
        args.output.write_text(
            json.dumps({"resolution": args.resolution, "scale": args.scale, "rows": rows}, indent=1), encoding="utf-8"
        )
    return 0 if all(row["ratio"] >= 0.9 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
