"""The `sample` verb: from prompts to PNG files with their settings as metadata."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from pixelgrow import __version__
from pixelgrow.checkpoint import check_objective
from pixelgrow.diffusion.guidance import Network, exact_factors
from pixelgrow.errors import UserError
from pixelgrow.model import Model
from pixelgrow.pictures import columns_of, grid, grid_size
from pixelgrow.search import best_of
from pixelgrow.writing import writing

MAX_IMAGES = 100_000  # of a call
MAX_GRID = 150_000_000  # pixels; image libraries refuse to open much larger files
PREVIEWED = 64  # default -n of previews
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What to sample and where to.

    `file`: more prompts. `n`: images of each prompt; None: 1, or PREVIEWED with `preview` and `pick`. `pick`: numbers
    of previews, with commas. `best_of`: number of previews of each prompt, of which the `judge` chooses `n`. `grid`:
    one file, or one an image; None: a grid if `out` ends in .png. `settings`: None for the checkpoint's own.
    """

    checkpoint: str
    prompts: list[str]
    out: Path
    file: Path | None = None
    n: int | None = None
    preview: bool = False
    pick: str | None = None
    best_of: int | None = None
    judge: str | None = None
    seed: int = 0
    size: str | None = None
    grid: bool | None = None
    guide: str | None = None
    batch: int = 64
    settings: dict[str, Any] = field(default_factory=dict)


def sample_images(request: Request) -> list[Path]:
    """Sample a request's images and write them, single files as they are made; returns the files. Raises UserError."""
    prompts = [typed(prompt) for prompt in request.prompts] + _read(request.file)
    _check_choice(request)
    n = request.n or (PREVIEWED if request.preview or request.pick else 1)
    if len(prompts) * max(n, request.best_of or 0) > MAX_IMAGES:
        raise UserError(
            f"{len(prompts)} prompts with -n {n}: expected {MAX_IMAGES} images at most; sample them in several calls, "
            "each with another --seed"
        )
    if not prompts:
        raise UserError("no prompt was given: write one after the checkpoint, or name a file with --prompts")
    picked = None if request.pick is None else picked_numbers(request.pick, len(prompts) * n)
    size = None if request.size is None else parse_size(request.size)
    single, folder = _place(request)
    model = Model.from_pretrained(request.checkpoint)
    guide: Model | Network | None = None if request.guide is None else _guide(request.guide, model)
    size = size or (model.side, model.side)
    each, index = [p for p in prompts for _ in range(n)], list(range(len(prompts) * n))
    if picked is not None:
        each, index = [each[i] for i in picked], picked
    k = math.prod(exact_factors(model.network)) if request.preview else 1
    columns = columns_of(1, len(picked)) if picked else columns_of(len(prompts), n)
    if not single:
        instead = "name a folder, for single files, or sample fewer"
        check_grid(request.out, (size[0] // k, size[1] // k), columns, len(each), instead)
    check_writable(request.out, folder, single)  # before images are sampled
    given: dict[str, Any] = request.settings | {
        "seed": request.seed, "size": size, "guide": guide, "batch": request.batch,
    }  # fmt: skip
    if request.best_of is not None:
        sys.path.append(str(Path.cwd()))  # a judge MODULE:FUNCTION may lie here, as with python -m
        winners = best_of(model, prompts, judge=str(request.judge), of=request.best_of, keep=n, **given)
        index = [i for winner in winners for i in winner.index]
        for winner in winners:
            scores = ", ".join(f"{i} ({score:.3g})" for i, score in zip(winner.index, winner.scores, strict=True))
            logger.info("%s: best of %d by %s: %s", winner.prompt, request.best_of, request.judge, scores)
    images = model.stream(each, index=index, preview=request.preview, progress=show_progress, **given)
    facts = {
        **origin_of(model),
        "seed": request.seed,
        "size": list(size),
        **({"guide": request.guide} if request.guide else {}),
        **({"preview": True} if request.preview else {}),
        **({"best_of": request.best_of, "judge": request.judge} if request.best_of else {}),
        **model.settings(**request.settings),
    }
    if not single:
        sheet = grid(map(np.asarray, images), columns, len(each), numbered=request.preview)
        save_png(sheet, request.out, facts | {"prompts": each, "index": index})
        return [request.out]
    stem = "" if folder == request.out else f"{request.out.stem}-"
    paths = []
    for i, image, prompt in zip(index, images, each, strict=True):
        path = folder / f"{stem}{i:04d}-{_slug(prompt)}.png"
        save_png(image, path, facts | {"prompt": prompt, "index": i})
        paths.append(path)
    return paths


def _place(request: Request) -> tuple[bool, Path]:
    """Whether each image gets its own file, and the files' folder. Raises UserError for an `out` that does not fit."""
    suffix = request.out.suffix.lower()
    png = suffix == ".png"
    if not png and suffix in Image.registered_extensions():
        raise UserError(
            f"--out {request.out}: images are written as PNG; expected a name that ends in .png, or a folder"
        )
    single = request.grid is False or (request.grid is None and not png)
    if not single and not png:
        raise UserError(f"--out {request.out}: a grid is one PNG; expected a name that ends in .png, or --single")
    return single, request.out.parent if png else request.out


def _check_choice(request: Request) -> None:
    """UserError for ways of choosing that do not go together."""
    ways = {"--preview": request.preview, "--pick": request.pick is not None, "--best-of": request.best_of is not None}
    chosen = [name for name, there in ways.items() if there]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)}: expected one of them; preview first, then pick")
    if (request.judge is None) != (request.best_of is None):
        raise UserError(
            "--best-of N and --judge NAME go together: got one of them; judges are checker, a CLIP, or MODULE:FUNCTION"
        )


