"""A recipe's `data:` -> sources."""

import os
from collections.abc import Mapping, Sequence

from pixelgrow.data.sources.base import Source
from pixelgrow.data.sources.files import holds_images, is_image, is_other_image
from pixelgrow.data.sources.folders import METADATA, ClassFolder, MetadataFolder, PairedFolder, folder_kind
from pixelgrow.data.sources.index import FileSource
from pixelgrow.data.sources.tars import COMPRESSED, TarShards
from pixelgrow.errors import UserError

Spec = Mapping[str, object]
SCENE_KEYS = ("n", "captions", "seed", "split")
KINDS = ("auto", "folder", "classes", "tar")


def open_source(spec: Spec | str) -> Source:
    """Open and index a source.

    `spec`: a path, or a mapping: `{source: scenes, n, captions, seed, split}` for the built-in scenes,
    `{source: path, kind: auto|folder|classes|tar}` for files. A `weight` beside them is left to `open_mixture`.
    Raises `UserError` for a missing folder, an empty set, captions in no known form.
    """
    settings = {"source": spec} if isinstance(spec, str) else dict(spec)
    settings.pop("weight", None)
    where = settings.pop("source", None)
    if not isinstance(where, (str, os.PathLike)):
        raise UserError(f"data: got {dict(settings)} without source:, expected a path or scenes")
    if where == "scenes":
        _known(settings, SCENE_KEYS, "scenes")
        from pixelgrow.data.scenes.source import Scenes

        return Scenes(**settings)
    path = os.path.expanduser(os.fspath(where))
    _known(settings, ("kind",), path)
    kind = settings.get("kind", "auto")
    if kind not in KINDS:
        raise UserError(f"{path}: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if not os.path.exists(path):
        raise UserError(f"{path}: no such folder or file; expected a folder of images, a .tar, or the word scenes")
    try:
        return _source_class(path, str(kind))(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def open_mixture(specs: Spec | str | Sequence[Spec | str]) -> tuple[list[Source], list[float] | None]:
    """(sources, weights) of a recipe's `data:`, one mapping or a list of them.

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
    return [open_source(item) for item in items], [float(w) for w in weights] or None  # type: ignore[arg-type]


def _source_class(path: str, kind: str) -> type[FileSource]:
    if not os.path.isdir(path):
        if is_image(os.fsencode(path)) or is_other_image(os.fsencode(path)):
            raise UserError(f"{path}: a single image is no source; expected a folder of images, a .tar, or scenes")
        if kind in ("auto", "tar"):
            return TarShards
        raise UserError(f"{path}: kind {kind} expects a folder, got a file")
    if kind == "tar":
        return TarShards
    if kind == "classes":
        return ClassFolder
    if kind == "folder":
        return MetadataFolder if os.path.lexists(os.path.join(path, METADATA)) else PairedFolder
    names = os.listdir(path)
    if METADATA in names:
        return MetadataFolder
    if any(name.endswith(".tar") for name in names):
        return TarShards
    if any(name.endswith(COMPRESSED) for name in names) and not holds_images(path):
        return TarShards  # which says what to do with them
    return folder_kind(path)


def _known(settings: Mapping[str, object], allowed: Sequence[str], where: str) -> None:
    for key in settings:
        if key not in allowed:
            raise UserError(f"data {where}: unknown setting {key!r}, expected one of {', '.join(allowed)}")
