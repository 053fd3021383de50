"""The entry point: one line and a status for every mistake and signal."""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import dataclass
from types import FrameType

import typer

from pixelgrow.cli.streams import Unwritable, discard_output, secure_streams
from pixelgrow.cli.usage import check_filled, in_one_line, is_usage_error
from pixelgrow.cli.verbs import app
from pixelgrow.errors import UserError, out_of_memory

# What to do when memory runs out, by verb; `run` says it by stage.
LESS_MEMORY = {
    "sample": "run it again with a smaller --batch, or a smaller --size",
    "edit": "crop the image to the model's square (--fit), or edit with a smaller model",
    "grow": "grow it by a recipe's grow stage, with a smaller batch:",
    "recaption": "run the same command again with a smaller --batch: it goes on from what was saved",
    "evaluate": "run the same command again with a smaller --batch: it goes on from what was saved",
}
MORE_MEMORY = "use a machine with more memory, or end other programs"
GO_ON = "run the same command again to go on"


def main() -> None:
    """The entry point. A mistake is one line on stderr and status 2, a stop by a signal one line and 128 + signal.

    Status 141 and no line where the reader of standard output has gone, as with `| head`.
    """
    secure_streams()
    log = logging.getLogger("pixelgrow")
    log.setLevel(logging.INFO)
    log.handlers = [_Stderr()]
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup
            signal.signal(signum, _stopped)
    share_cores()
    end = _obey()
    try:
        sys.stdout.flush()
    except Unwritable as error:
        discard_output()
        end = end if end.status else _lost(error)
    if end.message:
        sys.stderr.write(f"pixelgrow: {end.message}\n")
    if "RANK" in os.environ:
        # Under torchrun: gloo's threads outlive their groups while a sharded network refers to them, and abort the
        # process when they want the interpreter's lock at its end (pytorch/pytorch#179291).
        sys.stderr.flush()
        os._exit(end.status)
    if end.status:
        sys.exit(end.status)


@dataclass(frozen=True)
class End:
    """How a command ended: its exit status, and a line for stderr."""

    status: int = 0
    message: str = ""


def _obey() -> End:
    """Carry out the command line."""
    try:
        check_filled(sys.argv[1:])
        status = app(sys.argv[1:] or ["--help"], prog_name="pixelgrow", standalone_mode=False)
        if status == 130:  # typer has caught a KeyboardInterrupt
            return _signalled(signal.SIGINT)
        return End(status if isinstance(status, int) else 0)
    except UserError as error:
        return End(2, str(error))
    except Unwritable as error:
        return _lost(error)
    except (KeyboardInterrupt, typer.Abort):
        return _signalled(signal.SIGINT)
    except _Stopped as stop:
        return _signalled(stop.signum)
    except Exception as error:
        if out_of_memory(error):
            reason = str(error).partition("\n")[0][:120] or type(error).__name__
            return End(2, f"out of memory ({reason}): {LESS_MEMORY.get(_verb(), MORE_MEMORY)}")
        if is_usage_error(error):
            return End(2, in_one_line(error, sys.argv[1:]))
        if type(error).__name__ != "Interrupted":  # of training; its import would bring torch along
            raise
        return End(getattr(error, "status", 1), str(error))


def _lost(error: Unwritable) -> End:
    return End(128 + signal.SIGPIPE) if error.unread else End(2, str(error))


def _signalled(signum: int) -> End:
    message = f"stopped by {signal.Signals(signum).name}"
    return End(128 + signum, f"{message}: {GO_ON}" if _verb() in ("run", "demo", "recaption", "evaluate") else message)


def _verb() -> str:
    """The verb of the command line, `recaption` of `data recaption`."""
    words = [*sys.argv[1:3], "", ""]
    return words[1] if words[:2] == ["data", "recaption"] else words[0]


def share_cores() -> None:
    """Have idle threads of libgomp sleep soon (about 10 us) in place of spinning for milliseconds; before torch is
    imported. Costs nothing alone, and saves speed where others use the cores (`python -m bench.contention`)."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


class _Stderr(logging.Handler):
    """Messages to what stderr is now: a live progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


class _Stopped(BaseException):
    """SIGTERM or SIGHUP outside of training."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def _stopped(signum: int, frame: FrameType | None) -> None:
    raise _Stopped(signum)
