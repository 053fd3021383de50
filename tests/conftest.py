"""What every test gets: no network, fixed seeds, one core per worker, and the command line as a function."""

from __future__ import annotations

import io
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Before torch and the hub's client are imported; subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if WORKERS > 1 or "OMP_NUM_THREADS" not in os.environ:  # a worker inherits what its controller, being one, set
    os.environ["OMP_NUM_THREADS"] = str(max(1, CORES // WORKERS))

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _is_local(family: int, address: Any) -> bool:
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True
    host = str(address[0])
    return host in ("localhost", "::1") or host.startswith("127.")


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Connections leave this process only over unix sockets and the loopback."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded(real: Any) -> Any:
        def call(self: socket.socket, address: Any) -> Any:
            if not _is_local(self.family, address):
                self.close()
                raise RuntimeError(f"a test tried to reach the network: {address}")
            return real(self, address)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(connect))
        patch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
        yield


@dataclass(frozen=True)
class CliResult:
    """What a command line left behind."""

    code: int
    out: str
    err: str


class RunCli(Protocol):
    def __call__(
        self, *args: str | Path, cwd: Path | None = None, new_process: bool = False, timeout: float = 100
    ) -> CliResult: ...


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch) -> RunCli:
    """`run_cli("sample", "tiny", ...) -> CliResult`, in this process unless `new_process`."""

    def run(*args: str | Path, cwd: Path | None = None, new_process: bool = False, timeout: float = 100) -> CliResult:
        words = [str(a) for a in args]
        if new_process:
            command = [sys.executable, "-c", "from pixelgrow.cli.main import main; main()", *words]
            done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)
            return CliResult(done.returncode, done.stdout, done.stderr)

        from pixelgrow.cli.main import main

        out, err, code = io.StringIO(), io.StringIO(), 0
        with monkeypatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["pixelgrow", *words])
            if cwd is not None:
                patch.chdir(cwd)
            try:
                main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return CliResult(code, out.getvalue(), err.getvalue())

    return run
