"""Standard streams that are closed, full or read by nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COMMAND = f"{sys.executable} -m pixelgrow"


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A line of bash with `pixelgrow` in it, and the status of that at the end of stdout."""
    line = line.replace("pixelgrow", COMMAND, 1) + "; echo status ${PIPESTATUS[0]}"
    return subprocess.run(["bash", "-c", line], cwd=cwd, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("words", ["--help", "info tiny"])
def test_output_that_cannot_be_written_is_one_line(words: str, tmp_path: Path) -> None:
    done = shell(f"pixelgrow {words} > /dev/full", tmp_path)
    assert done.stdout == "status 2\n"
    assert done.stderr == "pixelgrow: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("pixelgrow info tiny >&-", 0),
        ("pixelgrow info tiny >&- 2>&-", 0),
        ("pixelgrow info nowhere 2>&-", 2),
        ("pixelgrow info nowhere 2> /dev/full", 2),
        ("pixelgrow info nowhere > /dev/full 2>&1", 2),
    ],
)
def test_streams_that_nobody_reads(line: str, status: int, tmp_path: Path) -> None:
    done = shell(line, tmp_path)
    assert (done.stdout, done.stderr) == (f"status {status}\n", "")


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library in C writes to standard error would end in that file."""
    code = (
        "import os; from pixelgrow.cli.streams import secure_streams; secure_streams()\n"
        "file = open('mine', 'w'); os.write(1, b'out'); os.write(2, b'error'); file.write(str(file.fileno()))"
    )
    subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" <&- >&- 2>&-'], cwd=tmp_path, check=True)
    assert int((tmp_path / "mine").read_text()) > 2


def test_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    done = shell("(sleep 0.5; pixelgrow plan --size tiny --rate 1e9; echo $? >&2) | true", tmp_path)
    assert done.stderr == "141\n"


@pytest.mark.parametrize("where", [">&- 2>&-", "2> /dev/full", "2>&1 | true"])
def test_a_training_needs_no_listener(where: str, tmp_path: Path) -> None:
    """Nothing but the run's own files is written, and all of them are whole."""
    for label in range(2):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for i in range(4):
            pixels = np.full((16, 16, 3), 80 * label + i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / str(label) / f"{i}.png")
    (tmp_path / "recipe.yaml").write_text("""
name: r
text: {classes: 2}
data: {source: images}
stages:
  - train: {name: core, size: tiny, resolution: 16, images: 16, batch: 8, workers: 1, snapshot_every: 0}
""")
    shell(f"pixelgrow run recipe.yaml {where}", tmp_path)
    record = json.loads((tmp_path / "runs/r/core/stage.json").read_text(encoding="utf-8"))
    assert record["done"]
    lines = [json.loads(line) for line in (tmp_path / "runs/r/core/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[-1]["images"] == 16
    assert (tmp_path / "runs/r/report.html").exists()


def test_a_hangup_is_said_and_a_nohup_respected(tmp_path: Path) -> None:
    wait = "import os, signal, sys; from pixelgrow.cli import main; import pixelgrow.recipe.read as read"
    code = (
        f"{wait}\nread.load_recipe = lambda *_: os.kill(os.getpid(), signal.SIGHUP) or sys.exit(5)\n"
        "sys.argv = ['pixelgrow', 'run', 'x']\nmain.main()"
    )
    default = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # nohup may have started us
    heeded = subprocess.run([sys.executable, "-c", default + code], capture_output=True, text=True, check=False)
    assert heeded.stderr == "pixelgrow: stopped by SIGHUP: run the same command again to go on\n"
    assert heeded.returncode == 129
    ignored = subprocess.run(["nohup", sys.executable, "-c", code], capture_output=True, env=os.environ, check=False)
    assert ignored.returncode == 5
