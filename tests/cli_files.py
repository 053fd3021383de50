"""Small data that tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pixelgrow import checkpoint
from pixelgrow.checkpoint import CheckpointConfig
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.generator import Generator
from pixelgrow.models.sizes import core_config, shallow_uvit
from pixelgrow.models.uvit import UViT


def class_folder(root: Path) -> Path:
    folder = root / "images"
    for label in range(3):
        (folder / str(label)).mkdir(parents=True)
        pixels = np.full((32, 32, 3), 80 * label, np.uint8)
        Image.fromarray(pixels).save(folder / str(label) / "a.png")
    return folder


def class_model(folder: Path, *, one_step: bool = False) -> Path:
    """An untrained checkpoint of 16 px and three classes."""
    torch.manual_seed(0)
    net = UViT(shallow_uvit("tiny", 16, core=core_config("tiny", classes=3)))
    torch.nn.init.normal_(net.exit["16"].conv.weight, std=0.1)
    made = Generator(net) if one_step else Denoiser(net)
    text = {"encoder": "labels:3", "max_tokens": 1}
    config = CheckpointConfig(
        network=net.config, diffusion=made.config, text=text, lineage=[{"stage": "core", "images": 12345}]
    )
    checkpoint.save(folder, made, config)
    return folder


def noisy_classes(root: Path, each: int = 8, side: int = 24) -> Path:
    """A folder of three classes, `each` random images of each."""
    rng, folder = np.random.default_rng(0), root / "classes"
    for label in "abc":
        (folder / label).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder
