"""Worker processes that compute ahead and return results in order.

Why not `torch.utils.data.DataLoader`: a signal to the process group ends its workers before the parent has saved. And
it stops its workers only when its last reference is dropped; a traceback may hold that reference until the process
hangs at its end.
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
_AHEAD = 2  # tasks that each worker has at a time
_WATCH = 2.0  # seconds between checks that the parent is alive
_open: "weakref.WeakSet[Generator[object, None, None]]" = weakref.WeakSet()


def in_processes(work: Callable[[int], Result], tasks: Iterator[int], count: int) -> Generator[Result, None, None]:
    """`work(task)` for each of the endless `tasks`, in order, computed ahead by `count` processes.

    The processes end when the generator is closed, when it raises, or when this process ends in any way. An exception
    in `work` is raised as a RuntimeError with its traceback. Raises `UserError` if a worker dies, as when memory runs
    out.
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
            for process, pipe in workers:  # worker k has tasks k, k + count, ..., so this is their order
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
            process.kill()  # a worker holds nothing that must be closed
        for process, _ in workers:
            process.join()
            process.close()


def _serve(pipe: Connection, work: Callable[[int], object]) -> None:
    """The loop of a worker. It ignores signals: those to the process group are for the parent, which saves first."""
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
        return  # the parent has ended or closed the pipe


def _send(pipe: Connection, outbox: "queue.SimpleQueue[object]") -> None:
    """Send results, in a thread of its own: while the parent takes a large one, the next is computed."""
    with contextlib.suppress(ConnectionError):
        while True:
            pipe.send(outbox.get())


def _attempt(work: Callable[[int], object], task: int) -> tuple[object, str]:
    try:
        return work(task), ""
    except Exception:  # noqa: BLE001  # sent to the parent as text, and raised there
        return None, traceback.format_exc()


# Called before multiprocessing's own function, which is registered earlier and would wait for the workers for ever.
@atexit.register
def _close_all() -> None:
    for results in list(_open):
        results.close()
