"""The `new` verb: from images to a commented recipe that fits them and this machine."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pixelgrow.cli.data import within
from pixelgrow.data.buckets import square
from pixelgrow.data.inspect import Inspection, captions_in, inspect_source, spread
from pixelgrow.data.sources.base import (
    HELD_OUT_AT_LEAST,
    Source,
    Subset,
    clear_among,
    heldout_split,
    large_enough,
    sizes_of,
)
from pixelgrow.data.sources.kinds import split_of
from pixelgrow.data.sources.opening import open_source
from pixelgrow.data.sources.remote import is_url
from pixelgrow.errors import UserError
from pixelgrow.plan.machine import Machine, this_machine
from pixelgrow.plan.suggest import PATIENCE, SMALLEST, Suggestion, Wanted, sides_of, suggest
from pixelgrow.recipe.data import HeldoutSpec, TextSpec
from pixelgrow.recipe.plain_yaml import scalar
from pixelgrow.recipe.read import builtin
from pixelgrow.report.tables import inspection_tables, show, time_of
from pixelgrow.text.cut import Cut, cut_in
from pixelgrow.text.encoders import load_tokenizer
from pixelgrow.text.spec import describe
from pixelgrow.writing import atomic, reading

RUNS = Path("runs")
TOKENS = (32, 64, 128, 256)  # of a caption: the first that cuts CUT of them at most
CUT = 0.02
PROMPTS, CLASSES, LONG = 4, 8, 80  # prompts of `preview`, or classes; letters of a prompt
TOLERATED = 0.005  # share of bad files that the default limit surely allows
FEW = 10  # of few images, one in so many is held out
OBLONG = 1.2  # ratio of sides; of cut-out objects more oblong a crop loses the ends
WIDTH = 118  # letters of a line
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """What was found in a source: the settings of `data`, `heldout` and `text`, and what they stand for."""

    data: dict[str, Any]
    heldout: dict[str, Any]
    text: dict[str, Any]
    found: Inspection
    train: Source
    held: Source
    cut: Cut | None
    preview: list[str]


def new_recipe(source: str, out: Path | None = None, kind: str = "auto") -> Path:
    """Look at images and at this machine, write a recipe, print what was found; returns its path. Raises UserError."""
    if source == "scenes":
        raise UserError("new: expected a folder of images or tar shards; the built-in scenes have a recipe: demo")
    name = _name(source)
    out = Path(f"{name}.yaml") if out is None else out
    with reading(out):
        exists = out.exists()
    if exists:
        raise UserError(f"{out} exists: name another file with -o, or delete it")
    if within(out, source):
        raise UserError(f"{out} would lie in {source}, where nothing is written: name another place with -o")
    data, sides = _look(source, kind, os.path.abspath(out.parent) != str(Path.cwd()))
    machine = this_machine()
    more = _bad_limit(data.found) | ({"workers": max(1, min(8, machine.cores // 2))} if machine.gpu else {})
    held = len(large_enough(data.held, (sides[-1], sides[-1])))
    made = suggest(Wanted(len(data.train), sides, held, data.text, more), machine)
    with atomic(out) as part:
        part.write_text(recipe_text(name, data, machine, made), encoding="utf-8")
    show(inspection_tables(data.found, data.cut))
    for stage, seconds in made.seconds.items():
        show(f"{stage}: {_about(seconds)} on {machine}")
    return out


def _name(source: str) -> str:
    """A name for the run: the folder's or the archive's, with a number if there is a run or a recipe of that name."""
    path = Path(os.path.abspath(os.path.expanduser(source)))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem if path.is_file() else path.name).strip("-._") or "images"
    names = (name if number == 1 else f"{name}-{number}" for number in range(1, 1_000_000))
    return next(n for n in names if n not in builtin() and not (RUNS / n).exists())


# --- looking ----------------------------------------------------------------------------------------------------------


def _look(source: str, kind: str, elsewhere: bool) -> tuple[Data, tuple[int, ...]]:
    """What is in a source, and resolutions for stages. `elsewhere`: a relative path would mean another place."""
    opened = open_source({"source": source, "kind": kind})
    fit = {"fit": "pad"} if _are_objects(opened) else {}
    if fit:
        opened = open_source({"source": source, "kind": kind, **fit})
    classes: tuple[str, ...] = getattr(opened, "classes", ())
    path = opened.name if os.path.abspath(opened.name) != os.path.abspath(os.path.expanduser(source)) else source
    where = {"source": _path(path, elsewhere)}
    where |= {"kind": "classes"} if classes else {} if kind == "auto" else {"kind": kind}
    train: Source
    held: Source
    split = None if path is source else _other_split(source, classes, fit)
    if split is None:
        heldout: dict[str, Any] = {"fraction": HeldoutSpec().fraction}
        heldout |= {"at_most": max(2, len(opened) // FEW)} if len(opened) < FEW * HELD_OUT_AT_LEAST else {}
        train, held = heldout_split(opened, **heldout)
    else:
        heldout = {**where, "source": _path(split.name, elsewhere), **fit}
        train, held = opened, split
    sides = sides_of(train, held)
    if not sides:
        shorter = sizes_of(opened).min(axis=1)
        raise UserError(
            f"{source}: most of its {len(opened):,} images are too small: their smaller sides are {shorter.min()} to "
            f"{shorter.max()} px, and the smallest core takes {SMALLEST} px: add larger ones"
        )
    trained = train if isinstance(train, Subset) else None
    found = inspect_source(opened, [square(side) for side in sides], train=trained)
    text, cut = _text(opened, classes)
    return Data(where | fit, heldout, text, found, train, held, cut, _preview(opened, classes)), sides


def _are_objects(opened: Source) -> bool:
    """Whether images are, in the main, objects cut out, of which a square crop would lose the ends."""
    sizes = sizes_of(opened)
    oblong = sizes.max(axis=1) > OBLONG * sizes.min(axis=1)
    return bool(clear_among(opened) >= 0.5 * len(opened) and oblong.mean() >= 0.25)


def _path(path: str, elsewhere: bool) -> str:
    """A path for a recipe: as it was typed, absolute if the recipe lies in another folder."""
    return os.path.abspath(os.path.expanduser(path)) if elsewhere and not is_url(path) else path


def _other_split(source: str, classes: tuple[str, ...], fit: Mapping[str, str]) -> Source | None:
    """The test or validation split beside the training split of a folder; None if there is none that can be used."""
    root = Path(source).expanduser()
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if split_of(folder.name) not in ("test", "validation"):
            continue
        try:
            found = open_source({"source": str(folder), **({"kind": "classes"} if classes else {}), **fit})
        except UserError as error:
            logger.warning("%s is not held out: %s", folder, error)
            continue
        if getattr(found, "classes", ()) == classes:
            return found
    return None


def _text(opened: Source, classes: tuple[str, ...]) -> tuple[dict[str, Any], Cut | None]:
    """The recipe's `text`, and the captions that it cuts."""
    if classes:
        return {"classes": len(classes)}, None
    encoder, captions = TextSpec().encoder, list(dict.fromkeys(captions_in(opened)))
    tokenizer = load_tokenizer(describe(encoder, TOKENS[0]))
    for tokens in TOKENS:
        cut = cut_in(tokenizer, captions, tokens)
        if cut.captions <= CUT * len(captions):
            break
    return {"encoder": encoder, "max_tokens": tokens}, cut


