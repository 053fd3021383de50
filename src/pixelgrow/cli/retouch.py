"""The `edit` verbs: picture files in, a picture file out that carries its settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixelgrow.cli.sample import check_grid, check_writable, save_png, show_progress
from pixelgrow.data.images import BadImage, fit, read_header, read_image
from pixelgrow.editing import edits as editing
from pixelgrow.errors import UserError
from pixelgrow.model import Model, find
from pixelgrow.pictures import columns_of, grid
from pixelgrow.writing import reading, writing

PAUSE = 120  # milliseconds of a GIF's frame
STRIP = 8  # frames of one row; more make a grid


@dataclass(frozen=True)
class Request:
    """An edit: `verb` of `editing` with its own `arguments`, the pictures' files among them under `images` and `mask`.

    `fitted`: scale and crop pictures to the model's square, the mask with its picture. `settings` of the model's kind,
    None where its own hold.
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
        raise UserError("--fit: there is no picture to scale and crop; drop it, or give two --image")
    read = [_read(path) for path in request.images]
    masks = [] if request.mask is None else [_mask(request.mask, read[0])]
    model = Model.from_pretrained(request.checkpoint)
    teacher = None if request.teacher is None else Model.from_pretrained(request.teacher, model.device)
    check_writable(out, out.parent, single=True)
    if out.is_dir():
        raise UserError(f"--out {out}: that is a folder; expected the name of a picture to write")
    if request.fitted:
        side = (model.resolution, model.resolution)
        read = [fit(Image.fromarray(picture), side) for picture in read]
        masks = [_fit_mask(mask, model.resolution) for mask in masks]
    if strip and out.suffix.lower() == ".png":
        frames = request.arguments["frames"]
        check_grid(
            out,
            read[0].shape[:2] if read else (model.side, model.side),
            _columns(frames),
            frames,
            "fewer --frames, or a .gif",
        )
    keywords: dict[str, Any] = {k: v for k, v in request.arguments.items() if v is not None} | request.settings
    if teacher is not None:
        keywords["teacher"] = teacher
    keywords["progress"] = show_progress
    match request.verb:
        case "inpaint":
            made = editing.inpaint(model, read, masks, request.prompts, **keywords)
        case "upscale":
            made = editing.upscale(model, read, request.prompts, **keywords)
        case "transfer":
            made = editing.transfer(model, read, *request.prompts, **keywords)
        case _:
            made = editing.interpolate(model, request.prompts, images=read, **keywords)
    facts = {
        "edit": request.verb,
        "checkpoint": str(find(request.checkpoint)),
        "sha256": model.config.sha256,
        "prompts": request.prompts,
        **({"images": [str(path) for path in request.images]} if request.images else {}),
        **({"mask": str(request.mask)} if request.mask else {}),
        **({"teacher": str(find(request.teacher))} if request.teacher else {}),
        **({"fit": True} if request.fitted else {}),
        **{k: v for k, v in (request.arguments | request.settings).items() if v is not None},
    }
    with writing(out):
        _save(made, out, facts)
    return out


def _columns(frames: int) -> int:
    """Columns of an interpolation's PNG."""
    return frames if frames <= STRIP else columns_of(1, frames)


def _save(pictures: list[Image.Image], out: Path, facts: dict[str, Any]) -> None:
    """One picture, a strip or, by its name, a GIF whose comment has the settings."""
    if out.suffix.lower() == ".png":
        save_png(grid(map(np.asarray, pictures), _columns(len(pictures)), len(pictures)), out, facts)
        return
    part = out.with_name(f".{out.name}.part")
    pictures[0].save(
        part, format="GIF", save_all=True, append_images=pictures[1:], duration=PAUSE, loop=0,
        comment=json.dumps(facts).encode(),
    )  # fmt: skip
    part.replace(out)


def _read(path: Path) -> np.ndarray:
    """A picture's file, uint8 (h, w, 3), at its own size."""
    try:
        with reading(path), path.open("rb") as file:
            size = read_header(file).size
            file.seek(0)
            return read_image(file, size)
    except BadImage as error:
        raise UserError(f"{path} cannot be used ({error.reason}): expected a JPEG, PNG or WebP picture") from None


def _mask(path: Path, picture: np.ndarray) -> np.ndarray:
    """A mask's file, bool (h, w), True where it is not black; UserError unless it is as large as its picture."""
    mask: np.ndarray = _read(path).astype(bool).max(2)
    if mask.shape != picture.shape[:2]:
        (h, w), (ph, pw) = mask.shape, picture.shape[:2]
        raise UserError(
            f"--mask {path} is {h}x{w} (height x width), its picture {ph}x{pw}: expected one size; draw the mask over "
            "the picture"
        )
    return mask


def _fit_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """A mask through the same window as its picture: True where any of it falls into a pixel."""
    h, w = mask.shape
    scale = min(h, w) / side
    top, left = (h - side * scale) / 2, (w - side * scale) / 2
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    box = (left, top, left + side * scale, top + side * scale)
    return np.asarray(grey.resize((side, side), Image.Resampling.BOX, box=box)).astype(bool)
