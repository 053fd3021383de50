"""The state that a run resumes from exactly: written whole or not at all, checked when read.

`state/<images>/` holds `state.safetensors` (tensors) and `state.json` (counters, checksum). A state is written under a
temporary name, flushed to the disk, and renamed; the one before it is kept, older ones are deleted.

Of a training whose tensors are sharded, each process writes its parts, `<rank>.safetensors`; when all have, the first
one writes `state.json`, and renames. Any number of processes reads either.
"""

from __future__ import annotations

import json
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pixelgrow.distributed import Team, parts
from pixelgrow.errors import UserError
from pixelgrow.writing import atomic, flush, writing

WHOLE, PARTS = 1, 2  # formats: one file, or one of each process
KEPT = 2
TENSORS, COUNTERS = "state.safetensors", "state.json"
Files = dict[str, dict[str, int]]  # their bytes and checksums, by name


@dataclass(frozen=True)
class State:
    """A state as found, its files checked. remedy: what to do if they cannot be read all the same."""

    folder: Path
    counters: dict[str, Any]
    remedy: str

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The shapes and types of the tensors by name, on the meta device. Raises UserError, as all that follow do."""
        with self._reading():
            if not self._whole:
                return parts.stored(self.folder)
            with safe_open(self.folder / TENSORS, framework="pt") as file:  # mapped: no tensor is read
                return {name: file.get_tensor(name).to("meta") for name in file.keys()}  # noqa: SIM118

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Read tensors by name, of sharded ones the parts that this process has."""
        with self._reading():
            if not self._whole or any(type(t) not in (Tensor, nn.Parameter) for t in tensors.values()):
                parts.fill(self.folder, tensors)
                return
            with safe_open(self.folder / TENSORS, framework="pt") as file:
                for name, t in tensors.items():
                    t.copy_(file.get_tensor(name))

    def read(self, *prefixes: str) -> dict[str, Tensor]:
        """Whole tensors on the CPU: all, or those whose names start with one of `prefixes`."""
        names = [n for n in self.tensors if n.startswith(prefixes or "")]
        found = {n: torch.empty_like(self.tensors[n], device="cpu") for n in names}
        self.fill(found)
        return found

    @property
    def _whole(self) -> bool:
        return (self.folder / TENSORS).exists()

    def _reading(self) -> AbstractContextManager[None]:
        return _reading(self.folder, self.remedy)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    with atomic(path) as part:
        _store(part, tensors)


def _store(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str] | None = None) -> None:
    save_file({n: t.detach().contiguous() for n, t in tensors.items()}, path, header)


def save(folder: Path, images: int, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
    """Save the state after `images` in `folder`; a state of the same count is replaced.

    Raises UserError if the disk is full; the states saved before are kept.
    """
    try:
        begin(folder, images)
        commit(folder, images, write(folder, images, TENSORS, tensors), counters)
    except BaseException:
        abandon(folder, images)
        raise


def begin(folder: Path, images: int) -> None:
    """Make room for the files of a state. Raises UserError, as all that follow do."""
    part = _part(folder, images)
    with writing(_final(folder, images)):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)


def write(
    folder: Path, images: int, name: str, tensors: Mapping[str, Tensor], header: dict[str, str] | None = None
) -> Files:
    """Write one file of a state; returns what `commit` needs of it."""
    path = _part(folder, images) / name
    with writing(_final(folder, images)):
        _store(path, tensors, header)
        flush(path)
        return {name: {"bytes": path.stat().st_size, "crc32": _checksum(path)}}


def commit(folder: Path, images: int, files: Files, counters: Mapping[str, Any]) -> None:
    """Make a state of the files that were written: from here on, a run resumes from it. Older states are deleted."""
    part, final = _part(folder, images), _final(folder, images)
    written = {"format": WHOLE} | files[TENSORS] if TENSORS in files else {"format": PARTS, "files": files}
    with writing(final):
        text = json.dumps(written | {"images": images, "counters": dict(counters)}, indent=1)
        (part / COUNTERS).write_text(text + "\n", encoding="utf-8")
        flush(part / COUNTERS)
        flush(part)
        if final.exists():
            _discard(final)
        part.rename(final)
        flush(folder)
        for old in _saved(folder)[:-KEPT]:
            _discard(old)


def abandon(folder: Path, images: int) -> None:
    """Delete what was written of a state since `begin`."""
    shutil.rmtree(_part(folder, images), ignore_errors=True)


def check_common(folder: Path, team: Team) -> None:
    """Raise UserError unless all processes see what the first one writes in `folder`."""
    if team.size == 1:
        return
    mark = folder / team.tell(f".{secrets.token_hex(8)}.part")  # a new name: none that a network disk remembers

    def write() -> None:
        with writing(mark):
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()

    team.alone(write)
    seen = team.gather(mark.exists())
    if team.first:
        mark.unlink()
    if not all(seen):
        blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        raise UserError(f"{folder} is not one folder for all processes (not for {blind}): put the run on a common disk")


def load(folder: Path, team: Team | None = None) -> State | None:
    """The newest state in `folder`, to go on from; None if there is none. Raises UserError as `find` does."""
    if team is None or team.first:
        for left in folder.glob(".*.part"):  # a save that was cut off
            shutil.rmtree(left, ignore_errors=True)
    return find(folder, team)


def find(folder: Path, team: Team | None = None) -> State | None:
    """The newest state in `folder`; None if there is none.

    The folder stays as it is: its run may be writing there. team: each of its processes checks some of the files.
    Raises UserError, naming the file, if one is damaged or missing.
    """
    team, saved = team or Team(), _saved(folder)
    if not saved:
        return None
    newest = saved[-1]
    before = f" to resume from {int(saved[-2].name)} images" if len(saved) > 1 else " to start this stage again"
    remedy = f"delete the folder {newest}{before}"
    try:
        record = json.loads((newest / COUNTERS).read_text(encoding="utf-8"))
        if record["format"] not in (WHOLE, PARTS):
            got = f"got format {record['format']}, expected {WHOLE} or {PARTS}"
            raise UserError(f"{newest / COUNTERS}: {got}; {remedy}")
        files = {TENSORS: record} if record["format"] == WHOLE else dict(record["files"])
        expected = {name: (of["bytes"], of["crc32"]) for name, of in files.items()}
        counters = dict(record["counters"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{newest / COUNTERS} is damaged ({type(error).__name__}); {remedy}") from error
    for name in list(expected)[team.rank :: team.size]:
        with _reading(newest / name, remedy):
            found = ((newest / name).stat().st_size, _checksum(newest / name))
        if found != expected[name]:
            raise UserError(
                f"{newest / name} is damaged: got {found[0]} bytes, checksum {found[1]:08x}, "
                f"expected {expected[name][0]} bytes, {expected[name][1]:08x}; {remedy}"
            )
    return State(newest, counters, remedy)


@contextmanager
def _reading(path: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from error


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


def _part(folder: Path, images: int) -> Path:
    return folder / f".{images}.part"


def _final(folder: Path, images: int) -> Path:
    return folder / f"{images:012d}"


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
