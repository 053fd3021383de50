"""Inputs of an edit: images, masks and prompts as tensors that fit the model; UserError for those that do not."""

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

ImageLike = Image.Image | np.ndarray


def several(images: Any) -> list[ImageLike]:
    """One image or a sequence of images as a list; anything else becomes a list of one, which `_array` refuses."""
    alone = isinstance(images, str) or not isinstance(images, Sequence)
    return [images] if alone else list(images)


def stack(model: Model, images: ImageLike | Sequence[ImageLike]) -> Tensor:
    """Images of one size -> (B, 3, H, W) float in [-1, 1], on the model's device."""
    check_space(model)
    arrays = [_array(image) for image in several(images)]
    sizes = {a.shape for a in arrays}
    if len(sizes) != 1:
        got = ", ".join(f"{h}x{w}" for h, w, _ in sorted(sizes)) or "none"
        raise UserError(f"images of sizes {got}: expected one or more of one size; edit each size in a call of its own")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(model.device).float() / 127.5 - 1


def check_space(model: Model) -> None:
    """UserError for a model of latents."""
    if model.config.latent:
        raise UserError(
            f"this model generates latents of {model.config.latent['autoencoder']}, and edits need a model of pixels: "
            "name another"
        )


def _array(image: ImageLike) -> np.ndarray:
    array = _numbers(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise UserError(
            f"an image of shape {array.shape} and type {array.dtype}: expected a PIL image, or uint8 (h, w, 3)"
        )
    return array


def _numbers(image: ImageLike) -> np.ndarray:
    """An image's array; a PIL image is rotated as its EXIF block says."""
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(upright(image)))
    if not isinstance(image, np.ndarray):
        raise UserError(
            f"an image given as {type(image).__name__}: expected a PIL image, or uint8 (h, w, 3); open a file with "
            "PIL.Image.open"
        )
    return image


def pixels_of(model: Model, images: ImageLike | Sequence[ImageLike]) -> Tensor:
    """`stack`, for images whose shorter side is the model's. Raises UserError for other sizes."""
    x = stack(model, images)
    side, stride = model.resolution, model.denoiser.net.config.stride
    if min(size_of(x)) != side or max(size_of(x)) % stride:
        near = max(side, round(side * max(size_of(x)) / min(size_of(x)) / stride) * stride)
        fits = (side, near) if x.shape[-1] > x.shape[-2] else (near, side)
        raise UserError(
            f"an image of {words_of(x)} does not fit: this model edits images whose shorter side is {side} and whose "
            f"longer side is a multiple of {stride}, such as {fits[0]}x{fits[1]}; resize it, or crop it (--fit)"
        )
    return x


def masks_of(masks: ImageLike | Sequence[ImageLike], x: Tensor) -> Tensor:
    """Masks of images x (B, 3, H, W), one for all or one for each -> (B, 1, H, W) bool, True where to fill."""
    found = []
    for mask in several(masks):
        array = _numbers(mask)
        if array.ndim not in (2, 3):
            raise UserError(f"a mask of shape {array.shape}: expected (h, w), or (h, w, channels)")
        fill = array.astype(bool) if array.ndim == 2 else array.any(2)
        if fill.shape != size_of(x):
            raise UserError(
                f"the mask is {fill.shape[0]}x{fill.shape[1]} (height x width), its image {words_of(x)}: expected one "
                "size; save the mask at the size of the image"
            )
        if fill.all() or not fill.any():
            what = "all of the image" if fill.all() else "nothing"
            raise UserError(
                f"the mask covers {what}: expected black where the image is known, and white where it is to be filled"
            )
        found.append(fill)
    if len(found) not in (1, len(x)):
        raise UserError(f"{len(found)} masks for {len(x)} images: expected one for all, or one for each")
    return torch.from_numpy(np.stack(found))[:, None].expand(len(x), -1, -1, -1).to(x.device)


def factor_of(model: Model, size: tuple[int, int]) -> int:
    """The factor that enlarges an image of `size` (h, w) to the model's. Raises UserError if there is none."""
    side, stride = model.resolution, model.denoiser.net.config.stride
    k = side // min(size)
    if k < 2 or k * min(size) != side or k & (k - 1) or k * max(size) % stride:
        fits = ", ".join(str(side >> i) for i in range(1, 5) if side % (1 << i) == 0)
        raise UserError(
            f"an image of {size[0]}x{size[1]} (height x width) cannot be enlarged to {side} px: expected a shorter "
            f"side of {fits} pixels, and a longer side that, enlarged as much, is a multiple of {stride}"
        )
    return k


def conditions_of(model: Model, prompts: str | Sequence[str], count: int) -> Cond:
    """The conditions of `count` images."""
    return model.conditions(each_of(prompts, count))


def each_of(prompts: str | Sequence[str], count: int) -> list[str]:
    """A prompt for each of `count` images."""
    texts = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if len(texts) != count:
        raise UserError(f"{len(texts)} prompts for {count} images: expected one for all, or one for each")
    return texts


def size_of(x: Tensor) -> tuple[int, int]:
    """(h, w) of images (B, C, h, w)."""
    return x.shape[-2], x.shape[-1]


def words_of(x: Tensor) -> str:
    """The size of images (B, C, h, w), for a message."""
    return f"{x.shape[-2]}x{x.shape[-1]} (height x width)"


def to_pil(x: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) as PIL images."""
    return [Image.fromarray(p) for p in to_uint8(x)]
