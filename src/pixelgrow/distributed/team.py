"""The processes of one run, which torchrun starts: N of them share the micro-batches of each step.

Process r takes micro-batches r, r + N, ...; one all-reduce adds up their gradients. Everything else that a run makes is
made by the first process. What fails in one process fails in all, and one of them says so.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pixelgrow.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
# The others wait while the first process encodes captions or makes pairs. None waits for one that has ended: its
# connections break.
PATIENCE = timedelta(days=30)
ENDED = "another process of this run has ended: run the same command again to go on"


class Lost(UserError):
    """Another process of the run has ended, without a word to the others."""


@dataclass(frozen=True)
class Team:
    """Process `rank` of `size`. With one process, all methods do nothing but what is asked of it.

    All processes call the methods in the same order; they raise Lost in those that are left when one has ended.
    talk: the process group of what they say to each other, on CPUs. store: their common memory.
    """

    rank: int = 0
    size: int = 1
    talk: Any = None
    store: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def most(self, *numbers: int) -> list[int]:
        """The largest value among the processes of each number."""
        if self.size == 1 or not numbers:
            return list(numbers)
        found = torch.tensor(numbers)
        with connected():
            dist.all_reduce(found, dist.ReduceOp.MAX, self.talk)
        return found.tolist()

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.most(0)

    def tell(self, value: T) -> T:
        """The first process's value."""
        if self.size == 1:
            return value
        told = [value if self.first else None]
        with connected():
            dist.broadcast_object_list(told, 0, self.talk)
        return told[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with connected():
            dist.all_gather_object(found, value, self.talk)
        return found

    def interleave(self, mine: Sequence[T]) -> list[T]:
        """The values of all tasks, of which process r did r, r + size, ...; `mine` are those of this one."""
        every = self.gather(mine)
        return [every[i % self.size][i // self.size] for i in range(sum(map(len, every)))]

    @contextmanager
    def together(self) -> Iterator[None]:
        """An exception inside, in any process, is raised in all of them. No method is called inside."""
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # noqa: BLE001  # raised again, in all processes
            error = raised
        if any(self.most(error is not None)):
            raised_by = self.gather(error and _portable(error))
            raise error or next(filter(None, raised_by))

    def alone(self, work: Callable[[], T]) -> T:
        """What `work()` returns in the first process; the others wait for it."""
        made: T | None = None
        with self.together():
            if self.first:
                made = work()
        return self.tell(made)  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], T]) -> T:
        """What `work()` returns in each process: the first one calls it before the others, which find what it made."""
        made: list[T] = []
        for turn in (self.first, not self.first):
            with self.together():
                if turn:
                    made.append(work())
        return made[0]

    def share(self, tasks: Sequence[T], work: Callable[[T], R]) -> list[R]:
        """`work(task)` for each task, of which each process does its share; all get all results."""
        with self.together():
            mine = [work(task) for task in tasks[self.rank :: self.size]]
        return self.interleave(mine)

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's tensors."""
        if self.size > 1:
            self.wait()  # a GPU's group waits for minutes only
            with connected():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), 0)

    def add_up(self, parameters: Sequence[Tensor], number: Tensor) -> Tensor:
        """Add up the gradients of all processes, in one all-reduce in float32; returns the sum of a number (scalar).

        A parameter that has no gradient in any process keeps none.
        """
        if self.size == 1:
            return number
        used = self.most(*(p.grad is not None for p in parameters))
        for p, some in zip(parameters, used, strict=True):
            if some and p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([*(g.float().flatten() for g in grads), number.float().flatten()])
        with connected():
            dist.all_reduce(flat)
        for g, part in zip(grads, flat.split([*(g.numel() for g in grads), 1]), strict=False):
            g.copy_(part.view(g.shape))
        return flat[-1]

    def speaks(self) -> bool:
        """Whether this process is the first to ask; only that one says how the run ended."""
        try:
            return self.store is None or self.store.add("pixelgrow/spoken", 1) == 1
        except RuntimeError:  # the process that holds the store has ended
            return False


def _portable(error: Exception) -> Exception:
    """The error itself, if it can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  # of our own making
    except Exception:  # noqa: BLE001  # what an exception's own methods raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def connected() -> Iterator[None]:
    """Around what processes exchange: raises Lost if another one has ended."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(ENDED) from error


def _check_environment() -> None:
    """Raise UserError unless torchrun's variables are there, with numbers where there must be some."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        value = os.environ.get(name)
        if value is None or (name != "MASTER_ADDR" and not value.isdecimal()):
            got = "nothing" if value is None else repr(value)
            raise UserError(
                f"RANK is set, as for one of several processes, but {name} is {got}, expected what torchrun sets: "
                "start them with torchrun, or unset RANK"
            )


@contextmanager
def join() -> Iterator[Team]:
    """The team of this process: torchrun has set RANK and WORLD_SIZE. Without them the process is alone.

    Whatever ends all processes is raised in one of them; the others end with its status and say nothing.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield Team()
        return
    _check_environment()
    from torch.distributed.rendezvous import rendezvous

    with connected():
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl", store=store, rank=rank, world_size=size)
            talk = dist.new_group(backend="gloo", timeout=PATIENCE)
        else:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
            talk = dist.group.WORLD
    team = Team(rank, size, talk, store)
    team.wait()  # none leaves before all have come
    logger = logging.getLogger("pixelgrow")
    level = logger.level
    if not team.first:
        logger.setLevel(logging.CRITICAL)
    try:
        yield team
        team.wait()
    except BaseException as error:
        if not team.speaks():
            raise SystemExit(getattr(error, "status", 2 if isinstance(error, UserError) else 1)) from error
        raise
    finally:
        logger.setLevel(level)
        dist.destroy_process_group()
