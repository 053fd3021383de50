"""The state that a run resumes from exactly: written whole or not at all, checked when read.

`state/<images>/` holds `state.safetensors` (tensors) and `state.json` (counters, checksum). A state is written under a
temporary name, flushed to the disk, and renamed; the one before it is kept, older ones are deleted.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.writing import atomic, flush, writing

FORMAT = 1
KEPT = 2
TENSORS, COUNTERS = "state.safetensors", "state.json"


@dataclass(frozen=True)
class State:
    """A state as read: tensors by name, and counters."""

    tensors: dict[str, Tensor]
    counters: dict[str, Any]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    with atomic(path) as part:
        _store(part, tensors)


def _store(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({n: t.detach().contiguous() for n, t in tensors.items()}, path)


def save(folder: Path, images: int, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
    """Save the state after `images` in `folder`; a state of the same count is replaced.

    Raises UserError if the disk is full; the states saved before are kept.
    """
    temporary, final = folder / f".{images}.part", folder / f"{images:012d}"
    with writing(final):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _store(temporary / TENSORS, tensors)
            flush(temporary / TENSORS)
            record = {
                "format": FORMAT,
                "images": images,
                "bytes": (temporary / TENSORS).stat().st_size,
                "crc32": _checksum(temporary / TENSORS),
                "counters": dict(counters),
            }
            (temporary / COUNTERS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            flush(temporary / COUNTERS)
            flush(temporary)
            if final.exists():
                _discard(final)
            temporary.rename(final)
            flush(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    for old in _saved(folder)[:-KEPT]:
        _discard(old)


def load(folder: Path) -> State | None:
    """The newest state in `folder`, to go on from; None if there is none. Raises UserError as `read` does."""
    for left in folder.glob(".*.part"):  # a save that was cut off
        shutil.rmtree(left, ignore_errors=True)
    return read(folder)


def read(folder: Path, prefixes: tuple[str, ...] = ("",)) -> State | None:
    """The newest state in `folder`, with the tensors whose names start with one of `prefixes`; None if there is none.

    The folder stays as it is: its run may be writing there. Raises UserError, naming the file, if it is damaged or
    missing.
    """
    saved = _saved(folder)
    if not saved:
        return None
    newest = saved[-1]
    before = f" to resume from {int(saved[-2].name)} images" if len(saved) > 1 else " to start this stage again"
    remedy = f"delete the folder {newest}{before}"
    try:
        record = json.loads((newest / COUNTERS).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise UserError(f"{newest / COUNTERS}: got format {record['format']}, expected {FORMAT}; {remedy}")
        expected = (record["bytes"], record["crc32"])
        counters = dict(record["counters"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{newest / COUNTERS} is damaged ({type(error).__name__}); {remedy}") from error
    try:
        found = ((newest / TENSORS).stat().st_size, _checksum(newest / TENSORS))
        if found != expected:
            raise UserError(
                f"{newest / TENSORS} is damaged: got {found[0]} bytes, checksum {found[1]:08x}, "
                f"expected {expected[0]} bytes, {expected[1]:08x}; {remedy}"
            )
        with safe_open(newest / TENSORS, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefixes)]  # noqa: SIM118
            return State({name: file.get_tensor(name) for name in names}, counters)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{newest / TENSORS} cannot be read ({error}); {remedy}") from error


def odd(live: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are in one mapping alone, or of another shape or type in the other."""
    same = live.keys() & stored.keys()
    differ = [n for n in same if (live[n].shape, live[n].dtype) != (stored[n].shape, stored[n].dtype)]
    return sorted(live.keys() ^ stored.keys()) + differ


def newest(folder: Path) -> int:
    """Images at the newest state in `folder`; 0 if there is none. Nothing is checked."""
    saved = _saved(folder)
    return int(saved[-1].name) if saved else 0


def clear(folder: Path) -> None:
    """Delete the states of a finished stage."""
    shutil.rmtree(folder, ignore_errors=True)


def _saved(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def _discard(folder: Path) -> None:
    """Delete a state; it is renamed first, so that one half deleted is never read."""
    gone = folder.with_name(f".{folder.name}.old.part")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc
