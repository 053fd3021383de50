"""The `edit` verbs: from image files to an image file with its settings as metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixelgrow.cli.sample import check_grid, check_writable, origin_of, replacing, save_png, show_progress, typed
from pixelgrow.data.images import BadImage, fit, read_header, read_image
from pixelgrow.editing import edits as editing
from pixelgrow.errors import UserError
from pixelgrow.model import Model
from pixelgrow.pictures import columns_of, grid
from pixelgrow.writing import reading

PAUSE = 120  # milliseconds of a GIF's frame
STRIP = 8  # frames of one row; more make a grid


@dataclass(frozen=True)
class Request:
    """An edit: a function of `editing.edits` (`verb`), its files (`images`, `mask`) and other `arguments`.

    `fitted`: scale and crop images, and the mask, to the model's square. `settings`: None for the model's own.
    """

    verb: str
    checkpoint: str
    prompts: list[str]
    out: Path
    images: list[Path] = field(default_factory=list)
    mask: Path | None = None
    teacher: str | None = None
    fitted: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def retouch(request: Request) -> Path:
    """Carry out a request; returns the file written. Raises UserError."""
    out, strip = request.out, request.verb == "interpolate"
    if out.suffix.lower() != ".png" and not (strip and out.suffix.lower() == ".gif"):
        raise UserError(f"--out {out}: expected a name that ends in .png{' (a strip) or .gif' if strip else ''}")
    if request.fitted and not request.images:
        raise UserError("--fit: there is no image to scale and crop; drop it, or give two --image")
    prompts, read = [typed(prompt) for prompt in request.prompts], [_read(path) for path in request.images]
    masks = [] if request.mask is None else [_mask(request.mask, read[0])]
    model = Model.from_pretrained(request.checkpoint)
    teacher = None if request.teacher is None else Model.from_pretrained(request.teacher, model.device)
    check_writable(out, out.parent, single=True)
    if out.is_dir():
        raise UserError(f"--out {out}: that is a folder; expected the name of a file to write")
    if request.fitted:
        side = (model.resolution, model.resolution)
        read = [fit(Image.fromarray(image), side) for image in read]
        masks = [_fit_mask(mask, model.resolution) for mask in masks]
    if strip and out.suffix.lower() == ".png":
        frames = request.arguments["frames"]
        size = read[0].shape[:2] if read else (model.side, model.side)
        check_grid(out, size, _columns(frames), frames, "ask for fewer --frames, or name a .gif")
    keywords: dict[str, Any] = {k: v for k, v in request.arguments.items() if v is not None} | request.settings
    if teacher is not None:
        keywords["teacher"] = teacher
    keywords["progress"] = show_progress
    match request.verb:
        case "inpaint":
            made = editing.inpaint(model, read, masks, prompts, **keywords)
        case "upscale":
            made = editing.upscale(model, read, prompts, **keywords)
        case "transfer":
            made = editing.transfer(model, read, *prompts, **keywords)
        case _:
            made = editing.interpolate(model, prompts, images=read, **keywords)
    facts = {
        "edit": request.verb,
        **origin_of(model),
        "prompts": prompts,
        **({"images": [str(path) for path in request.images]} if request.images else {}),
        **({"mask": str(request.mask)} if request.mask else {}),
        **({"teacher": str(teacher.origin)} if teacher else {}),
        **({"fit": True} if request.fitted else {}),
        **{k: v for k, v in (request.arguments | request.settings).items() if v is not None},
    }
    _save(made, out, facts)
    return out


def _columns(frames: int) -> int:
    """Columns of an interpolation's PNG."""
    return frames if frames <= STRIP else columns_of(1, frames)


def _save(images: list[Image.Image], out: Path, facts: dict[str, Any]) -> None:
    """Write one image, all in one PNG, or a GIF with the settings as its comment. Raises CannotWrite."""
    if out.suffix.lower() == ".png":
        save_png(grid(map(np.asarray, images), _columns(len(images)), len(images)), out, facts)
        return
    with replacing(out) as part:
        images[0].save(
            part, format="GIF", save_all=True, append_images=images[1:], duration=PAUSE, loop=0,
            comment=json.dumps(facts).encode(),
        )  # fmt: skip


def _read(path: Path) -> np.ndarray:
    """An image file, uint8 (h, w, 3), at its own size."""
    try:
        with reading(path), path.open("rb") as file:
            size = read_header(file).size
            file.seek(0)
            return read_image(file, size)
    except BadImage as error:
        raise UserError(f"{path} cannot be used ({error.reason}): expected a JPEG, PNG or WebP image") from None


def _mask(path: Path, image: np.ndarray) -> np.ndarray:
    """A mask file, bool (h, w), True where it is not black; UserError unless it has its image's size."""
    mask: np.ndarray = _read(path).astype(bool).max(2)
    if mask.shape != image.shape[:2]:
        (h, w), (ih, iw) = mask.shape, image.shape[:2]
        raise UserError(
            f"--mask {path} is {h}x{w} (height x width), its image {ih}x{iw}: expected the same size; make the mask "
            "from the image"
        )
    return mask


def _fit_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """A mask cropped and scaled as its image is: True where any of it falls into a pixel."""
    h, w = mask.shape
    scale = min(h, w) / side
    top, left = (h - side * scale) / 2, (w - side * scale) / 2
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    box = (left, top, left + side * scale, top + side * scale)
    return np.asarray(grey.resize((side, side), Image.Resampling.BOX, box=box)).astype(bool)
