"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pixelgrow import checkpoint
from pixelgrow.checkpoint import CheckpointConfig
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.models.sizes import core_config, shallow_uvit
from pixelgrow.models.uvit import UViT


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint of three classes."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    torch.manual_seed(0)
    net = UViT(shallow_uvit("tiny", 16, core=core_config("tiny", classes=3)))
    torch.nn.init.normal_(net.exit["16"].conv.weight, std=0.1)
    denoiser = Denoiser(net)
    text = {"encoder": "labels:3", "max_tokens": 1}
    config = CheckpointConfig(
        network=net.config, diffusion=denoiser.config, text=text, lineage=[{"stage": "core", "images": 12345}]
    )
    checkpoint.save(folder, denoiser, config)
    return folder
