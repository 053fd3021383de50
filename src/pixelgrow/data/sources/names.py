"""Rules for file names, the same for folders, class folders, tar shards and metadata.

- A suffix counts in any case: `a.JPG` is an image and `a.TXT` a caption file.
- Names that differ in their Unicode form alone (NFC, NFD) are the same name; they are compared and shown in NFC.
- Hidden files are not looked at: names that start with a dot (macOS `._a.jpg`), and all in `__MACOSX` and `@eaDir`.
- A file is an image if its name ends in an image suffix, or if its bytes are those of a JPEG, PNG or WebP.
- The caption file of an image is the .txt file, else the .json file, named like the image without its last suffix
  (`a.b.jpg`: `a.b.txt`) or like the image (`a.b.jpg.txt`). An image that has neither belongs to the caption file that
  its name starts with, up to a dot (`a.seg.png`: `a.txt`, webdataset's key): as its image if it is the only one, else
  it is passed over beside `a.jpg`.

- Vector graphics (`.svg`) are not drawn: they and their captions are passed over.

Names inside the package are text: UTF-8, and surrogates for bytes that are not, in any locale.
"""

import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

TEXT, JSON, SVG = ".txt", ".json", ".svg"
IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp"),
    *(".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd", SVG),  # not decoded
    *(".ppm", ".pgm", ".tga", ".ico", ".raw", ".dng", ".cr2", ".nef", ".arw", ".exr"),
}
UNCAPTIONED, UNPAIRED = "no caption", "caption without an image"
HIDDEN = {"__MACOSX", "@eaDir"}


def text_of(name: bytes) -> str:
    """A name's bytes as text."""
    return name.decode("utf-8", "surrogateescape")


def bytes_of(name: str) -> bytes:
    """A name as the file system stores it. Raises UnicodeEncodeError for a name that is not valid Unicode."""
    return name.encode("utf-8", "surrogateescape")


def form(name: str) -> str:
    """A name in NFC."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def suffix_of(name: str) -> str:
    """The lower-case suffix of a file name, with its dot."""
    return os.path.splitext(name)[1].lower()


def loose_form(name: str) -> str:
    """A name in NFC with its suffix in lower case: equal for names that stand for the same file."""
    stem, end = os.path.splitext(form(name))
    return stem + end.lower()


def folded_form(name: str) -> str:
    """A name in NFC whatever its case of letters."""
    return form(form(name).casefold())


def claims_image(name: str) -> bool:
    """Whether a name ends in an image suffix."""
    return suffix_of(name) in IMAGE_SUFFIXES


def is_hidden(path: str) -> bool:
    """Whether a file or one of the folders above it is hidden."""
    return any(part in HIDDEN or (part.startswith(".") and part not in (".", "..")) for part in path.split("/"))


@dataclass
class Matches:
    """What `match` made of a list of names, as their positions in it.

    `pairs`: (image, caption file), in the order of the images. `faults`: what is no sample, and why. `strays`: images
    and caption files without one another, and which. `others`: files that are neither. `further`: images beside that of
    a captioned sample. `vectors`: vector graphics, with a caption or without.
    """

    pairs: list[tuple[int, int]] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)
    strays: dict[int, str] = field(default_factory=dict)
    others: list[int] = field(default_factory=list)
    further: list[int] = field(default_factory=list)
    vectors: list[int] = field(default_factory=list)


def match(names: Sequence[str], is_image: Callable[[int], bool]) -> Matches:
    """Match images and caption files of one folder or shard by their `names` (NFC, distinct).

    `is_image(i)`: whether file i is an image; it is not called for caption files.
    """
    found = Matches()
    captions: dict[str, dict[str, int]] = {TEXT: {}, JSON: {}}
    images: list[int] = []
    for i, name in enumerate(names):
        end = suffix_of(name)
        if end in captions:
            if captions[end].setdefault(name[: -len(end)], i) != i:
                found.faults[i] = "another caption file has its name"
        elif is_image(i):
            images.append(i)
        else:
            found.others.append(i)
    exact: set[int] = set()
    shared: dict[int, list[int]] = {}  # caption file -> images whose names go on where its name ends
    for i in images:
        own, *above = cuts(names[i])
        own_names = (own, *above[:1])
        caption = _first(captions, own_names)
        if caption is not None:
            found.pairs.append((i, caption))
            exact.add(caption)
        elif (caption := _first(captions, above[1:])) is not None:
            shared.setdefault(caption, []).append(i)
        elif suffix_of(names[i]) == SVG:
            found.vectors.append(i)
        else:
            found.strays[i] = UNCAPTIONED
    for caption, some in shared.items():
        if caption in exact:
            found.further += some
        elif len(some) == 1:
            found.pairs.append((some[0], caption))
        else:
            found.faults |= dict.fromkeys(some, "one caption file for several images, none of which has its name")
    used = exact | shared.keys()
    found.strays |= {i: UNPAIRED for i in captions[TEXT].values() if i not in used}
    stems = {os.path.splitext(names[i])[0] for i in used}
    found.others += [i for stem, i in captions[JSON].items() if i not in used and stem not in stems]
    found.vectors = sorted([*found.vectors, *(i for i, _ in found.pairs if suffix_of(names[i]) == SVG)])
    found.pairs = sorted(pair for pair in found.pairs if suffix_of(names[pair[0]]) != SVG)
    return found


def cuts(name: str) -> Iterator[str]:
    """A path, and what is left of it when its file name is cut at its dots, the last first."""
    start = name.rfind("/") + 1
    while True:
        yield name
        dot = name.rfind(".", start + 1)
        if dot < 0:
            return
        name = name[:dot]


def _first(captions: dict[str, dict[str, int]], stems: Sequence[str]) -> int | None:
    """The caption file of the first stem that has one, .txt before .json."""
    return next((some[stem] for some in captions.values() for stem in stems if stem in some), None)
