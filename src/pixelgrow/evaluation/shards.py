"""What is measured on images, kept on disk batch by batch: an interrupted evaluation goes on from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.evaluation.differences import differences
from pixelgrow.writing import atomic, fault_of, read_json, write_json, writing

PLAN = "plan.json"
_FACTS = "facts"  # in the file's header


@dataclass(frozen=True)
class Shard:
    """What is known of the images `start` to `start + count - 1`: tensors, and facts as JSON."""

    start: int
    count: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        return self.start + self.count


class Shards:
    """A folder of shards, by part (a seed, the real images) and first number. Each file is written whole or not at all.

    plan: what the evaluation is made of, as JSON. Raises UserError if the folder holds another's, naming what differs.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        self.folder = folder
        was, now = read_json(folder / PLAN), json.loads(json.dumps(dict(plan)))
        if was is not None and (found := differences(was, now)):
            if any(folder.rglob("*.safetensors")):
                raise UserError(
                    f"{folder} holds an unfinished evaluation of something else ({found[0].line('was', 'now')}): give "
                    "the same command as then, name another output, or delete it"
                )
            write_json(folder / PLAN, now)  # nothing was kept by the other plan
        elif was is None:
            if folder.exists() and any(folder.iterdir()):
                raise UserError(f"{folder} holds other files, where an evaluation keeps its own: name another output")
            write_json(folder / PLAN, now)

    def missing(self, part: str, n: int, batch: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of what is still to be measured of `n` images, at most `batch` at a time."""
        starts = sorted(self._starts(part))
        at = 0
        while at < n:
            if starts and starts[0] <= at:
                start = starts.pop(0)
                at = max(at, start + self._facts(part, start).get("count", 0))
                continue
            stop = min(at + batch, n, *starts[:1])
            yield at, stop
            at = stop

    def put(self, part: str, shard: Shard) -> None:
        """Keep a shard. Raises UserError if the disk is full."""
        tensors = {k: t.detach().cpu().contiguous() for k, t in shard.tensors.items()}
        facts = {"count": shard.count, **shard.facts}
        with atomic(self._path(part, shard.start)) as file:
            save_file(tensors, file, metadata={_FACTS: json.dumps(facts)})

    def each(self, part: str, n: int) -> Iterator[Shard]:
        """The shards of a part, in order; together they are of the images 0 to n - 1."""
        at = 0
        while at < n:
            shard = self._read(part, at)
            if shard is None:
                raise UserError(f"{self._path(part, at)} was damaged or removed meanwhile: run the same command again")
            yield shard
            at = shard.stop

    def clear(self) -> None:
        """Remove the folder, once the results are written."""
        with writing(self.folder):
            shutil.rmtree(self.folder)

    def _path(self, part: str, start: int) -> Path:
        return self.folder / part / f"{start:08d}.safetensors"

    def _starts(self, part: str) -> Iterator[int]:
        return (int(p.stem) for p in (self.folder / part).glob("*.safetensors") if p.stem.isdecimal())

    def _read(self, part: str, start: int) -> Shard | None:
        """A shard; None if it is missing or damaged."""
        facts = self._facts(part, start)
        if not facts:
            return None
        with safe_open(self._path(part, start), "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  no mapping
        return Shard(start, facts.pop("count"), tensors, facts)

    def _facts(self, part: str, start: int) -> dict[str, Any]:
        """What the header of a shard says; nothing if it is missing or damaged."""
        path = self._path(part, start)
        if fault_of(path):
            return {}
        with safe_open(path, "pt") as file:
            return dict(json.loads((file.metadata() or {})[_FACTS]))
