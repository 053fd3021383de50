"""Being asked to stop: a signal is noted, the step is finished, and the run says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """The run was asked to stop by a signal, finished its step and saved; `status` is 128 + the signal."""

    def __init__(self, signum: int, images: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}, saved at {images:,} images: run the same command again to go on")
        self.status = 128 + signum


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list that fills when SIGTERM, SIGINT or SIGHUP arrives; a second signal has its usual effect.

    A signal that is ignored, as SIGHUP is under nohup, stays so. For the main thread.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    usual: dict[int, Any] = {}

    def note(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)
        signal.signal(signum, usual[signum])

    for asked_by in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(asked_by) is not signal.SIG_IGN:
            usual[asked_by] = signal.signal(asked_by, note)
    try:
        yield asked
    finally:
        for signum, handler in usual.items():
            signal.signal(signum, handler)