def _preview(opened: Source, classes: tuple[str, ...]) -> list[str]:
    """A few prompts in the form of the data: captions, or names of classes."""
    if classes:
        return [classes[i] for i in spread(len(classes), CLASSES)]
    captions = [text for text in dict.fromkeys(captions_in(opened)) if text.isprintable() and text.strip()]
    short = [text for text in captions if len(text) <= LONG] or captions[:1]
    return [short[i] for i in spread(len(short), PROMPTS)]


def _bad_limit(found: Inspection) -> dict[str, float]:
    """A limit of bad files above the share that was found, if the default might be too low."""
    share = min(1.0, sum(bad.samples for bad in found.bad) / found.files)
    return {"bad_limit": round(min(1.0, 2 * share + 0.01), 2)} if share > TOLERATED else {}


# --- the recipe's text ------------------------------------------------------------------------------------------------


def recipe_text(name: str, data: Data, machine: Machine, made: Suggestion) -> str:
    """A recipe as YAML, with comments."""
    found, sides = data.found, sizes_of(data.train).min(axis=1)
    what = f"in {len(found.classes)} classes" if found.classes else "with captions"
    prompt = f" {shlex.quote(data.preview[0])}" if data.preview else ""
    time = _about(sum(made.seconds.values()))
    lines = [
        f"# Made by pixelgrow new for {found.samples:,} images, to train {time} on {machine}.",
        "#     pixelgrow run THIS-FILE               run it; the same command goes on with a run that was stopped",
        f"#     pixelgrow sample runs/{name}/core{prompt}     sample from it, while it trains, too",
        "# docs/train-your-own.md says more.",
        f"name: {name}  # the run goes to runs/{name}",
        "seed: 0",
        "preview:  # prompts of the sample grids in runs/.../samples/; write your own, and others at any time",
        *(f"  - {quoted(text)}" for text in data.preview),
        f"text: {flow(data.text)}{_of_captions(data)}",
        f"# {found.samples:,} images {what}, their smaller sides {sides.min()} to {sides.max()} px",
        f"data: {flow(data.data)}",
        f"heldout: {flow(data.heldout)}  # {len(data.held):,} images that are never trained on",
        "# flip: true in a stage mirrors half of its images: more data, where mirror images are right.",
        "stages:",
    ]
    accounts = {size[0]: account for size, account in found.stages}
    for stage in made.stages:
        ((verb, body),) = stage.items()
        side = body.get("resolution", body.get("to"))
        if side is not None:
            does = f"A {body['size']} core learns the image as a whole" if verb == "train" else "Details are added"
            lines.append(f"  # {does}, at {side} px: {_about(made.seconds[body['name']])}.")
            lines.append(f"  # It {accounts[side].line()}.")
        lines += _wrapped(f"  - {verb}: ", body)
    if made.beyond:
        lines.append(
            f"  # Enough images have {made.beyond[-1]} px, but that would take more than {PATIENCE // 3600} hours here."
        )
        lines.append(f"  # To go on: another growth like the last, with to: {made.beyond[0]}.")
    return "\n".join(lines) + "\n"