def picked_numbers(text: str, count: int) -> list[int]:
    """`3,17` as numbers of `count` previews; UserError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not re.fullmatch(r"\d{1,9}", part) or int(part) >= count]
    if wrong:
        raise UserError(
            f"--pick {text}: got {wrong[0]!r}, expected numbers of the preview, 0 to {count - 1}, with commas between; "
            "give the same prompts, -n and --seed as there"
        )
    return [int(part) for part in parts]


def typed(text: str) -> str:
    """A prompt of the command line as the UTF-8 that was typed, in any locale; UserError if it is not text."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        if text.isprintable():  # in the locale's own encoding
            return text
        raise UserError(f"the prompt {text!a} is not UTF-8: type it in a UTF-8 terminal, or use --prompts") from error


def check_grid(out: Path, size: tuple[int, int], columns: int, count: int, instead: str) -> None:
    """UserError if a grid of `count` images of `size` (h, w) has more than MAX_GRID pixels; `instead`: what to do."""
    h, w = grid_size(size, columns, count)
    if count > 1 and h * w > MAX_GRID:
        raise UserError(
            f"--out {out}: {count} images of {size[0]}x{size[1]} pixels make a grid of {h}x{w}, expected at most "
            f"{MAX_GRID // 10**6} million pixels: {instead}"
        )


def check_writable(out: Path, folder: Path, single: bool = False) -> None:
    """Make `folder` and check that files can be written there; UserError if not, or if a grid's `out` is a folder."""
    with writing(out):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        is_folder = out.is_dir()
    if is_folder and not single:
        raise UserError(f"--out {out}: that is a folder; expected the name of a PNG to write, or --single")


def _guide(name: str, model: Model) -> Model | Network:
    """The guide of a name; `base` is the model before its last `preserve` growth."""
    if name == "base":
        return model.denoiser.base
    guide = Model.from_pretrained(name)
    check_objective(guide.origin, guide.config, "denoise")
    return guide


def origin_of(model: Model) -> dict[str, Any]:
    """Where a model was loaded from, for the metadata of images; of an unfinished stage, after how many images."""
    last = model.config.lineage[-1] if model.config.lineage else {}
    stopped = {k: v for k, v in last.items() if k == "stopped_after"}
    return {"checkpoint": str(model.origin), "sha256": model.config.sha256} | stopped


def parse_size(text: str) -> tuple[int, int]:
    """`64x96` -> (64, 96), height first; UserError for anything else."""
    found = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not found:
        raise UserError(f"--size {text!r}: expected HEIGHTxWIDTH in pixels, such as 64x96")
    return int(found[1]), int(found[2])


def save_png(image: Image.Image, path: Path, facts: dict[str, Any]) -> None:
    """Write a PNG with its settings as JSON in the text chunk `pixelgrow`. Raises CannotWrite."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", f"pixelgrow {__version__}")
    info.add_text("pixelgrow", json.dumps(facts))
    with replacing(path) as part:
        image.save(part, format="PNG", pnginfo=info)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which it replaces if it was written. Raises CannotWrite.

    For images that can be made again: unlike `writing.atomic`, it does not wait for the disk.
    """
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            yield part
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _read(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"--prompts {file}: {error.strerror}; expected a text file, one prompt a line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {file}: not UTF-8 text; expected one prompt a line: save it as UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {file}: no prompt in it; expected one a line")
    return prompts


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "image"


def show_progress(done: int, total: int) -> None:
    """Show a line that counts steps, on a terminal."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        sys.stderr.write(f"\r{done} of {total} steps{end}")
        sys.stderr.flush()
