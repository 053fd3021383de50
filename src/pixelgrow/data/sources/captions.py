"""Captions: what a caption file or a row of metadata says, as clean text with weights."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pixelgrow.data.images import BadImage
from pixelgrow.data.sources.base import Wording

CAPTION_KEYS = ("text", "caption", "prompt")  # of a row or a .json file; the first that has a value counts
MAX_CAPTION = 1 << 16  # bytes
MAX_JSON = 1 << 20  # bytes
_LANGUAGE = re.compile(r"([a-z]{2,3})(?:[_-][A-Za-z]{2,4})?(?:@[a-z]+)?(?:\.[A-Za-z0-9-]+)?=(.*)")  # de=, pt_BR.utf8=


@dataclass(frozen=True)
class Captions:
    """The captions of one image; of a .txt file, how many lines it has and how many of them are `foreign`, in other
    languages, and left out."""

    wordings: tuple[Wording, ...]
    lines: int = 1
    foreign: int = 0


def caption_of(value: object) -> str:
    """A caption as one line of clean text. Raises `BadImage` for what is no text, empty, or longer than 64 KiB."""
    if value is None:
        raise BadImage("no caption")
    if not isinstance(value, str):
        raise BadImage(f"caption is {type(value).__name__}, not text")
    text = " ".join(value.replace("\0", " ").split())
    if not text:
        raise BadImage("empty caption")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise BadImage("caption is not valid Unicode") from None
    if size > MAX_CAPTION:
        raise BadImage("caption longer than 64 KiB")
    return text


def wordings_in(value: object) -> tuple[Wording, ...]:
    """Captions given as a text, or as a list of texts and of `{"text": ..., "weight": ...}` (weight 1 if left out).

    Raises `BadImage`.
    """
    if not isinstance(value, list):
        return (Wording(caption_of(value)),)
    if not value:
        raise BadImage("empty list of captions")
    found = []
    for item in value:
        weight: object = 1.0
        if isinstance(item, dict):
            weight, item = item.get("weight", 1.0), item.get("text")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise BadImage(f"caption weight is {weight!r}, not a number above 0")
        found.append(Wording(caption_of(item), float(weight)))
    return tuple(found)


def captions_in(row: Mapping[str, object]) -> tuple[Wording, ...]:
    """The captions of a row of metadata: its text, caption or prompt, the first that has a value. Raises `BadImage`."""
    value = next((row[key] for key in CAPTION_KEYS if row.get(key) is not None), None)
    if value is None:
        raise BadImage(f"no caption (none of {', '.join(CAPTION_KEYS)} has a value)")
    return wordings_in(value)


def from_text(raw: bytes) -> Captions:
    """The captions in a .txt file, one a line; blank lines do not count.

    Of several lines, one that starts like `de=` or `pt_BR.utf8=` is in another language and is left out (Tux Paint's
    stamps have such files); if all lines do, `en=` counts. Raises `BadImage`.
    """
    if len(raw) > MAX_CAPTION:
        raise BadImage("caption longer than 64 KiB")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadImage("caption is not UTF-8") from None
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text.replace("\0", " ")) if line.strip()]
    if not lines:
        raise BadImage("empty caption")
    languages = [_LANGUAGE.fullmatch(line) if len(lines) > 1 else None for line in lines]
    kept = [line for line, other in zip(lines, languages, strict=True) if other is None]
    kept = kept or [found[2] for found in languages if found is not None and found[1] == "en"]
    if not kept:
        raise BadImage("caption in other languages only (its lines start like de=)")
    return Captions(tuple(Wording(caption_of(line)) for line in kept), len(lines), len(lines) - len(kept))


def from_json(raw: bytes) -> Captions:
    """The captions in a .json file: an object with text, caption or prompt. Raises `BadImage`."""
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise BadImage("caption is not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadImage("caption file is not JSON") from None
    if not isinstance(row, dict):
        raise BadImage("caption file is not a JSON object")
    return Captions(captions_in(row))


def flat(wordings: Sequence[Wording]) -> tuple[str, ...]:
    """Captions as strings, for an index: the text of one; of several texts and weights in turn."""
    if len(wordings) == 1:
        return (wordings[0].text,)
    return tuple(part for w in wordings for part in (w.text, repr(w.weight)))


def wordings_from(strings: Sequence[str]) -> tuple[Wording, ...]:
    """The captions that `flat` made `strings` of."""
    if len(strings) == 1:
        return (Wording(strings[0]),)
    return tuple(Wording(text, float(weight)) for text, weight in zip(strings[::2], strings[1::2], strict=True))
