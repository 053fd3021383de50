"""What kind of source a path is, if a recipe does not say so. A guess is named as one, or refused."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pixelgrow.data.images import ARCHIVES, BadImage
from pixelgrow.data.sources.files import format_at, in_order, is_image, key_of, open_regular, walk
from pixelgrow.data.sources.folders import ClassFolder, PairedFolder
from pixelgrow.data.sources.index import FileSource
from pixelgrow.data.sources.metadata import MetadataFolder
from pixelgrow.data.sources.names import JSON, TEXT, bytes_of, cuts, is_hidden, match, suffix_of, text_of
from pixelgrow.data.sources.patterns import is_pattern
from pixelgrow.data.sources.tables import COLUMNS, KINDS, table_in
from pixelgrow.data.sources.tars import ARCHIVE_SUFFIXES, TarShards
from pixelgrow.errors import UserError

TABLES = (".csv", ".tsv", ".jsonl", JSON)
OTHER_TABLES = (".parquet", ".xlsx")
# What stands in the name of a file, or among the columns of a table, if it may hold the captions of many images.
CAPTION_WORDS = re.compile(
    r"caption|prompt|metadata|annotation|text|description|title|file_?name|image|\.(jpe?g|png|webp)"
)
_LOOK = 4096  # bytes of a table that are looked at
# Folders that Hugging Face's ImageFolder takes for splits (datasets/data_files.py), followed by digits or not.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
FORMS = (
    f"a metadata.jsonl, metadata.csv or metadata.parquet with {COLUMNS}, a .txt beside each image, or one folder per "
    "class"
)


@dataclass(frozen=True)
class Kind:
    """How to read a path: the class of the source, where its files are, and what was guessed ("" if nothing)."""

    source: type[FileSource]
    path: str
    guess: str = ""


def kind_of(path: str, kind: str) -> Kind:
    """What the folder or file `path` is, or is said to be: `kind` auto, folder, classes or tar. Raises `UserError`."""
    if not os.path.isdir(path):
        return _file(path, kind)
    if kind == "tar":
        return Kind(TarShards, path)
    if kind == "classes":
        return Kind(ClassFolder, path)
    if table_in(path) is not None:
        return Kind(MetadataFolder, path)
    if kind == "folder":
        return Kind(PairedFolder, path)
    return _shards(path) or _split(path) or _images(path)


def has_captions(path: str) -> bool:
    """Whether a folder has a metadata file, or some image of it or below it has a caption file."""
    root = os.fsencode(path)
    walked = walk(root, lambda key, reason: None)
    return table_in(path) is not None or any(_pair(root, folder, names) for folder, names in walked)


def _file(path: str, kind: str) -> Kind:
    if not os.path.exists(path) and is_pattern(path):
        if kind not in ("auto", "tar"):
            raise UserError(f"{path}: kind {kind} expects a folder, got a pattern of names, which is for tar shards")
        return Kind(TarShards, path)
    name, folder = os.path.basename(path), os.path.dirname(path) or "."
    found = format_at(os.fsencode(path))
    if name.lower() in KINDS:
        raise UserError(f"{path}: expected the folder of this file; write source: {folder}")
    if found in ARCHIVES or suffix_of(name) in ARCHIVE_SUFFIXES:
        raise UserError(f"{path}: a {found or 'compressed'} archive; expected a folder or a plain .tar: unpack it")
    if is_image(os.fsencode(path)):
        raise UserError(f"{path}: a single image is no source; expected a folder of images, a .tar, or scenes")
    if kind not in ("auto", "tar"):
        raise UserError(f"{path}: kind {kind} expects a folder, got a file")
    return Kind(TarShards, path)


def _shards(path: str) -> Kind | None:
    """Tar shards, if a folder has any. Raises `UserError` if it has captioned images too, or other archives alone."""
    names = sorted(os.listdir(path))
    tars = [name for name in names if suffix_of(name) == ".tar"]
    others = [name for name in names if suffix_of(name) in ARCHIVE_SUFFIXES]
    if not tars and not others:
        return None
    if not tars:
        return None if _has_images(path) else Kind(TarShards, path)  # which refuses them
    root = os.fsencode(path)
    for folder, files in walk(root, lambda key, reason: None):
        files = [name for name in files if suffix_of(text_of(name)) != ".tar"]  # many, and not to be opened
        if pair := _pair(root, folder, files):
            raise UserError(
                f"{path}: it has tar shards ({tars[0]}) and captioned images ({pair}); expected one of the two: write "
                "kind: tar or kind: folder, or move one of them"
            )
    return Kind(TarShards, path)


def _has_images(path: str) -> bool:
    """Whether a folder, or one below it, has an image."""
    root = os.fsencode(path)
    walked = walk(root, lambda key, reason: None)
    return any(is_image(os.path.join(root, folder, name)) for folder, names in walked for name in names)


def _pair(root: bytes, folder: bytes, names: list[bytes]) -> str:
    """The first image of a folder that has a caption file beside it, "" if none has."""
    keys = [key_of(folder + name) for name in names]
    pairs = match(keys, lambda i: is_image(os.path.join(root, folder, names[i]))).pairs
    return keys[pairs[0][0]] if pairs else ""


def _split(path: str) -> Kind | None:
    """The training split of a folder whose folders are splits (train, test, ...), read as ImageFolder reads it.

    None if they are not, or if images lie beside them. Raises `UserError` for splits without one to train on.
    """
    root = os.fsencode(path)
    names = [name for name in in_order(os.listdir(root)) if not is_hidden(text_of(name))]
    paths = {key_of(name): os.path.join(root, name) for name in names}
    folders = {name: os.fsdecode(path) for name, path in paths.items() if os.path.isdir(path)}
    if any(is_image(path) for name, path in paths.items() if name not in folders):
        return None
    splits = {name: split for name in folders if (split := split_of(name)) and _holds_data(folders[name])}
    rest = [name for name in folders if name not in splits and _holds_data(folders[name])]
    if not splits or (rest and len(set(splits.values())) == 1):
        return None
    training = [name for name, split in splits.items() if split == "train"]
    found = f"{path}: its folders are splits ({', '.join(f'{name}/' for name in splits)})"
    if rest or len(training) != 1:
        beside = f", beside {rest[0]}/" if rest else ""
        raise UserError(f"{found}{beside}; expected one to train on: write source: {folders[next(iter(splits))]}")
    inner = kind_of(folders[training[0]], "auto")
    others = [name for name in splits if name != training[0]]
    guess = f"its folder {training[0]}/ is taken for the training split"
    if others:
        unused = ", ".join(f"{name}/" for name in others)
        guess += f"; {unused} stays unused (heldout: {{source: {folders[others[0]]}}} holds it out)"
    return Kind(inner.source, inner.path, "; ".join(filter(None, (guess, inner.guess))))


def split_of(folder: str) -> str | None:
    """The split that a folder's name stands for, or None."""
    word = re.sub(r"[\d\W_]+$", "", folder.lower())
    return next((split for split, words in SPLITS.items() if word in words), None)


