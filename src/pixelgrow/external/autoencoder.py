"""The latent variant: an autoencoder in front of the data and behind the samples.

PaGoDA (arXiv 2405.14822) claims that its stages carry over to latents, without an experiment; the method is ours.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelgrow.checkpoint import file_hash
from pixelgrow.errors import UserError
from pixelgrow.external import hub
from pixelgrow.models.config import Space
from pixelgrow.writing import reading

STD = 0.5  # standard deviation of latents, as of pixels in [-1, 1]: `sigma_data` and recipes' noise levels suit it
BATCH = 4  # images at a time; the result depends on it by rounding alone


class Autoencoder:
    """A frozen diffusers `AutoencoderKL`: images (B, 3, H, W) in [-1, 1] <-> latents (B, C, H/factor, W/factor).

    Latents are the mean that the encoder gives, without noise, so they can be stored. They are shifted and scaled to a
    deviation of about 1 by the autoencoder's configuration, and from there to `STD`.

    name: a folder with config.json and safetensors, a folder with such a folder `vae`, or a repository of the hub that
    is either. Weights are read when first needed. Raises UserError if no AutoencoderKL is found.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        self.name, self.device = name, torch.device(device)
        self.folder = _find(name)
        try:
            self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            kind = self.config["_class_name"]
            if kind == "AutoencoderKL":
                self._factor = 2 ** (len(self.config["block_out_channels"]) - 1)
                self._channels = int(self.config["latent_channels"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"autoencoder {name}: its config.json cannot be read ({type(error).__name__}: {error}); expected that "
                "of a diffusers AutoencoderKL; copy it again"
            ) from error
        if kind != "AutoencoderKL":
            raise UserError(f"autoencoder {name}: got a {kind}, expected a diffusers AutoencoderKL; name another")
        for file in self.folder.glob("*.safetensors"):
            hub.check_weights(f"autoencoder {name}", file)

    @property
    def factor(self) -> int:
        """Side of an image over that of its latents."""
        return self._factor

    @property
    def space(self) -> Space:
        """The space of its latents."""
        return Space(channels=self._channels, bounded=False)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of configuration and weights."""
        files = [self.folder / "config.json", *sorted(self.folder.glob("*.safetensors"))]
        return hashlib.sha256("".join(file_hash(f) for f in files).encode()).hexdigest()[:32]

    @cached_property
    def _model(self) -> Any:
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise UserError(f"autoencoder {self.name} needs diffusers: pip install 'pixelgrow[diffusers]'") from error
        try:
            model = AutoencoderKL.from_pretrained(
                self.folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"autoencoder {self.name} cannot be loaded ({reason}); copy it again") from error
        return model.to(self.device).eval().requires_grad_(False)

    def _scale(self) -> tuple[float, float]:
        return float(self.config.get("shift_factor") or 0.0), STD * float(self.config.get("scaling_factor") or 1.0)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], with sides that `factor` divides -> latents (B, C, h, w), on their device."""
        shift, scale = self._scale()
        means = [self._model.encode(some.to(self.device)).latent_dist.mode() for some in images.split(BATCH)]
        return ((torch.cat(means) - shift) * scale).to(images)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1], on their device."""
        shift, scale = self._scale()
        images = [self._model.decode(some.to(self.device) / scale + shift).sample for some in latents.split(BATCH)]
        return torch.cat(images).clamp(-1, 1).to(latents)

    def __getstate__(self) -> dict[str, Any]:
        """Without the weights; a process that needs them reads them from disk."""
        return {k: v for k, v in self.__dict__.items() if k != "_model"}


def _find(name: str) -> Path:
    with reading(name):
        folder = Path(name).expanduser()
        if not folder.exists() and hub.is_repository(name):
            files = ["config.json", "diffusion_pytorch_model.safetensors"]
            folder = hub.fetch(name, [*files, *(f"vae/{f}" for f in files)], "autoencoder")
        for candidate in (folder, folder / "vae"):
            if (candidate / "config.json").is_file() and any(candidate.glob("*.safetensors")):
                return candidate
    raise UserError(
        f"autoencoder {name} is not there: expected a folder of a diffusers AutoencoderKL (config.json, "
        "*.safetensors); check the name"
    )
