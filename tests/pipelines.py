"""Tiny diffusers pipelines with random weights, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from text_models import save_clip

SIDE = 16


def save_unconditional(folder: Path) -> Path:
    """A `DDPMPipeline` of 16 px."""
    import diffusers

    torch.manual_seed(2)
    unet = diffusers.UNet2DModel(
        sample_size=SIDE, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def save_of_classes(folder: Path) -> Path:
    """A `DiTPipeline` of 16 px from latents of 8 px. Its null class is 1000, whatever the network has."""
    import diffusers

    torch.manual_seed(2)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1, num_attention_heads=2,
        attention_head_dim=4,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    diffusers.DiTPipeline(transformer, _autoencoder(), diffusers.DDIMScheduler()).save_pretrained(folder)
    return folder


def save_of_text(folder: Path) -> Path:
    """A `StableDiffusionPipeline` of 16 px from latents of 8 px."""
    import diffusers
    import transformers

    save_clip(folder / "clip")
    text = transformers.CLIPTextModel.from_pretrained(folder / "clip")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "clip", model_max_length=20)
    torch.manual_seed(2)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    parts: dict[str, Any] = dict(vae=_autoencoder(), text_encoder=text, tokenizer=tokenizer, unet=unet)
    pipeline = diffusers.StableDiffusionPipeline(
        **parts, scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def _autoencoder() -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=SIDE, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
