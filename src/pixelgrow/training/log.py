"""What a run reports as it trains: a JSONL file, TensorBoard, and a live bar or lines on the terminal."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.writing import flush, writing

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)


def numbers(logs: Sequence[Mapping[str, Tensor | float]], *more: Tensor) -> tuple[list[dict[str, float]], list[float]]:
    """Numbers by name, and more of them, in one transfer from the device; a tensor of several elements is its mean."""
    flat = [*(v for values in logs for v in values.values()), *more]
    moved = iter(torch.stack([v.detach().double().mean() for v in flat if isinstance(v, Tensor)]).tolist())
    found = [float(next(moved) if isinstance(v, Tensor) else v) for v in flat]
    rest = iter(found)
    return [{name: next(rest) for name in values} for values in logs], list(rest)


class Averages:
    """Running means of named numbers."""

    def __init__(self, stored: Mapping[str, tuple[float, int]] | None = None) -> None:
        self.sums = {n: total for n, (total, _) in (stored or {}).items()}
        self.counts = {n: count for n, (_, count) in (stored or {}).items()}

    def add(self, values: Mapping[str, float]) -> None:
        """Add one set of numbers."""
        for name, number in values.items():
            self.sums[name] = self.sums[name] + number if name in self.sums else number
            self.counts[name] = self.counts.get(name, 0) + 1

    def copy(self) -> Averages:
        """A copy: what is added to one later is not in the other."""
        return Averages(self.stored())

    def stored(self) -> dict[str, tuple[float, int]]:
        """Sums and counts since the last `read`."""
        return {n: (self.sums[n], self.counts[n]) for n in self.sums}

    def read(self) -> dict[str, float]:
        """The means since the last `read`; starts anew."""
        means = {n: total / self.counts[n] for n, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


class Log:
    """`log.jsonl`, one record a line, `images` first; and the same numbers in TensorBoard's files if it is installed.

    keep: number of lines to keep of an existing file: those written before the state that the run resumes from. Later
    ones, of a run that was cut off, are dropped.
    """

    def __init__(self, folder: Path, keep: int = 0, images: int = 0, tensorboard: bool = True) -> None:
        self.path = folder / "log.jsonl"
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+b", buffering=0)
            self.file.seek(0)
            kept = self.file.read().split(b"\n")[:-1][:keep]
            self.file.truncate(sum(len(line) + 1 for line in kept))
        self.lines = len(kept)
        self.board = None
        if tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            try:
                with writing(folder / "tensorboard"):
                    self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=images + 1 if images else 0)
            except UserError:
                self.file.close()
                raise

    def write(self, images: int, values: Mapping[str, float]) -> None:
        """Write one record; a number that is not finite becomes null."""
        record: dict[str, float | None] = {"images": images, "time": round(time.time(), 3)}
        record |= {n: float(f"{v:.6g}") if math.isfinite(v) else None for n, v in values.items()}
        with writing(self.path):
            line = json.dumps(record).encode() + b"\n"
            while line:
                line = line[self.file.write(line) or 0 :]
            if self.board is not None:
                for name, value in values.items():
                    self.board.add_scalar(name, value, images)
        self.lines += 1

    def flush(self) -> None:
        """Wait until all records are on the disk."""
        with writing(self.path):
            flush(self.path)
            if self.board is not None:
                self.board.flush()

    def close(self) -> None:
        """Close the files."""
        with writing(self.path):
            self.file.close()
            if self.board is not None:
                self.board.close()


class Display:
    """Progress: a live bar on a terminal, else a line every `pause` seconds through logging."""

    def __init__(self, name: str, images: int, start: int, console: Console | None = None, pause: float = 15.0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.name, self.images, self.pause = name, images, pause
        self.began, self.said, self.start = time.monotonic(), -math.inf, start
        console = console or Console(stderr=True)
        self.bar = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                speed_estimate_period=120,
            )
            self.task = self.bar.add_task(name, total=images, completed=start, note="")

    def update(self, images: int, note: str = "") -> None:
        """Show how far the run is; `note` is a short text such as the loss."""
        if self.bar is not None:
            self.bar.update(self.task, completed=images, note=note)
            return
        now = time.monotonic()
        if now - self.said < self.pause and images < self.images:
            return
        self.said = now
        speed = (images - self.start) / max(now - self.began, 1e-9)
        left = f", {duration(max(0, self.images - images) / speed)} left" if speed > 0 else ""
        logger.info("%s: %s of %s images%s%s", self.name, f"{images:,}", f"{self.images:,}", note and f", {note}", left)

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()


class Displays:
    """Progress of several parts, one after the other: called with a part's name, images done, and images in all."""

    def __init__(self, name: str = "") -> None:
        self.name, self.part = name, ""
        self.stack = ExitStack()

    def __call__(self, part: str, done: int, images: int) -> None:
        if part != self.part:
            self.stack.close()
            shown = ", ".join(filter(None, (self.name, part)))
            self.part, self.display = part, self.stack.enter_context(Display(shown, images, done))
        self.display.update(done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def duration(seconds: float) -> str:
    """A length of time as text: 42 s, 3 min 5 s, 2 h 10 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    return f"{s // 3600} h {s % 3600 // 60} min"
