"""Runs of several processes on this machine: the command line in each, joined as by torchrun.

They are forked from a server that has imported everything and computed nothing, so that starting one takes no time.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conftest import CliResult
from extractors import Pixels
from pixelgrow.cli.main import main
from pixelgrow.data.loader import Batch
from pixelgrow.data.sources import remote
from pixelgrow.evaluation import planning
from pixelgrow.evaluation.shards import Shard, Shards
from pixelgrow.stages import pairs
from pixelgrow.training import loop, monitor, state
from pixelgrow.training.denoise import DenoiseObjective
from pixelgrow.training.objective import Terms
from runs import few_samples

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["processes", "pixelgrow.run", "torch._dynamo", "torch.distributed.fsdp"]
CONTEXT.set_forkserver_preload([*PRELOAD, "torch.utils.tensorboard", "rich.progress"])
Prepare = Callable[[int], None]  # of a process by its rank, before it runs; a function of a module


@dataclass(frozen=True)
class Running:
    """Processes by rank, and the folder of what they say."""

    processes: list[multiprocessing.process.BaseProcess]
    folder: Path

    def end(self, timeout: float = 250) -> list[CliResult]:
        """How each of them ended."""
        for process in self.processes:
            process.join(timeout)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        said = [[(self.folder / f"{rank}.{kind}").read_text() for kind in ("out", "err")] for rank in range(len(codes))]
        assert None not in codes, f"it hangs: {said}"
        return [CliResult(int(code or 0), *texts) for code, texts in zip(codes, said, strict=True)]


def start(folder: Path, *words: str | Path, size: int = 2, prepare: Prepare | None = None) -> Running:
    """Start `pixelgrow WORDS` in `size` processes. folder: gets what they say, by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_main, args=(rank, size, port, folder, [str(w) for w in words], prepare))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return Running(list(processes), folder)


def run_team(folder: Path, *words: str | Path, size: int = 2, prepare: Prepare | None = None) -> list[CliResult]:
    """`start`, and wait for the end."""
    return start(folder, *words, size=size, prepare=prepare).end()


def _main(rank: int, size: int, port: int, folder: Path, words: list[str], prepare: Prepare | None) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    monitor.matmul_rate = lambda *_: 1e11  # type: ignore[assignment]  # nothing is measured here
    sys.argv = ["pixelgrow", *words]
    with few_samples(), suppress(BrokenPipeError):
        if prepare is not None:
            prepare(rank)
        main()


# --- what each process makes -----------------------------------------------------------------------------------------


def noted(folder: Path, rank: int) -> None:
    """Write down which shards of pairs and of evaluations a process makes; its extractor costs nothing."""

    def note(path: Path) -> None:
        with (folder / f"{rank}.made").open("a", encoding="utf-8") as file:
            file.write(f"{path.parent.name}/{path.stem.lstrip('0') or '0'}\n")

    def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
        write(path, tensors)
        note(path)

    def put(self: Shards, part: str, shard: Shard) -> None:
        keep(self, part, shard)
        note(self._path(part, shard.start))

    write, keep = pairs.write_shard, Shards.put
    pairs.write_shard = write_shard
    Shards.put = put  # type: ignore[method-assign]
    planning.load_extractor = lambda *_: Pixels()  # type: ignore[assignment]


def few_checked(rank: int) -> None:
    """The round trip of pairs is measured on two images, so that a process decodes few that are not of its share."""
    pairs.CHECKED = 2


def made(folder: Path, size: int) -> list[list[str]]:
    """What `noted` wrote, by rank."""
    files = [folder / f"{rank}.made" for rank in range(size)]
    return [file.read_text().splitlines() if file.exists() else [] for file in files]


def with_own_cache(root: Path, rank: int) -> None:
    """A cache for each process, which says who it is to the server that it reads shards from."""
    import fsspec.config

    os.environ["XDG_CACHE_HOME"] = str(root / f"cache{rank}")
    fsspec.config.conf["http"] = {"headers": {"X-Who": f"{root.name}{rank}"}}
    remote.PAUSES[:] = [0.0, 0.0, 0.0]


# --- faults: what `prepare` does to one process -----------------------------------------------------------------------


def at_step(fault: Callable[[], None], images: int, of: int, rank: int) -> None:
    """Process `of` meets a fault before its step at so many images, when it has written its last state."""
    real = loop.Training.step

    def step(self: loop.Training, micro: Sequence[Any]) -> None:
        if self.counters.images == images:
            if self.saver.flight is not None and self.saver.flight[2] is not None:
                self.saver.flight[2].exception()
            fault()
        real(self, micro)

    if rank == of:
        loop.Training.step = step  # type: ignore[method-assign]


def terminated() -> None:
    signal.raise_signal(signal.SIGTERM)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def all_killed(images: int, rank: int) -> None:
    """All processes are killed before their step at so many images."""
    at_step(killed, images, rank, rank)


def in_save(fault: Callable[[], None], images: int, of: int, rank: int) -> None:
    """Process `of` meets a fault when half of its state at so many images is on the disk."""
    real = state._store

    def store(path: Path, *what: Any) -> None:
        real(path, *what)
        if path.parent.name == f".{images}.part":
            os.truncate(path, path.stat().st_size // 2)
            fault()

    if rank == of:
        state._store = store


def killed_in_save(images: int, rank: int) -> None:
    """The first process is killed when half of its state at so many images is on the disk."""
    in_save(killed, images, 0, rank)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def killed_in_pairs(folder: Path, shard: int, of: int, rank: int) -> None:
    """Process `of` is killed before it writes a shard of pairs."""
    noted(folder, rank)
    write = pairs.write_shard

    def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
        if int(path.stem) == shard:
            killed()
        write(path, tensors)

    if rank == of:
        pairs.write_shard = write_shard


def without_workers() -> None:
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


def not_finite(first: int, last: int, rank: int) -> None:
    """The loss of the images from `first` to `last` of the stream is not finite, in whatever process they are."""
    real = DenoiseObjective.loss

    def loss(self: DenoiseObjective, batch: Batch, part: str = "denoiser") -> Terms:
        terms = real(self, batch, part)
        wrong = (batch.index >= first) & (batch.index <= last)
        return replace(terms, loss=terms.loss * float("nan")) if wrong.any() else terms

    DenoiseObjective.loss = loss  # type: ignore[method-assign]


def without_memory() -> None:
    """From here on, this process has no memory for a loss."""
    out_of_memory(0, 0)


def out_of_memory(of: int, rank: int) -> None:
    """Process `of` has no memory for its first loss."""

    def loss(self: DenoiseObjective, batch: Batch, part: str = "denoiser") -> Terms:
        raise MemoryError("no more")

    if rank == of:
        DenoiseObjective.loss = loss  # type: ignore[method-assign]