def _of_captions(data: Data) -> str:
    if data.cut is None:
        return ""
    cut = f"; {data.cut.captions:,} of {data.cut.total:,} are cut" if data.cut.captions else ""
    return f"  # captions have {data.found.words.median} words, up to {data.found.words.most}{cut}"


def _about(seconds: float) -> str:
    """A time to the minute."""
    return f"about {time_of(seconds if seconds < 60 else 60 * round(seconds / 60))}".replace(" min 0 s", " min")


def quoted(text: str) -> str:
    """A text in YAML, in quotes."""
    return str(yaml.safe_dump(text, default_style='"', allow_unicode=True, width=10**9)).strip()


def flow(value: Any) -> str:
    """A value in YAML's flow style: large numbers with underscores, texts in quotes unless they are plain words."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, str):
        return (
            value
            if re.fullmatch(r"[\w./-]*[A-Za-z][\w./-]*", value, re.A) and scalar(value) == value
            else quoted(value)
        )
    if type(value) is int and value >= 10_000:
        return f"{value:_}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _wrapped(head: str, body: Mapping[str, Any]) -> list[str]:
    """A mapping in flow style, wrapped between its settings."""
    lines, parts = [f"{head}{{"], [f"{key}: {flow(value)}" for key, value in body.items()]
    for number, part in enumerate(parts, 1):
        text = part + ("}" if number == len(parts) else ", ")
        if len(lines[-1]) + len(text.rstrip()) > WIDTH:
            lines.append(" " * (len(head) + 1))
        lines[-1] += text
    return [line.rstrip() for line in lines]
