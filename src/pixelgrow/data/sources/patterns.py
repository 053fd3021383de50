"""Names of many shards in one: braces (`{00000..01242}`, `{train,extra}`), as webdataset writes them, and globs."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator

from pixelgrow.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST = 1_000_000  # names of one pattern


def is_pattern(path: str) -> bool:
    """Whether a path stands for several."""
    return _BRACES.search(path) is not None or glob.has_magic(path)


def expanded(pattern: str) -> Iterator[str]:
    """The paths that the braces of a pattern stand for, in their order. Raises `UserError`."""
    texts = _BRACES.split(pattern)  # text, inside of braces, text, ...
    choices = [_choices(text, pattern) if k % 2 else [text] for k, text in enumerate(texts)]
    count = 1
    for some in choices:
        count *= len(some)
    if count > MOST:
        raise UserError(f"{pattern}: stands for {count:,} names, expected at most {MOST:,}")
    return map("".join, itertools.product(*choices))


def paths_in(pattern: str) -> list[str]:
    """The paths that a pattern stands for, each once: in the order of its braces, and sorted where globs find several.

    What braces name need not exist. Raises `UserError` for a pattern that finds nothing.
    """
    found: dict[str, None] = {}
    for path in expanded(pattern):
        found |= dict.fromkeys(sorted(glob.glob(path)) if glob.has_magic(path) else [path])
    if not found:
        raise UserError(f"{pattern}: no file has such a name; expected tar shards")
    return list(found)


def _choices(inside: str, pattern: str) -> list[str]:
    """`00..12` -> 00, 01, ...; `a,b` -> a, b."""
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        if "," not in inside:
            raise UserError(f"{pattern}: got {{{inside}}}, expected {{00..12}} or {{one,other}}")
        return inside.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if last < first:
        raise UserError(f"{pattern}: {{{inside}}} counts down; expected the smaller number first")
    if last - first >= MOST:
        raise UserError(f"{pattern}: {{{inside}}} stands for {last - first + 1:,} names, expected at most {MOST:,}")
    digits = len(numbers[1])
    return [f"{number:0{digits}}" for number in range(first, last + 1)]
