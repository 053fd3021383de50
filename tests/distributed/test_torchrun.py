"""The command of docs/scale.md, by torchrun itself."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parents[2] / "docs" / "scale.md"
RECIPE = """
name: photos
text: {classes: 2}
data: {source: images}
stages:
  - train: {name: core, size: tiny, resolution: 16, images: 8, batch: 8, sample_every: 0, snapshot_every: 0}
"""


def test_the_documented_command_trains_on_two_processes(tmp_path: Path) -> None:
    for number in range(16):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (16 * number, 0, 0)).save(path)
    (tmp_path / "photos.yaml").write_text(RECIPE)
    words = shlex.split(DOCS.read_text(encoding="utf-8").split("```bash\n")[1].split("```")[0])
    assert words[0] == "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "report: runs/photos/report.html\n"
    assert done.stderr.count("stage 1 of 1, core: done") == 1
    assert (tmp_path / "runs/photos/core/checkpoint/model.safetensors").is_file()