def _holds_data(path: str) -> bool:
    tops = os.listdir(path)
    return any(suffix_of(name) == ".tar" or name.lower() in KINDS for name in tops) or _has_images(path)


@dataclass
class _Survey:
    """What a folder without metadata of its own holds. Images: in the folder itself, in folders of it, and deeper."""

    loose: int = 0
    nested: Counter[str] = field(default_factory=Counter)  # of each top folder
    deep: str = ""  # the first image further down
    table: str = ""  # the first file that may hold captions
    beside: tuple[str, str] | None = None  # the first file of another kind named like an image, and this image
    others: Counter[str] = field(default_factory=Counter)  # of each suffix

    @property
    def images(self) -> int:
        return self.loose + sum(self.nested.values())


def _images(path: str) -> Kind:
    """Images with captions beside them, or in class folders. Raises `UserError` if neither is clear."""
    root, seen = os.fsencode(path), _Survey()
    for folder, names in walk(root, lambda key, reason: None):
        keys = [key_of(folder + name) for name in names]
        table = next((key for key in keys if os.path.basename(key).lower() in KINDS), None)
        if table is not None:
            below = os.path.join(path, os.path.dirname(table))
            raise UserError(f"{path}: its captions are in {os.path.join(path, table)}; name {below} as the source")
        if _pair(root, folder, names):
            return Kind(PairedFolder, path)
        _take(seen, root, keys, {i for i, name in enumerate(names) if is_image(os.path.join(root, folder, name))})
    if not seen.images:
        found = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in seen.others.most_common(4))
        raise UserError(
            f"{path}: no images in it{f' (found files: {found})' if found else ''}; expected JPEG, PNG or WebP files, "
            "or tar shards"
        )
    return _classes(path, seen)


