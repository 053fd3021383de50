"""Each distinct caption encoded once, in a memory map that runs and stages share.

A folder per encoder fingerprint holds `records.f16` (for each caption the pooled vector, then its tokens), `index.bin`
(for each caption the hash of its text, the start of its record and its number of tokens) and `encoder.json` (for
people). Both files only grow, the records first. So a kill at any moment leaves a usable cache: records that are not in
the index are ignored.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from pixelgrow.errors import UserError
from pixelgrow.models.cond import Cond, cond_of
from pixelgrow.text.cut import Cut, cut_in, lengths_of
from pixelgrow.text.encoders import TextEncoder, TokenBatch, labels_of, load_spec, load_tokenizer, padded, width_of
from pixelgrow.text.spec import describe
from pixelgrow.writing import size_of

_ENTRY = np.dtype([("hi", "<u8"), ("lo", "<u8"), ("start", "<u8"), ("length", "<u4"), ("check", "<u4")])
_SLAB = 16384  # captions tokenized at a time
_FLUSH = 1024  # captions between two writes
LOOKED_AT = 1024  # captions whose lengths stand for all
_log = logging.getLogger(__name__)


class TextCache:
    """Encodings of captions by the encoder `encoder_name`, on disk in `folder`.

    The encoder is loaded only while `ensure` encodes captions that are missing. Several processes may use one folder;
    they write in turn. With "labels:N", captions are decimal labels and nothing is stored.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder_name: str = "minilm",
        max_tokens: int = 32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises UserError if the encoder cannot be found; its weights are not loaded. `device`: to encode on."""
        self.spec = describe(encoder_name, max_tokens)
        self.folder = Path(folder) / self.spec.fingerprint[:16]
        self._device = device
        self.reload()

    @property
    def dim(self) -> int:
        return self.spec.dim

    @property
    def pooled_dim(self) -> int:
        return self.spec.pooled_dim

    @property
    def fingerprint(self) -> str:
        return self.spec.fingerprint

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, text: str) -> bool:
        return bool(self._find([text])[0] >= 0)

    def ensure(self, texts: Iterable[str], progress: Callable[[int, int], None] | None = None) -> int:
        """Encode and store those of `texts` that are missing; returns their number.

        `progress(done, total)` is called after each batch, in captions. Batches are a function of `texts` alone, not of
        what is stored already, so repeating an interrupted call gives the same bytes for each caption.
        Raises UserError if the folder cannot be written, or if an encoding is not finite.
        """
        wanted = list(dict.fromkeys(texts))
        if self.spec.classes is not None:
            labels_of(wanted, self.spec)
            return 0
        if (self._find(wanted) >= 0).all():
            return 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                self.reload()  # another process may have been here
                return self._fill(wanted, progress)
        except OSError as error:
            what = "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror or error)
            raise UserError(
                f"text cache {self.folder} cannot be written: {what}; expected a writable folder with space; "
                "what was stored so far is kept, run again"
            ) from error

    def cond(self, texts: Sequence[str], width: int | None = None) -> Cond:
        """The stored conditions of `texts`, float32 on the CPU; tokens (B, L, dim), L `width`, or the longest's rounded
        up to 8.

        Raises KeyError with the caption that is not stored.
        """
        return cond_of({name: torch.from_numpy(array) for name, array in self.arrays(texts, width).items()})

    def arrays(self, texts: Sequence[str], width: int | None = None) -> dict[str, NDArray[Any]]:
        """What `cond_of` makes the conditions of `texts` of, in half precision."""
        if self.spec.classes is not None:
            return {"labels": labels_of(texts, self.spec)}
        found = self._find(texts)
        if (found < 0).any():
            raise KeyError(f"caption not in the text cache, ensure() it first: {texts[int(found.argmin())]!r}")
        dim, pooled_dim = self.dim, self.pooled_dim
        items = []
        entries = self._entries[found]
        for start, length in zip(entries["start"].tolist(), entries["length"].tolist(), strict=True):
            middle = start + pooled_dim
            items.append(
                (self._records[middle : middle + length * dim].reshape(length, dim), self._records[start:middle])
            )
        return padded(items, dim, pooled_dim, width)

    def room(self, count: int) -> int:
        """The most bytes of the `arrays` of so many captions."""
        width = 0 if self.spec.classes else width_of(self.spec.max_tokens)
        return count * (2 * (width * self.dim + self.pooled_dim) + 8)

    def cut(self, texts: Sequence[str]) -> Cut:
        """Count those of some distinct, stored `texts` that are longer than `max_tokens`.

        Only texts that fill `max_tokens` are tokenized again; the encoder is not loaded.
        """
        if self.spec.classes is not None:
            return Cut(total=len(texts))
        lengths = self._entries["length"][self._find(texts)]
        full = [texts[row] for row in np.flatnonzero(lengths == self.spec.max_tokens).tolist()]
        return (
            cut_in(load_tokenizer(self.spec), full, self.spec.max_tokens, len(texts)) if full else Cut(total=len(texts))
        )

    # Reading

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is spawned: it opens the files itself."""
        return {name: getattr(self, name) for name in ("spec", "folder", "_device")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reload()

    def reload(self) -> None:
        """Read the index anew, without entries at its end that a kill or a power cut left unfinished."""
        index, records = self.folder / "index.bin", self.folder / "records.f16"
        entries = np.empty(0, _ENTRY)
        if index.exists() and records.exists():
            entries = np.fromfile(index, _ENTRY, count=index.stat().st_size // _ENTRY.itemsize)
            good = (entries["check"] == _check(entries)) & (self._ends(entries) * 2 <= records.stat().st_size)
            entries = entries[: len(good) if good.all() else int(good.argmin())]
        self._entries = entries
        # The fp16 numbers that the index covers.
        self._stored = int(self._ends(entries[-1:])[0]) if len(entries) else 0
        self._records: NDArray[np.float16] = np.empty(0, np.float16)
        if self._stored:
            self._records = np.asarray(np.memmap(records, np.float16, mode="r", shape=(self._stored,)))
        self._order = np.argsort(entries["hi"], kind="stable")
        self._sorted = entries["hi"][self._order]

    def _ends(self, entries: NDArray[Any]) -> NDArray[np.uint64]:
        return entries["start"] + np.uint64(self.pooled_dim) + entries["length"].astype(np.uint64) * np.uint64(self.dim)

    def _find(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """The number of each text's entry, -1 if there is none."""
        keys = _keys(texts)
        found = np.full(len(texts), -1, np.int64)
        at = np.searchsorted(self._sorted, keys["hi"])
        rows = np.arange(len(texts))
        while len(rows):  # one pass, unless two captions share the upper 64 bits of their hashes
            rows = rows[at[rows] < len(self._sorted)]
            rows = rows[self._sorted[at[rows]] == keys["hi"][rows]]
            entry = self._order[at[rows]]
            same = self._entries["lo"][entry] == keys["lo"][rows]
            found[rows[same]] = entry[same]
            rows = rows[~same]
            at[rows] += 1
        return found

    # Writing

    def _lock(self) -> FileLock:
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
            lock.release()
        except Timeout:
            _log.info("waiting for another process that writes the text cache %s", self.folder)
        return lock

    def _fill(self, wanted: list[str], progress: Callable[[int, int], None] | None) -> int:
        missing = self._find(wanted) < 0
        total, done = int(missing.sum()), 0
        if not total:
            return 0
        self._check_room([wanted[row] for row in np.flatnonzero(missing)[:: -(-total // LOOKED_AT)]], total)
        encoder: TextEncoder | None = load_spec(self.spec, self._device)
        try:
            assert encoder is not None
            self._describe()
            with _open(self.folder / "records.f16") as records, _open(self.folder / "index.bin") as index:
                writer = _Writer(records, index, self._stored, len(self._entries))
                for start in range(0, len(wanted), _SLAB):
                    slab, lacks = wanted[start : start + _SLAB], missing[start : start + _SLAB]
                    for batch in encoder.plan(slab) if lacks.any() else ():
                        keep = [i for i, row in enumerate(batch.rows) if lacks[row]]
                        if keep:
                            rows = self._encode(encoder, batch, slab)[keep]
                            writer.add([slab[batch.rows[i]] for i in keep], batch.ids.shape[1], rows)
                            done += len(keep)
                            if progress is not None:
                                progress(done, total)
                writer.flush()
        finally:
            encoder = None
            gc.collect()  # modules with hooks may be in reference cycles
            self.reload()
        return done

    def _check_room(self, some: Sequence[str], total: int) -> None:
        """Say how much `total` captions take on the disk, by the lengths of some. UserError if there is no room."""
        tokens = mean_length(load_tokenizer(self.spec), some, self.spec.max_tokens)
        size = total * stored_bytes(self.dim, self.pooled_dim, tokens)
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise UserError(
                f"text cache {self.folder}: {total:,} captions take about {size_of(size)}, and the disk has "
                f"{size_of(free)} free: make room, name a folder elsewhere (text: {{cache: FOLDER}}), or encode "
                "captions while training (text: {online: true})"
            )
        _log.info("encoding %s captions with %s, about %s", f"{total:,}", self.spec.name, size_of(size))

    def _encode(self, encoder: TextEncoder, batch: TokenBatch, texts: Sequence[str]) -> NDArray[np.float16]:
        """Records (B, pooled_dim + L * dim) of a batch."""
        out = encoder.run(batch)
        rows = torch.cat([out.pooled, out.tokens.flatten(1)], 1).half()
        finite = rows.isfinite().all(1)
        if not finite.all():
            text = texts[batch.rows[int(finite.int().argmin())]]
            raise UserError(
                f"text encoder {encoder.name!r} gives numbers beyond float16 for {text!r}, expected finite ones: check "
                "the encoder's weights, or drop that caption"
            )
        return rows.numpy()

    def _describe(self) -> None:
        facts = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self.spec).items()}
        temporary = self.folder / f"encoder.json.{os.getpid()}"
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.folder / "encoder.json")


def mean_length(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> float:
    """The mean number of tokens that an encoder reads of some texts."""
    lengths = lengths_of(tokenizer, texts)
    return sum(min(length, max_tokens) for length in lengths) / max(1, len(lengths))


def stored_bytes(dim: int, pooled_dim: int, tokens: float) -> float:
    """What a caption of so many tokens takes on the disk."""
    return 2 * (pooled_dim + tokens * dim) + _ENTRY.itemsize


def _open(path: Path) -> io.FileIO:
    path.touch()
    return path.open("r+b", buffering=0)  # a buffer would be written again at close after the disk was full


class _Writer:
    """Appends to both files, the records first, and syncs them to the disk."""

    def __init__(self, records: io.FileIO, index: io.FileIO, stored: int, count: int) -> None:
        """Truncates the files to `stored` fp16 numbers and `count` entries: the rest is of an unfinished call."""
        self._records, self._index, self._end = records, index, stored
        self._rows: list[NDArray[np.float16]] = []
        self._entries: list[NDArray[Any]] = []
        records.truncate(records.seek(stored * 2))
        index.truncate(index.seek(count * _ENTRY.itemsize))

    def add(self, texts: Sequence[str], length: int, rows: NDArray[np.float16]) -> None:
        """Take the records `rows` (B, pooled_dim + length * dim) of `texts`."""
        entries, keys = np.empty(len(texts), _ENTRY), _keys(texts)
        entries["hi"], entries["lo"], entries["length"] = keys["hi"], keys["lo"], length
        entries["start"] = self._end + np.arange(len(texts), dtype=np.uint64) * np.uint64(rows.shape[1])
        entries["check"] = _check(entries)
        self._end += rows.size
        self._rows.append(rows)
        self._entries.append(entries)
        if sum(map(len, self._entries)) >= _FLUSH:
            self.flush()

    def flush(self) -> None:
        """Write what `add` took."""
        for stream, arrays in ((self._records, self._rows), (self._index, self._entries)):
            for array in arrays:
                rest = memoryview(np.ascontiguousarray(array).tobytes())
                while rest:
                    rest = rest[_write(stream, rest) :]
            os.fsync(stream.fileno())
            arrays.clear()


def _write(stream: io.FileIO, data: memoryview) -> int:
    return stream.write(data)


def _keys(texts: Sequence[str]) -> NDArray[Any]:
    """128-bit hashes as two uint64 fields."""
    hashed = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts)
    return np.frombuffer(hashed, np.dtype([("hi", "<u8"), ("lo", "<u8")]))


def _check(entries: NDArray[Any]) -> NDArray[np.uint32]:
    """A checksum that entries of zeros, which a power cut may leave, do not match."""
    mixed = entries["hi"] ^ (entries["lo"] * np.uint64(3)) ^ (entries["start"] * np.uint64(5)) ^ entries["length"]
    return ((mixed >> np.uint64(32)) ^ mixed ^ np.uint64(0x70697867)).astype(np.uint32)
