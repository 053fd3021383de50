"""Every command of docs/scale.md, read from it and shrunk, by torchrun itself; one machine stands for several."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

DOCS = Path(__file__).parents[2] / "docs" / "scale.md"
RECIPE = """
name: photos
text: {classes: 2}
data: {source: images}
stages:
  - train: {name: core, size: tiny, resolution: 16, images: 8, batch: 8, sample_every: 0, snapshot_every: 0}
"""
LAST = {"photos": (1, "core"), "smoke-vermeer": (3, "tuned")}  # the last stages of the documented recipes
SMALLER = {  # of the documented words: eight GPUs become one process, thousands of images ten
    "-n 2000": "-n 10 --steps 2",
    "--nproc-per-node 8": "--nproc-per-node 1",
    "accumulate=16": "accumulate=2",
}
ASSIGNED = re.compile(r"(?:^|(?<= ))([A-Z_]+)=(\S+) ")  # variables before a program
PROGRAMS = {"torchrun": ["-m", "torch.distributed.run"], "pixelgrow": ["-m", "pixelgrow"], "python": []}


def commands() -> list[str]:
    """The commands of the document, a line each."""
    blocks = re.findall(r"```bash\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]


def shrunk(command: str, port: int) -> list[str]:
    """The words of a command, for this interpreter and machine."""
    for documented, smaller in SMALLER.items():
        command = command.replace(documented, smaller)
    command = re.sub(r"(?<=--rdzv-endpoint )\S+", f"127.0.0.1:{port}", command)
    program, *words = shlex.split(re.sub(ASSIGNED, "", command))
    return [sys.executable, *PROGRAMS[program], *words]


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_works(command: str, tmp_path: Path) -> None:
    for number in range(16):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (16 * number, 0, 0)).save(path)
    (tmp_path / "photos.yaml").write_text(RECIPE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = int((re.findall(r"--nnodes (\d+)", command) or ["1"])[0])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **dict(re.findall(ASSIGNED, command))}
    machines = [
        subprocess.Popen(
            shrunk(command, port),
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(nodes)
    ]  # fmt: skip
    ended = [machine.communicate(timeout=280) for machine in machines]
    assert [machine.returncode for machine in machines] == [0] * nodes, ended
    out, err = ("".join(texts) for texts in zip(*ended, strict=True))
    if " run " in command:
        (name,) = re.findall(r" run (\S+?)(?:\.yaml)?(?: |$)", command)
        number, last = LAST[name]
        assert out == f"report: runs/{name}/report.html\n"
        assert err.count(f"stage {number} of {number}, {last}: done") == 1
        assert (tmp_path / f"runs/{name}/{last}/checkpoint/model.safetensors").is_file()
    else:
        assert len(out.splitlines()) > 3  # a table, once
        assert "evaluate" not in command or (tmp_path / "evaluation-tiny.json").is_file()


def test_the_document_has_commands_for_one_machine_and_for_several() -> None:
    assert any("--nnodes" in command for command in commands()) and any("evaluate" in c for c in commands())
