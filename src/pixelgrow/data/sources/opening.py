"""A recipe's `data:` -> sources."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import cast, get_args

from pixelgrow.data.images import FRAME, PADDED, Fit, Frame, colour_of
from pixelgrow.data.sources.base import Lanes, Source, in_buckets
from pixelgrow.data.sources.folders import ImageFolder
from pixelgrow.data.sources.index import FileSource
from pixelgrow.data.sources.kinds import has_captions, kind_of
from pixelgrow.data.sources.names import folded_form, text_of
from pixelgrow.data.sources.patterns import is_pattern
from pixelgrow.data.sources.remote import is_url
from pixelgrow.data.sources.streamed import CACHE, StreamedShards
from pixelgrow.data.sources.tars import TarShards
from pixelgrow.errors import UserError

Spec = Mapping[str, object]
FRAME_KEYS = ("ground", "fit", "buckets")
SHARD_KEYS = ("lanes", "window", "cache")
KINDS = ("auto", "folder", "classes", "tar")
log = logging.getLogger(__name__)


def open_source(spec: Spec | str) -> Source:
    """Open and index a source.

    `spec`: a path, or a mapping: `{source: scenes, n, captions, seed, split, world}` for the built-in scenes, `{source:
    path, kind: auto|folder|classes|tar, ground: colour, fit: crop|pad, buckets: true|false}` for files
    (`images.Frame`), with `lanes` and `window` for tar shards that are read in lanes (`Lanes`), and `cache` for those
    whose path is a URL. A `weight` beside them is left to `open_mixture`. Raises `UserError` for a missing folder, an
    empty set, captions in no known form.
    """
    settings = {"source": spec} if isinstance(spec, str) else dict(spec)
    settings.pop("weight", None)
    where = settings.pop("source", None)
    if not isinstance(where, (str, os.PathLike)):
        raise UserError(f"data: got {dict(settings)} without source:, expected a path or scenes")
    if where == "scenes":
        from pixelgrow.data.scenes.source import SETTINGS, Scenes

        _known(settings, SETTINGS, "scenes")
        return Scenes(**settings)
    path = os.path.expanduser(os.fspath(where))
    _known(settings, ("kind", *FRAME_KEYS, *SHARD_KEYS), path)
    kind = settings.get("kind", "auto")
    if kind not in KINDS:
        raise UserError(f"{path}: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    frame, source = _frame(settings, path), _streamed(path, settings) if is_url(path) else _here(path, settings)
    source.lay(frame)
    return source


def _here(path: str, settings: Mapping[str, object]) -> FileSource:
    """The source at a path."""
    if not os.path.exists(path) and not is_pattern(path):
        raise UserError(f"{path}: {_not_there(path)}; expected a folder of images, a .tar, or the word scenes")
    try:
        found = kind_of(path, str(settings.get("kind", "auto")))
        source = found.source(found.path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    source.guess = found.guess
    given = [key for key in SHARD_KEYS if key in settings]
    if given and (not isinstance(source, TarShards) or "cache" in given):
        where = "the URL of tar shards" if "cache" in given else "tar shards"
        raise UserError(f"{path}: {given[-1]} belongs to {where}, which this is not; drop it")
    source.lanes = _lanes(settings, path) if given else None
    return source


def _streamed(url: str, settings: Mapping[str, object]) -> FileSource:
    """The source at a URL."""
    if settings.get("kind", "auto") not in ("auto", "tar"):
        raise UserError(f"{url}: kind is {settings['kind']!r}, and a URL is of tar shards; drop it")
    lanes = _lanes(settings, url)
    source = StreamedShards(url, _number(settings, "cache", url, CACHE))
    source.lanes = lanes
    return source


def _lanes(settings: Mapping[str, object], path: str) -> Lanes:
    count, window = (
        _number(settings, key, path, default) for key, default in (("lanes", Lanes.count), ("window", Lanes.window))
    )
    return Lanes(int(count), int(window))


def _number(settings: Mapping[str, object], key: str, path: str, default: float) -> float:
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 or (key != "cache" and value % 1):
        expected = "a number of GB above 0" if key == "cache" else "a whole number from 1 on"
        raise UserError(f"{path}: {key} is {value!r}, expected {expected}")
    return value


def open_images(path: str) -> Source:
    """Open a folder whose images need no captions; where it has captions, or the path is no folder, `open_source`.

    Raises `UserError` as that does.
    """
    folder = os.path.expanduser(path)
    try:
        if (
            is_url(path)
            or not os.path.isdir(folder)
            or has_captions(folder)
            or any(n.endswith(".tar") for n in os.listdir(folder))
        ):
            return open_source(path)
        return ImageFolder(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror or error}") from error


def open_mixture(specs: Spec | str | Sequence[Spec | str]) -> tuple[list[Source], list[float] | None]:
    """(sources, weights) of a recipe's `data:`, one mapping or a list of them. Logs what was guessed about a source.

    Weights are the share of images drawn from each; None (in proportion to their sizes) unless all say one.
    """
    items = [specs] if isinstance(specs, (str, Mapping)) else list(specs)
    if not items:
        raise UserError("data: got an empty list, expected at least one source")
    weights = [item.get("weight") for item in items if isinstance(item, Mapping) and item.get("weight") is not None]
    if weights and len(weights) < len(items):
        raise UserError(f"data: {len(weights)} of {len(items)} sources have a weight; give it to all or to none")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise UserError(f"data: weight is {weight!r}, expected a number above 0")
    sources = [open_source(item) for item in items]
    for source in sources:
        if guess := getattr(source, "guess", ""):
            log.info("%s: %s", source.name, guess)
    laned = next((source.name for source in sources if getattr(source, "lanes", None)), None)
    if laned is not None and any(map(in_buckets, sources)):
        raise UserError(
            f"data: got buckets: true, and {laned} is read shard by shard, each of which has images of all shapes: "
            "drop buckets, or name shards on this machine, without lanes"
        )
    return sources, [float(w) for w in weights] or None  # type: ignore[arg-type]


def _not_there(path: str) -> str:
    """Why there is nothing at a path, as far as the names in its folder say."""
    if "\\" in path:
        return "no such folder or file: its name has backslashes, expected / between folders"
    folder, name = os.path.split(os.path.abspath(path))
    try:
        others = {folded_form(text_of(other)): text_of(other) for other in os.listdir(os.fsencode(folder))}
    except OSError:
        return f"no such folder or file, for there is no folder {folder}"
    other = others.get(folded_form(text_of(os.fsencode(name))))
    return "no such folder or file" + (f": there is {other}, in other letters or another Unicode form" if other else "")


def _frame(settings: Mapping[str, object], path: str) -> Frame:
    """How the settings of the source at `path` lay images out. Raises `UserError`."""
    ground, fit = settings.get("ground", FRAME.ground), settings.get("fit", FRAME.fit)
    try:
        colour_of(str(ground))
    except ValueError as error:
        raise UserError(f"{path}: ground: {error}") from None
    if fit not in get_args(Fit):
        raise UserError(f"{path}: fit is {fit!r}, expected one of {', '.join(get_args(Fit))}")
    buckets = settings.get("buckets", FRAME.buckets)
    if not isinstance(buckets, bool):
        raise UserError(f"{path}: buckets is {buckets!r}, expected true or false")
    if buckets and fit == "pad":
        raise UserError(f"{path}: {PADDED}")
    return Frame(str(ground), cast("Fit", fit), buckets)


def _known(settings: Mapping[str, object], allowed: Sequence[str], where: str) -> None:
    for key in settings:
        if key not in allowed:
            raise UserError(f"data {where}: unknown setting {key!r}, expected one of {', '.join(allowed)}")
