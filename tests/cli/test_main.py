"""The entry point: what every command has in common."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import pixelgrow
from cli_files import class_folder
from conftest import RunCli
from pixelgrow.cli.main import share_cores


def test_the_package_is_a_command_and_data_takes_a_source_or_a_verb(tmp_path: Path, run_cli: RunCli) -> None:
    command = [sys.executable, "-m", "pixelgrow", "data"]
    asked = [*command, "--decode", "2", "scenes", "--sheet", str(tmp_path / "sheet.png")]
    short = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    long = run_cli("data", "count", "scenes", "--decode", "2", "--sheet", tmp_path / "sheet.png")
    assert "usable image-caption pairs" in short and short.splitlines() == long.out.splitlines()
    (tmp_path / "recaption").mkdir()
    assert "data recaption: SOURCE is missing" in run_cli("data", "recaption", cwd=tmp_path).err
    assert "./recaption: no images in it" in run_cli("data", "./recaption", cwd=tmp_path).err


def test_help_is_quick_and_leaves_torch_alone() -> None:
    code = (
        "import sys, time\nfrom pixelgrow.cli.main import main\nsys.argv = ['pixelgrow', '--help']\n"
        "main()\nprint('torch' in sys.modules, 'pydantic' in sys.modules, time.process_time())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    *helped, last = out.splitlines()
    assert {"demo", "run", "sample", "data", "grow", "info", "plan"} <= {line.split()[0] for line in helped if line}
    loaded_torch, loaded_pydantic, seconds = last.split()
    assert (loaded_torch, loaded_pydantic) == ("False", "False")
    assert float(seconds) < 0.5


def test_the_version_and_short_help(run_cli: RunCli) -> None:
    assert run_cli("--version").out == f"pixelgrow {pixelgrow.__version__}\n"
    for words in ([], ["sample"], ["edit", "inpaint"], ["data"]):
        short, long = run_cli(*words, "-h"), run_cli(*words, "--help")
        assert (short.code, short.out) == (0, long.out) and short.out.startswith("Usage: pixelgrow")


@pytest.mark.parametrize(
    ("where", "words", "advice"),
    [
        ("pixelgrow.model.sample", "sample MODEL 1", "run it again with a smaller --batch"),
        ("pixelgrow.cli.grow.grow", "grow MODEL --to 32 -o out --data images", "grow it by a recipe's grow stage"),
        ("pixelgrow.model.sample", "edit upscale MODEL small.png --prompt 1", "crop the image"),
        ("pixelgrow.plan.recipe.parts_of", "info MODEL", "use a machine with more memory"),
    ],
)
def test_running_out_of_memory_is_one_line(
    model: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str, words: str, advice: str
) -> None:
    def large(*_: object, **__: object) -> None:
        torch.empty(2**50)

    class_folder(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    monkeypatch.setattr("pixelgrow.editing.path.EditPath.solve", large)
    monkeypatch.setattr(where, large)
    result = run_cli(*(str(model) if word == "MODEL" else word for word in words.split()), cwd=tmp_path)
    last = result.err.splitlines()[-1]
    assert (result.code, result.err.count("pixelgrow: ")) == (2, 1)
    assert last.startswith("pixelgrow: out of memory (") and advice in last


def test_idle_threads_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "x")  # so that what follows is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    share_cores()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "5000"


def test_control_c_says_how_to_go_on(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pixelgrow.run.run", interrupted)
    result = run_cli("run", "smoke", cwd=tmp_path)
    assert result.code == 130
    assert result.err == "pixelgrow: stopped by SIGINT: run the same command again to go on\n"
    monkeypatch.setattr("pixelgrow.model.find", interrupted)
    result = run_cli("info", "tiny")  # starts anew
    assert (result.code, result.err) == (130, "pixelgrow: stopped by SIGINT\n")
