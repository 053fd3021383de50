"""Stopping by a signal: it is noted, the step is finished, and the message says how to resume."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """A signal stopped the run, which finished its step and saved; `status` is 128 + the signal."""

    def __init__(self, signum: int, images: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}, saved at {images:,} images: run the same command again to go on")
        self.status = 128 + signum


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM, SIGINT and SIGHUP are added to as they arrive; the second one has its usual effect.

    A signal that the process ignores, as SIGHUP under nohup, stays ignored. Without effect outside the main thread.
    """
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield got
        return
    usual: dict[int, Any] = {}

    def note(signum: int, frame: FrameType | None) -> None:
        got.append(signum)
        signal.signal(signum, usual[signum])

    for caught in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(caught) not in (signal.SIG_IGN, None):  # None: a handler that is not Python's
            usual[caught] = signal.signal(caught, note)
    try:
        yield got
    finally:
        for signum, handler in usual.items():
            signal.signal(signum, handler)