def _take(seen: _Survey, root: bytes, keys: Sequence[str], images: set[int]) -> None:
    """Take a folder's files into account."""
    stems = {stem: keys[i] for i in images for stem in cuts(keys[i])}
    for i, key in enumerate(keys):
        top, _, below = key.partition("/")
        if i not in images:
            seen.others[suffix_of(key)] += 1
            beside = next(((key, stems[stem]) for stem in cuts(key) if stem in stems), None)
            if beside is not None:
                seen.beside = seen.beside or beside
            elif not seen.table and _may_hold_captions(root, key):
                seen.table = key
        elif not below:
            seen.loose += 1
        else:
            seen.nested[top] += 1
            seen.deep = seen.deep or (key if "/" in below else "")


def _may_hold_captions(root: bytes, key: str) -> bool:
    """Whether a file may hold the captions of many images: a table by its columns, a text by its name."""
    end = suffix_of(key)
    words = os.path.basename(key) if end == TEXT else ""
    if end in TABLES:
        try:
            with open_regular(os.path.join(root, bytes_of(key))) as file:
                words = file.read(_LOOK).decode(errors="replace")
        except BadImage:
            return False
        words = " ".join(re.findall(r'"([^"]*)"\s*:', words)) if end in (".jsonl", JSON) else words.partition("\n")[0]
    return end in OTHER_TABLES or CAPTION_WORDS.search(words.lower()) is not None


def _classes(path: str, seen: _Survey) -> Kind:
    """Class folders, if nothing speaks against it. Raises `UserError`."""
    names = list(seen.nested)
    some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    say = f"write kind: classes if its folders ({some}) are classes"
    if seen.table:
        raise UserError(
            f"{path}: {seen.images} images, and a file {seen.table} that is not read; expected {FORMS}: name it so, or "
            f"{say}"
        )
    if seen.beside is not None:
        raise UserError(
            f"{path}: {seen.images} images, and files like {seen.beside[0]} beside {seen.beside[1]}; captions are read "
            f"from .txt and .json: rename them, or {say}"
        )
    if sum(seen.nested.values()) <= seen.loose:
        raise UserError(f"{path}: {seen.images} images without captions; expected {FORMS}")
    if len(names) == 1:
        raise UserError(
            f"{path}: its images are all in one folder, {names[0]}, and have no captions; expected {FORMS}: name "
            f"{os.path.join(path, names[0])} as the source if the folders in it are classes, or write kind: classes if "
            f"{names[0]} is the one class"
        )
    if seen.deep:
        raise UserError(
            f"{path}: its images lie in folders of folders ({seen.deep}), and their classes are unclear; write kind: "
            f"classes if they are {some}, or name one of these as the source"
        )
    return Kind(ClassFolder, path, f"its {len(names)} folders are taken for classes; write kind: classes to say so")
