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

from data.test_sources import an_image, write_tar
from pixelgrow.recipe.read import load_recipe
from pixelgrow.recipe.stages import ModelStage
from servers import serving

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "scale.md"
RECIPE = """
name: photos
text: {classes: 2}
data: {source: images}
stages:
  - train: {name: core, size: tiny, resolution: 16, images: 8, batch: 8, sample_every: 0, snapshot_every: 0}
  - grow: {name: grown, to: 32, core: finetune, images: 8, batch: 8, sample_every: 0, snapshot_every: 0}
"""  # the stages of the built-in `photos`
LAST = {"photos": (2, "grown"), "smoke-vermeer": (3, "tuned"), "huge": (3, "tuned")}  # stages, and the last of them
SMALLER = {  # of the documented words: eight GPUs become one process or two, thousands of images ten
    "-n 2000": "-n 10 --steps 2",
    "torchrun --nproc-per-node 8": "torchrun --nproc-per-node 2",
    "--nproc-per-node 8": "--nproc-per-node 1",
    "--nnodes 8": "--nnodes 2",
    "accumulate=16": "accumulate=2",
    "bench.resume": "bench.resume --faults 1",
    "/shared/runs": "runs",
    "/shared/": "",
    "/data/": "",
}
SAID = {  # by what does not train
    "evaluate tiny": "network evaluations an image: 3;",
    "--gpu h100": "shard 8 x 8",
    "--gpu a100-40": "GPUs like a100 would do",
    "bench.resume": "exact resume: 1 of 1",
    "bench.gpu": '"save_seconds"',
}
QUIET = "compile=false sample_every=0 validate_every=0 snapshot_every=0"
HUGE = {  # of 8B parameters, so that it trains here
    "text": "encoder=minilm max_tokens=16",
    "heldout": "fraction=0.25",
    "stages.core": f"size=tiny resolution=16 stride=4 images=8 batch=8 accumulate=2 {QUIET}",
    "stages.raw": f"to=32 images=8 batch=8 accumulate=2 {QUIET}",
    "stages.tuned": f"images=8 batch=8 accumulate=2 {QUIET}",
}
ASSIGNED = re.compile(r"(?:^|(?<= ))([A-Z_]+)=(\S+) ")  # variables before a program
PROGRAMS = {"torchrun": ["-m", "torch.distributed.run"], "pixelgrow": ["-m", "pixelgrow"], "python": []}
ELSEWHERE = ("pip ", "sbatch ")  # needs the network; in tests/tools/test_slurm.py


def commands() -> list[str]:
    """The commands of the document, a line each: of its blocks, and those in a line of the text, with options."""
    text = DOCS.read_text(encoding="utf-8")
    assert set(re.findall(r"^```(\w*)$", text, re.MULTILINE)) == {"bash", "yaml", ""}
    assert len(re.findall(r"^```\w+$", text, re.MULTILINE)) == len(re.findall(r"^```$", text, re.MULTILINE))
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python|pixelgrow|torchrun) [^`\n]* --[^`\n]+)`", text)
    return [" ".join(line.split()) for line in lines if line.strip() and not line.startswith(("#", *ELSEWHERE))]


def shrunk(command: str, port: int, server: str) -> list[str]:
    """The words of a command, for this interpreter and machine."""
    for documented, smaller in SMALLER.items():
        command = command.replace(documented, smaller)
    command = re.sub(r"(?<=--rdzv-endpoint )\S+", f"127.0.0.1:{port}", command)
    command = command.replace("https://host/cc12m/{00000..01242}.tar", server + "/{00000..00001}.tar")
    program, *words = shlex.split(re.sub(ASSIGNED, "", command))
    if "run huge" in command:
        sets = [f"{part}.{word}" for part, of in HUGE.items() for word in of.split()]
        words += [word for one in (*sets, "parallel.shard=2") for word in ("--set", one)]  # of two processes
    if server in command:
        words += ["--set", "text={encoder: minilm}"]  # shards with captions, in the place of classes
    return [sys.executable, *PROGRAMS[program], *words]


def shards(folder: Path) -> None:
    """Two tar shards of captioned images."""
    for shard in range(2):
        numbers = range(16 * shard, 16 * shard + 16)
        members = [(f"{n:04}.png", an_image(32, 32, n)) for n in numbers]
        write_tar(folder / f"{shard:05}.tar", members + [(f"{n:04}.txt", b"number %d" % n) for n in numbers])


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_works(command: str, tmp_path: Path) -> None:
    for number in range(16):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (16 * number, 0, 0)).save(path)
    (tmp_path / "photos.yaml").write_text(RECIPE)
    for name in ("shards", "aesthetic"):
        shards(tmp_path / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = 2 if "--nnodes" in command else 1
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),  # bench is beside the package
        **dict(re.findall(ASSIGNED, command)),
    }
    with serving(tmp_path / "shards") as files:
        machines = [
            subprocess.Popen(
                shrunk(command, port, files.address),
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
        (said,) = (words for part, words in SAID.items() if part in command)
        assert said in out
        assert "evaluate" not in command or (tmp_path / "evaluation-tiny.json").is_file()


def test_the_document_has_commands_for_one_machine_and_for_several() -> None:
    found = "\n".join(commands())
    trained = [stage.name for stage in load_recipe("photos").stages if isinstance(stage, ModelStage)]
    assert trained == re.findall(r"name: (\w+),", RECIPE)
    parts = ("--nnodes", "evaluate", "run huge", "https://", "bench.resume", "bench.gpu", "a100-40")
    assert all(part in found for part in parts)
