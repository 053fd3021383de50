"""Hashes that identify the data of a source of files, whatever its path: of each sample, and of all in order.

The hash of a sample covers its key (relative to the source), its captions or class, and its image: the length and the
first and last 4 KiB of the file. So files up to 8 KiB are hashed whole. A change in the middle of a larger file that
keeps both ends and the length is not noticed; image encoders do not make such changes (the last bytes of a PNG hold a
checksum). Times do not count, nor do files that are no samples: a README, a contact sheet, an image without a caption.

Cost: one more read of 4 KiB for an image, after that of its header, and 8 bytes of memory. The list that a run keeps,
to name what differs, takes about 15 bytes a sample on the disk.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from pixelgrow.data.sources.selection import chunks
from pixelgrow.writing import writing

FORM = "content1"  # the first part of a fingerprint; raise the number when a sample's hash is made otherwise
MOST_LISTED = 2_000_000  # samples
END = 4096  # bytes of an image that are hashed, from either end


class Listed(Protocol):
    """A source whose samples have hashes, `prints` (N,) uint64."""

    fingerprint: str

    @property
    def prints(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def key(self, i: int) -> str: ...
    def keys(self) -> Iterator[str]: ...


def hash_of(*parts: str | bytes) -> int:
    """A 64-bit hash of strings in order."""
    data = b"\0".join(p if isinstance(p, bytes) else p.encode(errors="surrogatepass") for p in parts)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def print_of(image: BinaryIO, *about: bytes) -> int:
    """The hash of a sample. `image`: its open file. `about`: its key, and its captions or class."""
    length = image.seek(0, os.SEEK_END)
    image.seek(max(0, length - END))
    last = image.read(END)
    image.seek(0)
    return hash_of(*about, str(length), hashlib.blake2b(image.read(END) + last).digest())


def digest() -> hashlib.blake2b:
    """What `digest_of` fills with the hashes of samples, as bytes of little-endian uint64, and reads at the end."""
    return hashlib.blake2b(digest_size=16)


def digest_of(prints: np.ndarray) -> str:
    """The hash of samples with hashes `prints` (N,) uint64, in order."""
    found = digest()
    for part in chunks(len(prints)):
        found.update(prints[part].astype("<u8", copy=False).tobytes())
    return found.hexdigest()


def fingerprint_of(samples: str, mark: str = "") -> str:
    """The fingerprint of `samples`, the `digest_of` their hashes; `mark`: of the frame that shows them."""
    return f"{FORM}{mark}-{samples}"


def frame_and_samples(fingerprint: str) -> tuple[str, str]:
    """The parts of a fingerprint that say how images are laid out, and which they are; ("", all of it) for scenes."""
    frame, dash, samples = fingerprint.partition("-")
    return (frame, samples) if dash else ("", fingerprint)


def write_samples(folder: Path, source: Listed) -> None:
    """Write the list of a source's samples to `folder`, a line with key and hash each; whole or not at all.

    Of more than `MOST_LISTED` none is written: that would keep every run's first start waiting for a minute and more.
    """
    path = _path(folder, source.fingerprint)
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        if path.exists() or len(source) > MOST_LISTED:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(part, "wt", encoding="ascii", compresslevel=1) as file:
            for key, one in zip(source.keys(), source.prints, strict=True):
                file.write(json.dumps([key, int(one)]) + "\n")
        part.replace(path)


def differences(folder: Path, fingerprint: str, source: Listed) -> str:
    """How a source differs from the one with an earlier `fingerprint`, in words: how many files are gone, new and
    changed, and the first of each. "" if the earlier list is missing or damaged.

    Takes about 50 bytes of memory for each sample of both.
    """
    path = _path(folder, fingerprint)
    try:
        pairs = np.fromiter(((hash_of(key), one) for key, one in _samples(path)), np.dtype("u8,u8"))
    except (OSError, EOFError, ValueError, TypeError, zlib.error):
        return ""
    was, was_prints = pairs["f0"], pairs["f1"]
    now, prints = np.fromiter(map(hash_of, source.keys()), np.uint64, len(source)), source.prints
    gone, new = ~np.isin(was, now), ~np.isin(now, was)
    altered = ~new & ~np.isin(prints, was_prints)  # another image or caption; or one more caption of an image
    dropped = ~gone & ~np.isin(was_prints, prints)  # as it was before; or a caption of an image that has others
    changed = np.union1d(now[altered], was[dropped])
    parts = []
    if gone.any():
        first = next(key for (key, _), is_gone in zip(_samples(path), gone, strict=True) if is_gone)
        parts.append(_counted(len(np.unique(was[gone])), "is gone", "are gone", first))
    if new.any():
        parts.append(_counted(len(np.unique(now[new])), "is new", "are new", source.key(int(new.argmax()))))
    if len(changed):
        first = source.key(int(np.isin(now, changed).argmax()))
        parts.append(_counted(len(changed), "has changed", "have changed", first))
    return ", ".join(parts) or "the same samples stand in another order"


def _counted(count: int, one: str, several: str, first: str) -> str:
    return f"1 file {one} ({first})" if count == 1 else f"{count:,} files {several} (first {first})"


def _samples(path: Path) -> Iterator[tuple[str, int]]:
    with gzip.open(path, "rt", encoding="ascii") as file:
        for line in file:
            key, one = json.loads(line)
            yield key, one


def _path(folder: Path, fingerprint: str) -> Path:
    return folder / f"{fingerprint}.jsonl.gz"
