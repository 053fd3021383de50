"""Work done ahead in other processes, its results in order: what a loader needs of multiprocessing, and no more.

`torch.utils.data.DataLoader` lets its workers die of a signal sent to the whole group before the parent has saved, and
stops them only when its last reference goes, which a traceback may hold until the process cannot end any more.
"""

import atexit
import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from pixelgrow.errors import UserError

Result = TypeVar("Result")
_AHEAD = 2  # tasks each worker has been given
_WATCH = 2.0  # seconds between looks at whether the parent is still there
_open: "weakref.WeakSet[Generator[object, None, None]]" = weakref.WeakSet()


def in_processes(work: Callable[[int], Result], tasks: Iterator[int], count: int) -> Generator[Result, None, None]:
    """`work(task)` for each of the endless `tasks`, in their order, computed ahead by `count` processes.

    The processes end when the generator is closed or raises, at the latest with this process, however that ends.
    What `work` raises becomes a RuntimeError with its traceback; a worker that dies, for want of memory, say, a
    `UserError`.
    """
    results = _in_processes(work, tasks, count)
    _open.add(results)
    return results


def _in_processes(work: Callable[[int], Result], tasks: Iterator[int], count: int) -> Generator[Result, None, None]:
    # An index may hold millions of samples. A forked worker reads its parent's; the start methods that pickle `work`
    # (spawn on macOS; forkserver, the default from Python 3.14 on) would copy it to each worker. What is unsafe to use
    # after a fork, a GPU and many threads, a worker leaves alone.
    fork = sys.platform != "darwin" and "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if fork else None)
    workers = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            workers.append((process, ours))
            theirs.close()
        for _ in range(_AHEAD):
            for _, pipe in workers:
                pipe.send(next(tasks))
        while True:
            for process, pipe in workers:  # worker k has tasks k, k + count, ...: in turn is in order
                try:
                    result, failure = pipe.recv()
                    pipe.send(next(tasks))
                except (EOFError, ConnectionError):
                    process.join()
                    raise UserError(
                        f"a worker of the loader died with exit code {process.exitcode}; if memory ran out, "
                        "use fewer workers or a smaller batch"
                    ) from None
                if failure:
                    raise RuntimeError(f"in a worker of the loader:\n{failure}")
                yield result
    finally:
        for process, pipe in workers:
            pipe.close()
            process.kill()  # they hold nothing that could break
        for process, _ in workers:
            process.join()
            process.close()


def _serve(pipe: Connection, work: Callable[[int], object]) -> None:
    """A worker's life. A signal to the whole group is for the parent to act on: it may want to save first."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = os.getppid()
    outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    threading.Thread(target=_send, args=(pipe, outbox), daemon=True).start()
    try:
        while True:
            while not pipe.poll(_WATCH):
                if os.getppid() != parent:
                    return
            outbox.put(_attempt(work, pipe.recv()))
    except (EOFError, ConnectionError):
        return  # the parent has gone or wants no more


def _send(pipe: Connection, outbox: "queue.SimpleQueue[object]") -> None:
    """Hand over results while the next is computed: a large one waits until the parent takes it."""
    with contextlib.suppress(ConnectionError):
        while True:
            pipe.send(outbox.get())


def _attempt(work: Callable[[int], object], task: int) -> tuple[object, str]:
    try:
        return work(task), ""
    except Exception:  # noqa: BLE001  # it crosses to the parent as text, and is raised there
        return None, traceback.format_exc()


@atexit.register  # after multiprocessing's own, so called before it: that one would wait for our workers for ever
def _close_all() -> None:
    for results in list(_open):
        results.close()
