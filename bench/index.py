"""Opening a source of millions of samples by its index: seconds, and memory of this process and of workers.

    python -m bench.index [--samples 12400000] [--shards 12400] [--folder DIR] [--workers 2] [--output index.json]

Seconds are those of this process's work (CPU); on a busy machine the clock, which is printed beside them, says more of
other processes.

One shard is real. The others are links to it, and the index, which a scan would need half an hour and more for, is made
up of its samples under other keys, as a scan would have written it. Each measurement is a process of its own: opening,
holding a part out, the loader, its first batch from the middle of the stream.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from pixelgrow.data import Loader, heldout_split, open_source
from pixelgrow.data.sources.keeping import places_of
from pixelgrow.data.sources.shards import ROW, STAMP, Part, Shard, scan_shard, stamp_of
from pixelgrow.data.sources.stored import Journal, write

CAPTION = "a photograph of something with a caption of an ordinary length, number {}, as people write them"
SIDE = 64
RESUMED = 7_654_321  # a position in the stream


def write_shard(path: Path, count: int) -> None:
    """A tar shard of small JPEGs with captions."""
    image = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (6, 6, 3), np.uint8)
    Image.fromarray(noise).resize((SIDE, SIDE)).save(image, "JPEG")
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            for suffix, data in (("jpg", image.getvalue()), ("txt", CAPTION.format(i).encode())):
                member = tarfile.TarInfo(f"{i:09}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_index(folder: Path, samples: int, shards: int) -> None:
    """A folder of `shards` shards with `samples` samples in all, and its index."""
    each = samples // shards
    folder.mkdir(parents=True, exist_ok=True)
    first = folder.parent / "original.tar"
    write_shard(first, each)
    os.utime(first, (1.6e9, 1.6e9))
    names = [f"{number:06}.tar" for number in range(shards)]
    for name in names:
        (folder / name).symlink_to(first)
    place = places_of(os.fsencode(folder), "shards")[0]
    place.parent.mkdir()
    journal = Journal(place.with_name("made.journal"))
    found = [journal.add(part) for part in _parts(first, names)]
    write(place, found)
    journal.close()
    journal.path.unlink()


def _parts(path: Path, names: list[str]) -> Iterator[Part]:
    """The part of a shard under each of some names."""
    one = scan_shard(Shard(os.fsencode(path), b"0.tar"))
    _, changed, *_ = STAMP.unpack(one.stamp)
    assert changed == stamp_of(os.fsencode(path))[1]
    rows = list(ROW.iter_unpack(one.rows))
    members = [one.texts[at + len("0.tar/") : at + key] for _, _, at, key, _, _ in rows]
    captions = [one.texts[at + key : at + key + size] for _, _, at, key, size, _ in rows]
    prints = np.frombuffer(one.prints, "<u8")
    for number, name in enumerate(names):
        head, at, made = f"{name}/".encode(), 0, []
        texts = [head + member + caption for member, caption in zip(members, captions, strict=True)]
        for (start, length, *_), member, caption, text in zip(rows, members, captions, texts, strict=True):
            raw = ROW.pack(start, length, at, len(head) + len(member), len(caption), 0)[:-4]
            made.append(raw + zlib.crc32(text, zlib.crc32(raw)).to_bytes(4, "little"))
            at += len(text)
        yield replace(
            one,
            name=name.encode(),
            rows=b"".join(made),
            texts=b"".join(texts),
            prints=(prints + np.uint64(number)).tobytes(),
        )


def memory(pid: int | str = "self") -> dict[str, float]:
    """MB: resident now and at most, and of that what the process has for itself."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    told = {line.split()[0]: int(line.split()[1]) / 1000 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    own = sum(int(line.split()[1]) for line in rollup if line.startswith("Private"))
    return {"resident": told["VmRSS:"], "most": told["VmHWM:"], "own": own / 1000}


def measure(folder: str, workers: int) -> dict[str, float]:
    """Open the source and take a batch, in this process."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # most: from here on
    before, found = memory(), dict[str, float]()
    began, worked = time.perf_counter(), time.process_time()

    def done(what: str) -> None:
        found[f"{what}, s"] = time.process_time() - worked
        found[f"{what}, s by the clock"] = time.perf_counter() - began

    source = open_source(folder)
    found["samples"] = len(source)
    done("open")
    train, held = heldout_split(source)
    found["held out"] = len(held)
    done("hold out too")
    loader = Loader(train, size=(SIDE, SIDE), batch=64)
    next(loader.batches(RESUMED))
    done("first batch too")
    after = memory()
    found["grown at most, MB"] = after["most"] - before["most"]
    found["grown for itself, MB"] = after["own"] - before["own"]
    loader.workers = workers
    stream = loader.batches(RESUMED)
    for _ in itertools.islice(stream, 5 * workers):
        pass
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split()
    found["largest worker for itself, MB"] = max(memory(child)["own"] for child in children)
    stream.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=12_400_000)
    parser.add_argument("--shards", type=int, default=12_400)
    parser.add_argument("--folder", type=Path, help="where the index is made, 3 GB, and kept")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.workers)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)) / "shards"
        if not folder.exists():
            began = time.perf_counter()
            write_index(folder, args.samples, args.shards)
            print(f"made in {time.perf_counter() - began:.0f} s", flush=True)
        command = [sys.executable, "-m", "bench.index", "--workers", str(args.workers), "--measure", str(folder)]
        for number in range(1 + args.repeats):  # the first writes the hashes of keys
            done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8")
            rows.append(json.loads(done.stdout))
            print(("once: " if not number else "again: ") + ", ".join(f"{k} {v:.5g}" for k, v in rows[-1].items()))
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    last = rows[-1]
    fits = last["grown at most, MB"] < 100 and last["largest worker for itself, MB"] < 100
    return 0 if last["open, s"] < 2 and last["first batch too, s"] < 5 and fits else 1


if __name__ == "__main__":
    sys.exit(main())
