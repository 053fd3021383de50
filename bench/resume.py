"""Exact resume: a run killed with SIGKILL at random moments and started again must leave the bytes of one left alone.

    python -m bench.resume [--trials 20] [--kills 1] [--seed 0] [--folder FOLDER]

Each trial runs a small recipe (a core at 16 px, grown to 32 px, both on scenes) in a process of its own, kills it at a
moment drawn uniformly from the time an undisturbed run takes, `--kills` times over, and lets it finish. Weights,
configurations, growth reports, sample grids and logged losses are compared byte for byte. One JSON line a trial.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import signal
import tempfile
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from pixelgrow.recipe.read import Recipe, read_recipe

COMPARED = (".safetensors", ".png", "config.json", "growth.json", "log.jsonl", "metrics.json")
SPEEDS = {"time", "images_per_second", "waited", "matmul_share", "memory_mib", "skipped"}  # of the log: not results
PRELOADED = ["pixelgrow.run", "torch._dynamo", "torch.utils.tensorboard", "transformers.models.bert.modeling_bert"]


def recipe() -> Recipe:
    """A core and a growth of a few seconds, saved and logged often."""
    often: dict[str, Any] = {"batch": 8, "save_every": 16, "log_every": 8, "sample_every": 0, "validate_every": 120}
    stages = [
        {"train": {"name": "core", "size": "tiny", "resolution": 16, "stride": 8, "images": 240} | often},
        {"grow": {"name": "grown", "from": "core", "to": 32, "images": 160} | often},
    ]
    data = {"source": "scenes", "n": 10_000, "captions": 64}
    held = {"source": "scenes", "split": "heldout", "n": 16, "captions": 16}
    return read_recipe({"name": "resume", "data": data, "heldout": held, "stages": stages}, "bench/resume.py")


def work(root: str) -> None:
    """A process's work: run the recipe in `root`."""
    from pixelgrow.run import run

    run(recipe(), Path(root))


def contents(folder: Path) -> dict[str, bytes]:
    """What must be the same, by path; of a log, the numbers that are results."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or not name.endswith(COMPARED) or "state/" in name or path.name.startswith("."):
            continue
        found[name] = path.read_bytes()
        if path.name == "log.jsonl":
            records = [json.loads(line) for line in found[name].splitlines()]
            found[name] = json.dumps([{k: v for k, v in r.items() if k not in SPEEDS} for r in records]).encode()
    return found


def where(folder: Path) -> str:
    """How far a killed run's files say that it was."""
    for stage in ("grown", "core"):
        saved = sorted(p.name for p in (folder / stage / "state").glob("[0-9]*"))
        if saved:
            return f"{stage}, saved at {int(saved[-1])}"
        if (folder / stage / "checkpoint").exists():
            return f"after {stage}"
    return "before the first state"


def start(context: ForkServerContext, root: Path) -> Any:
    process = context.Process(target=work, args=(str(root),))
    process.start()
    return process


def trial(context: ForkServerContext, root: Path, expected: dict[str, bytes], moments: list[float]) -> dict[str, Any]:
    """Kill a run after each of `moments` (seconds from its start), finish it, compare.

    A run that is through before its first moment is begun again with half the time.
    """
    killed: list[str] = []
    while not killed:
        shutil.rmtree(root, ignore_errors=True)
        for moment in moments:
            process = start(context, root)
            process.join(moment)
            if process.is_alive():
                process.kill()
            process.join()
            if process.exitcode == -signal.SIGKILL:
                killed.append(where(root / "resume"))
        moments = [moment / 2 for moment in moments]
    process = start(context, root)
    process.join()
    found = contents(root / "resume")
    differ = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    return {"killed": killed, "exit": process.exitcode, "files": len(found), "differ": differ}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--kills", type=int, default=1, help="in each trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if absent")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="resume-"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # what is timed is work, not imports
    work_time = 0.0
    for name in ("warm", "whole"):  # the first starts the server too
        shutil.rmtree(folder / name, ignore_errors=True)
        began = time.monotonic()
        process = start(context, folder / name)
        process.join()
        work_time = time.monotonic() - began
        if process.exitcode:
            raise SystemExit(f"the undisturbed run ended with status {process.exitcode}")
    expected = contents(folder / "whole" / "resume")
    twice = expected == contents(folder / "warm" / "resume")
    print(json.dumps({"bench": "resume", "seconds": round(work_time, 1), "files": len(expected), "twice": twice}))
    chance = random.Random(args.seed)
    good = 0
    for number in range(args.trials):
        moments = [chance.uniform(0, work_time) for _ in range(args.kills)]
        result = trial(context, folder / "cut", expected, moments)
        good += not result["differ"] and result["exit"] == 0
        print(json.dumps({"bench": "resume", "trial": number} | result), flush=True)
    print(f"exact resume: {good} of {args.trials}")
    if args.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    raise SystemExit(good != args.trials)


if __name__ == "__main__":
    main()
