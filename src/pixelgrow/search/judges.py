"""Judges: how well images show their prompt, as a number for each image; the higher the better."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from pixelgrow.data.loader import to_tensor
from pixelgrow.data.scenes.checker import check
from pixelgrow.data.scenes.parsing import read
from pixelgrow.data.scenes.questions import questions
from pixelgrow.errors import UserError
from pixelgrow.external.vision import load_clip

Judge = Callable[[Sequence[Image.Image], str], Sequence[float]]
"""`(images, prompt) -> scores`, one for each image."""


def _looks(image: Image.Image) -> list[Image.Image]:
    """A preview as it is, and twice as large with softer and with sharper edges.

    Images at full size have more pixels than their previews and edges of their own, which the preview does not show.
    """
    twice = (2 * image.width, 2 * image.height)
    soft = image.resize(twice, Image.Resampling.BILINEAR).filter(ImageFilter.GaussianBlur(0.8))
    sharp = image.resize(twice, Image.Resampling.BICUBIC).filter(ImageFilter.UnsharpMask(1, percent=100, threshold=0))
    return [image, soft, sharp]


def checker(images: Sequence[Image.Image], prompt: str) -> list[float]:
    """The share of the prompt's questions that the scenes' checker answers as the prompt claims, of each image.

    Each share is the mean over three looks: the image, and twice as large, softer and sharper. So among previews that
    are right as they are, one wins that other edges do not turn wrong. Raises UserError for a prompt that is no caption
    of the built-in scenes.
    """
    spec = read(prompt)
    if spec is None:
        raise UserError(
            f"judge checker: cannot read the prompt {prompt!r}, expected a caption of the built-in scenes, such as "
            "'a red circle above two blue stars on a white background'; name a CLIP or a function for others"
        )
    asked = questions(spec)
    return [float(np.mean([check(np.asarray(look), asked) for look in _looks(image)])) for image in images]


def clip_similarity(name: str, device: torch.device | str = "cpu") -> Judge:
    """Cosine of an image's and the prompt's embedding, by a CLIP of transformers. Raises UserError if it is none."""
    clip = load_clip(name, device)

    @torch.no_grad()
    def judge(images: Sequence[Image.Image], prompt: str) -> list[float]:
        pixels = to_tensor(np.stack([np.asarray(image) for image in images])).to(device)
        text: Tensor = torch.nn.functional.normalize(clip.texts([prompt]), dim=-1)
        seen: Tensor = torch.nn.functional.normalize(clip.images(pixels), dim=-1)
        return [float(v) for v in (seen @ text.T)[:, 0]]

    return judge


def judge_named(name: str, device: torch.device | str = "cpu") -> Judge:
    """The judge of a name: `checker`, `module:function` for one's own, or a CLIP's folder or name on the hub.

    Raises UserError where there is none.
    """
    if name == "checker":
        return checker
    module, colon, function = name.partition(":")
    if not colon or "/" in name:
        return clip_similarity(name, device)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"judge {name!r}: cannot be imported ({error}); expected MODULE:FUNCTION, which takes (images, prompt) and "
            "returns scores"
        ) from None
    if not callable(found):
        raise UserError(f"judge {name!r}: is no function, expected (images, prompt) -> scores")
    judge: Judge = found
    return judge
