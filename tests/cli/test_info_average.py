"""The verbs `info` and `average`."""

from __future__ import annotations

from pathlib import Path

import torch

from conftest import RunCli
from pixelgrow import checkpoint
from pixelgrow.training.state import write_tensors


def test_info(model: Path, run_cli: RunCli) -> None:
    out = run_cli("info", model).out
    for words in ("16 px; sides are multiples of 4", "tiny: 4 blocks", "labels:3", "stage core, images 12,345"):
        assert words in out


def test_another_average_of_a_stage_becomes_a_checkpoint(model: Path, run_cli: RunCli, tmp_path: Path) -> None:
    stage = tmp_path / "core"
    denoiser, config = checkpoint.load(model)
    checkpoint.save(stage / "checkpoint", denoiser, config)
    name = "net.exit.16.conv.weight"
    last = denoiser.state_dict()[name]
    for images in (1000, 2000):  # weights that stood still: every average of theirs is themselves
        kept = {f"{length}/{name}": (2 * last).half() for length in (0.05, 0.1)}
        write_tensors(stage / "snapshots" / "denoiser" / f"{images:012d}.safetensors", kept)
    result = run_cli("average", stage, "--length", "0.08", "-o", tmp_path / "out")
    assert result.code == 0 and "the average of length 0.08" in result.out
    found, written = checkpoint.load(tmp_path / "out")
    torch.testing.assert_close(found.state_dict()[name], 2 * last, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.net.core.null_token, denoiser.net.core.null_token)
    assert written.lineage[-1] == {"verb": "average", "length": 0.08, "parent": config.sha256}
    assert run_cli("average", stage, "--length", "0.1", "-o", stage / "checkpoint").code == 2
    assert "name another folder" in run_cli("average", stage, "--length", "0.1", "-o", stage / "checkpoint").err
