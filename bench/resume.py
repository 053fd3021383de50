"""Exact resume: a run that meets a fault, started again by the same command, must leave the bytes of one left alone.

    python -m bench.resume [--processes 2] [--shard 2] [--faults 20] [--seed 0] [--restart] [--folder FOLDER]

A small recipe (a core at 16 px, grown to 32 px, pairs, a one-step generator, an evaluation) runs on `--processes`
processes that torchrun's own agent starts. With `--shard` S, each of S has a part of the weights, and writes it. Each
run meets a fault of a kind in turn, at a random moment:

    kill one    SIGKILL of one process
    kill all    SIGKILL of all of them
    stop one    SIGTERM to one process
    cut write   SIGKILL of the first process while it writes a file, of which the second half is lost

Then the same command finishes it; with `--restart`, torchrun starts it again by itself. Weights, configurations,
growth reports, sample grids, logged losses, pairs, caption caches and measured numbers are compared byte for byte.
Prints a table.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

COMPARED = (".safetensors", ".f16", ".png", ".json", "log.jsonl")
MEASURED = {  # of the machine and the moment: not results
    "time", "seconds", "wall_seconds", "images_per_second", "waited", "matmul_share", "memory_mib", "peak_memory",
    "seconds_per_image", "skipped", "sentence",
}  # fmt: skip
PRELOADED = ["pixelgrow.run", "torch._dynamo", "torch.utils.tensorboard", "rich.progress"]
KINDS = ("kill one", "kill all", "stop one", "cut write")
NAME = "resume"
STAGES = ("eval", "onestep", "pairs", "grown", "core")


def recipe(processes: int, shard: int) -> dict[str, Any]:
    """Every kind of work in some seconds, saved and logged often."""
    often = {"batch": 8, "accumulate": processes, "save_every": 8, "log_every": 8}
    often |= {"sample_every": 0, "validate_every": 24, "snapshot_every": 24}
    stages = [
        {"train": {"name": "core", "size": "tiny", "resolution": 16, "stride": 8, "images": 48} | often},
        {"grow": {"name": "grown", "from": "core", "to": 32, "images": 32, "core": {"unfreeze_after": 16}} | often},
        {"pairs": {"name": "pairs", "from": "core", "n": 16, "shard": 2, "batch": 2, "steps": 3}},
        {"distill": {"name": "onestep", "pairs": "pairs", "images": 24} | often},
        {"evaluate": {"name": "eval", "from": "grown", "prompts": 8, "batch": 2, "steps": 3}},
    ]
    text = {"encoder": "minilm", "max_tokens": 16}
    data = {"source": "scenes", "n": 1000, "captions": 16}
    held = {"source": "scenes", "split": "heldout", "n": 8, "captions": 8}
    made = {"name": NAME, "text": text, "data": data, "heldout": held, "stages": stages}
    return made | ({"parallel": {"shard": shard}} if shard > 1 else {})


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """kind: one of KINDS. of: the process that meets it. at: seconds after the start; the number of a write for `cut
    write`."""

    kind: str
    of: int
    at: float


def work(root: Path, fault: Fault | None) -> None:
    """A process's work: `pixelgrow run` with the recipe in `root`."""
    from pixelgrow.cli.main import main as pixelgrow
    from pixelgrow.stages import distill, grow, looks, train
    from pixelgrow.training import monitor

    looks.GRID, looks.KNOWN, looks.GRID_STEPS = 4, 3, 2  # what is looked at need not be good
    train.WATCHED = grow.WATCHED = distill.WATCHED = 4
    monitor.matmul_rate = lambda *_: 1e11
    rank, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    fault = fault if attempt == "0" else None
    _write_whole(root / f"{rank}.attempts", attempt)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(root / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    leave = os._exit  # torchrun's agent waits until a function returns
    os._exit = lambda status: leave(status) if status else None  # type: ignore[assignment]
    writes = _count_writes(fault.at if fault and fault.kind == "cut write" and fault.of == rank else None)
    _write_whole(root / f"{rank}.pid", str(os.getpid()))
    sys.argv = ["pixelgrow", "run", str(root / "recipe.yaml"), "--runs", str(root)]
    pixelgrow()
    os._exit = leave
    _write_whole(root / f"{rank}.writes", str(writes()))


def _count_writes(last: float | None) -> Callable[[], int]:
    """Count what this process brings to the disk; at number `last` it loses half of the file and dies."""
    real, done = os.fsync, 0

    def fsync(fd: int) -> None:
        nonlocal done
        done += 1
        if done == last:
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            if path.is_file() and path.name != "log.jsonl":  # a log is not written anew
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        real(fd)

    os.fsync = fsync
    return lambda: done


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def launch(root: Path, processes: int, shard: int, fault: Fault | None = None, restarts: int = 0) -> int:
    """Run the recipe in `root` to its end; the exit status of the process that failed first, 0 if none did.

    restarts: how often torchrun may start all processes again after one has failed.
    """
    for left in root.glob("*.pid"):
        left.unlink()
    _write_whole(root / "recipe.yaml", json.dumps(recipe(processes, shard)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=NAME,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        start_method="forkserver",
        shutdown_timeout=600,
    )
    ended = threading.Event()
    thread = threading.Thread(target=_meet, args=(root, processes, fault, ended))
    if fault is not None and fault.kind != "cut write":
        thread.start()
    status = 0
    try:
        elastic_launch(config, work)(root, fault)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
    return status


def _meet(root: Path, processes: int, fault: Fault, ended: threading.Event) -> None:
    """Bring a fault to processes after `fault.at` seconds of their work."""
    paths = [root / f"{rank}.pid" for rank in range(processes)]
    while not all(path.exists() for path in paths):
        if ended.wait(0.01):
            return
    if ended.wait(fault.at):
        return
    signum = signal.SIGTERM if fault.kind == "stop one" else signal.SIGKILL
    for path in paths if fault.kind == "kill all" else [paths[fault.of]]:
        with suppress(ProcessLookupError):
            os.kill(int(path.read_text(encoding="utf-8")), signum)


# --- what is compared -------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """What must be the same, by path; of records, the numbers that are results."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or not name.endswith(COMPARED) or "state/" in name or path.name.startswith("."):
            continue
        found[name] = path.read_bytes()
        if path.name.endswith((".json", ".jsonl")):
            lines = found[name].splitlines() if path.suffix == ".jsonl" else [found[name]]
            found[name] = json.dumps([_results(json.loads(line)) for line in lines]).encode()
    return found


def _results(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _results(v) for k, v in value.items() if k not in MEASURED}
    return [_results(v) for v in value] if isinstance(value, list) else value


def where(folder: Path) -> str:
    """How far a run's files say that it was."""
    for stage in STAGES:
        saved = sorted(p.name for p in (folder / stage).glob("**/state/[0-9]*"))
        if saved:
            return f"{stage}, saved at {int(saved[-1])}"
        if (folder / stage / "stage.json").exists():
            return f"{stage}, nothing saved"
    return "before the first stage"


@dataclass(frozen=True)
class Trial:
    """statuses: exit status of the run with the fault, and of the one after it. where: after the fault."""

    fault: Fault
    statuses: tuple[int, int]
    where: str
    differ: tuple[str, ...]
    said: str

    @property
    def good(self) -> bool:
        return not self.differ and self.statuses[1] == 0


def trial(root: Path, processes: int, shard: int, expected: dict[str, bytes], fault: Fault, restart: bool) -> Trial:
    """A run with a fault, finished by the same command (restart: by torchrun), and compared. A run that ends before its
    fault is no trial: the fault then comes at half the time."""
    while True:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        status = launch(root, processes, shard, fault, restarts=int(restart))
        if status or (root / "0.attempts").read_text(encoding="utf-8") != "0":
            break
        fault = Fault(fault.kind, fault.of, fault.at // 2 if fault.kind == "cut write" else fault.at / 2)
    met = "restarted by torchrun" if restart else where(root / NAME)
    for said in root.glob("*.err"):
        said.rename(said.with_suffix(".before"))
    again = status if restart else launch(root, processes, shard)
    found = contents(root / NAME)
    differ = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    lines = [line for said in sorted(root.glob("*.err")) for line in said.read_text(encoding="utf-8").splitlines()]
    return Trial(fault, (status, again), met, tuple(differ), "\n".join(lines[-20:]))


def table(trials: list[Trial]) -> str:
    """A table in Markdown, a row a kind of fault."""
    rows = ["| fault | runs | equal to the bit | stage it was in |", "|---|---:|---:|---|"]
    for kind in KINDS:
        of = [t for t in trials if t.fault.kind == kind]
        if of:
            places = ", ".join(f"{n} {s}" for s in reversed(STAGES) if (n := sum(t.where.startswith(s) for t in of)))
            rows.append(f"| {kind} | {len(of)} | {sum(t.good for t in of)} | {places or '-'} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--shard", type=int, default=1)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if absent")
    parser.add_argument("--restart", action="store_true", help="by torchrun itself, in the place of the same command")
    args = parser.parse_args(argv)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else restarted processes get the addresses of dead ones
    folder = args.folder or Path(tempfile.mkdtemp(prefix="resume-"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(PRELOADED)  # what is timed is work, not imports
    logging.disable(logging.CRITICAL)  # the agent's own; those of a run are in its files
    seconds, made = 0.0, []
    for name in ("warm", "whole"):  # the first starts the server too
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
        began = time.monotonic()
        if status := launch(folder / name, args.processes, args.shard):
            said = (folder / name / "0.err").read_text(encoding="utf-8")
            raise SystemExit(f"the undisturbed run ended with status {status}\n{said}")
        seconds = time.monotonic() - began
        made.append(contents(folder / name / NAME))
    writes = int((folder / "whole" / "0.writes").read_text(encoding="utf-8"))
    facts = {
        "bench": NAME,
        "processes": args.processes,
        "shard": args.shard,
        "seconds": round(seconds, 1),
        "files": len(made[1]),
    }
    print(json.dumps(facts | {"writes": writes, "twice": made[0] == made[1]}), flush=True)
    chance, trials = random.Random(args.seed), []
    for number in range(args.faults):
        kind = KINDS[number % len(KINDS)]
        at = chance.randint(1, writes) if kind == "cut write" else chance.uniform(0, seconds)
        fault = Fault(kind, 0 if kind == "cut write" else chance.randrange(args.processes), at)
        one = trial(folder / "cut", args.processes, args.shard, made[1], fault, args.restart)
        trials.append(one)
        facts = {"trial": number, "fault": kind, "of": fault.of, "at": round(one.fault.at, 2), "met": one.where}
        print(json.dumps(facts | {"statuses": one.statuses, "differ": one.differ[:4]}), flush=True)
        if not one.good:
            print(one.said, flush=True)
    print(table(trials))
    good = sum(t.good for t in trials)
    print(f"exact resume: {good} of {len(trials)}")
    if args.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    raise SystemExit(good != len(trials))


if __name__ == "__main__":
    main()
