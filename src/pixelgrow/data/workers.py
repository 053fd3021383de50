"""Worker processes that compute ahead and return results in order.

Why not `torch.utils.data.DataLoader`: a signal to the process group ends its workers before the parent has saved. And
it stops its workers only when its last reference is dropped; a traceback may hold that reference until the process
hangs at its end.
"""

import atexit
import contextlib
import itertools
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Self, TypeVar

import torch

from pixelgrow.errors import UserError

Result = TypeVar("Result")
Place = tuple[int, int]  # first byte of an array in shared memory, and the one after its last
_AHEAD = 2  # tasks that each worker has at a time
_SLOTS = _AHEAD + 1  # results of a worker in shared memory: with the one that was handed out last
_ALIGNED, _SLACK = 64, 1024  # bytes
_WATCH = 2.0  # seconds between checks that the parent is alive
_open: "weakref.WeakSet[Workers[Any]]" = weakref.WeakSet()


class Workers(Generic[Result]):
    """`work(task)` for each of the endless `tasks`, in order, computed ahead by `count` processes.

    Workers put the arrays of their results into memory that they share with this process, up to `room` bytes of each
    result. So an array is valid until the next result is asked for; with several workers, until as many results as
    there are workers were asked for. With `room` 0, and where processes cannot be forked, results are sent by pipes
    and last.

    `memory`: the shared memory, None if there is none.

    The processes end when this is closed, when it raises, or when this process ends in any way. An exception in `work`
    is raised as a RuntimeError with its traceback. Raises `UserError` if a worker dies, as when memory runs out.
    """

    def __init__(self, work: Callable[[int], Result], tasks: Iterator[int], count: int, room: int = 0) -> None:
        # An index may hold millions of samples. A forked worker reads its parent's; the start methods that pickle
        # `work` (spawn on macOS; forkserver, the default from Python 3.14 on) would copy it to each worker. What is
        # unsafe to use after a fork, a GPU and many threads, a worker leaves alone.
        fork = sys.platform != "darwin" and "fork" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("fork" if fork else None)
        self._tasks, self._turn, self._sent = tasks, 0, [0] * count
        self._workers: list[tuple[BaseProcess, Connection]] = []
        slot = _aligned(room + _SLACK) if room and fork else 0
        # Memory without a name: it is freed with the last process, and not limited as /dev/shm is in a container.
        self.memory = mmap.mmap(-1, count * _SLOTS * slot) if slot else None
        self._views: list[list[memoryview]] = [[] for _ in range(count)]
        if self.memory is not None:
            whole = memoryview(self.memory)
            starts = [[(k * _SLOTS + i) * slot for i in range(_SLOTS)] for k in range(count)]
            self._views = [[whole[at : at + slot] for at in of] for of in starts]
        _open.add(self)
        try:
            for views in self._views:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, work, views), daemon=True)
                process.start()
                self._workers.append((process, ours))
                theirs.close()
            for _ in range(_AHEAD):
                for _, pipe in self._workers:
                    pipe.send(next(tasks))
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Result:
        if not self._workers:
            raise StopIteration
        process, pipe = self._workers[self._turn]  # worker k has tasks k, k + count, ..., so this is their order
        try:
            try:
                body, places, failure = pipe.recv()
                pipe.send(next(self._tasks))  # into the slot of this worker's result before
            except (EOFError, ConnectionError):
                process.join()
                raise UserError(
                    f"a worker of the loader died with exit code {process.exitcode}; if memory ran out, "
                    "use fewer workers or a smaller batch"
                ) from None
            if failure:
                raise RuntimeError(f"in a worker of the loader:\n{failure}")
        except BaseException:
            self.close()
            raise
        views = self._views[self._turn]
        view = views[self._sent[self._turn] % _SLOTS] if views else memoryview(b"")
        self._sent[self._turn] += 1
        self._turn = (self._turn + 1) % len(self._workers)
        result: Result = pickle.loads(body, buffers=[view[start:stop] for start, stop in places])  # noqa: S301
        return result

    def ready(self) -> bool:
        """Whether the next result is there already."""
        return bool(self._workers) and self._workers[self._turn][1].poll(0)

    def close(self) -> None:
        """End the processes."""
        workers, self._workers = self._workers, []
        for process, pipe in workers:
            pipe.close()
            process.kill()  # a worker holds nothing that must be closed
        for process, _ in workers:
            process.join()
            process.close()

    def __del__(self) -> None:
        self.close()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _serve(pipe: Connection, work: Callable[[int], object], views: list[memoryview]) -> None:
    """The loop of a worker. It ignores signals: those to the process group are for the parent, which saves first."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = os.getppid()
    outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    threading.Thread(target=_send, args=(pipe, outbox), daemon=True).start()
    try:
        for turn in itertools.count():
            while not pipe.poll(_WATCH):
                if os.getppid() != parent:
                    return
            outbox.put(_attempt(work, pipe.recv(), views[turn % _SLOTS] if views else None))
    except (EOFError, ConnectionError):
        return  # the parent has ended or closed the pipe


def _send(pipe: Connection, outbox: "queue.SimpleQueue[object]") -> None:
    """Send results, in a thread of its own: while the parent takes a large one, the next is computed."""
    with contextlib.suppress(ConnectionError):
        while True:
            pipe.send(outbox.get())


def _attempt(work: Callable[[int], object], task: int, view: memoryview | None) -> tuple[bytes, list[Place], str]:
    """A result pickled, without the arrays that are put into `view`; their places there; the traceback of a failure."""
    places: list[Place] = []

    def put(buffer: pickle.PickleBuffer) -> bool:
        """Put an array into the view; whether it is to be pickled with the rest."""
        raw = buffer.raw()
        start = _aligned(places[-1][1]) if places else 0
        if view is None:
            return True
        assert start + raw.nbytes <= len(view), f"a result has more than the {len(view)} bytes that it has room for"
        view[start : start + raw.nbytes] = raw
        places.append((start, start + raw.nbytes))
        return False

    try:
        return pickle.dumps(work(task), 5, buffer_callback=put), places, ""
    except Exception:  # noqa: BLE001  # sent to the parent as text, and raised there
        return b"", [], traceback.format_exc()


# Called before multiprocessing's own function, which is registered earlier and would wait for the workers for ever.
@atexit.register
def _close_all() -> None:
    for workers in list(_open):
        workers.close()
