"""Pictures, masks and prompts that an edit is given, as tensors that fit its model; every misfit is one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixelgrow.data.images import to_rgb, upright
from pixelgrow.errors import UserError
from pixelgrow.model import Model
from pixelgrow.models.cond import Cond
from pixelgrow.pictures import to_uint8

Picture = Image.Image | np.ndarray


def several(pictures: Any) -> list[Picture]:
    """Pictures, one or a sequence, as a list; what else a user gives is refused where it is read."""
    alone = isinstance(pictures, str) or not isinstance(pictures, Sequence)
    return [pictures] if alone else list(pictures)


def stack(model: Model, pictures: Picture | Sequence[Picture]) -> Tensor:
    """Pictures of one size -> (B, 3, H, W) float in [-1, 1], on the model's device."""
    check_space(model)
    arrays = [_array(p) for p in several(pictures)]
    sizes = {a.shape for a in arrays}
    if len(sizes) != 1:
        got = ", ".join(f"{h}x{w}" for h, w, _ in sorted(sizes)) or "none"
        raise UserError(f"pictures of sizes {got}: expected one or more of one size; edit others in calls of their own")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(model.device).float() / 127.5 - 1


def check_space(model: Model) -> None:
    """UserError for a model of latents."""
    if model.config.latent:
        raise UserError(
            f"this model draws latents of {model.config.latent['autoencoder']}, and pictures alone are edited: name a "
            "model of pixels"
        )


def _array(picture: Picture) -> np.ndarray:
    array = _numbers(picture)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise UserError(
            f"a picture of shape {array.shape} and type {array.dtype}: expected a PIL image, or uint8 (h, w, 3)"
        )
    return array


def _numbers(picture: Picture) -> np.ndarray:
    """A picture's array; a PIL image is turned as its EXIF block says."""
    if isinstance(picture, Image.Image):
        return np.asarray(to_rgb(upright(picture)))
    if not isinstance(picture, np.ndarray):
        raise UserError(
            f"a picture given as {type(picture).__name__}: expected a PIL image, or uint8 (h, w, 3); open a file with "
            "PIL.Image.open"
        )
    return picture


def pixels_of(model: Model, pictures: Picture | Sequence[Picture]) -> Tensor:
    """Pictures of the model's size, on its device."""
    x = stack(model, pictures)
    side, stride = model.resolution, model.denoiser.net.config.stride
    if min(size_of(x)) != side or max(size_of(x)) % stride:
        near = max(side, round(side * max(size_of(x)) / min(size_of(x)) / stride) * stride)
        fits = (side, near) if x.shape[-1] > x.shape[-2] else (near, side)
        raise UserError(
            f"a picture of {words_of(x)} does not fit: this model edits pictures whose shorter side is {side} and "
            f"whose longer one is a multiple of {stride}, such as {fits[0]}x{fits[1]}; resize it, or have it "
            "cropped (--fit)"
        )
    return x


def masks_of(masks: Picture | Sequence[Picture], x: Tensor) -> Tensor:
    """Masks of pictures x (B, 3, H, W), one for all or one for each -> (B, 1, H, W) bool, True where to fill."""
    found = []
    for mask in several(masks):
        array = _numbers(mask)
        if array.ndim not in (2, 3):
            raise UserError(f"a mask of shape {array.shape}: expected (h, w), or (h, w, channels)")
        fill = array.astype(bool) if array.ndim == 2 else array.any(2)
        if fill.shape != size_of(x):
            raise UserError(
                f"the mask is {fill.shape[0]}x{fill.shape[1]} (height x width), its picture {words_of(x)}: expected "
                "one size; draw the mask over the picture"
            )
        if fill.all() or not fill.any():
            what = "all of the picture" if fill.all() else "nothing"
            raise UserError(
                f"the mask covers {what}: expected black where the picture is known, and white where it is to be filled"
            )
        found.append(fill)
    if len(found) not in (1, len(x)):
        raise UserError(f"{len(found)} masks for {len(x)} pictures: expected one for all, or one for each")
    return torch.from_numpy(np.stack(found))[:, None].expand(len(x), -1, -1, -1).to(x.device)


def factor_of(model: Model, size: tuple[int, int]) -> int:
    """How many times a picture of `size` (h, w) is to be enlarged."""
    side, stride = model.resolution, model.denoiser.net.config.stride
    k = side // min(size)
    if k < 2 or k * min(size) != side or k & (k - 1) or k * max(size) % stride:
        fits = ", ".join(str(side >> i) for i in range(1, 5) if side % (1 << i) == 0)
        raise UserError(
            f"a picture of {size[0]}x{size[1]} (height x width) cannot be enlarged to {side} px: expected a shorter "
            f"side of one of {fits} pixels, and a longer one that, enlarged as much, is a multiple of {stride}"
        )
    return k


def conditions_of(model: Model, prompts: str | Sequence[str], count: int) -> Cond:
    """The conditions of `count` pictures."""
    return model.conditions(each_of(prompts, count))


def each_of(prompts: str | Sequence[str], count: int) -> list[str]:
    """A prompt for each of `count` pictures."""
    texts = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if len(texts) != count:
        raise UserError(f"{len(texts)} prompts for {count} pictures: expected one for all, or one for each")
    return texts


def size_of(x: Tensor) -> tuple[int, int]:
    """(h, w) of images (B, C, h, w)."""
    return x.shape[-2], x.shape[-1]


def words_of(x: Tensor) -> str:
    """That size for a message."""
    return f"{x.shape[-2]}x{x.shape[-1]} (height x width)"


def pictures_of(x: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) as PIL images."""
    return [Image.fromarray(p) for p in to_uint8(x)]
