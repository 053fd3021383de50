"""English numbers and nouns, as far as counting questions need them."""

from __future__ import annotations

import re
from collections.abc import Callable

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_VALUES = {word: n for n, word in enumerate(NUMBERS)} | {"none": 0}
_NUMBER = re.compile(r"\d+|" + "|".join(rf"\b{word}\b" for word in _VALUES), re.IGNORECASE)
_IRREGULAR = {
    **{word: word for word in ("fish", "sheep", "deer", "scissors", "skis", "broccoli")},
    **{word: f"{word}s" for word in ("cookie", "bowtie", "tie", "pie", "brownie")},
    "leaf": "leaves", "knife": "knives", "shelf": "shelves", "wolf": "wolves", "scarf": "scarves",
    "mouse": "mice", "goose": "geese", "tooth": "teeth", "foot": "feet",
    "person": "people", "man": "men", "woman": "women", "child": "children",
    "bus": "buses", "lens": "lenses", "potato": "potatoes", "tomato": "tomatoes",
}  # fmt: skip
_SINGULARS = {plural: singular for singular, plural in _IRREGULAR.items()}


def number(text: str) -> int | None:
    """The first number in a text, in digits or in words up to ten; None without one."""
    found = _NUMBER.search(text)
    if found is None:
        return None
    word = found[0].lower()
    return int(word) if word.isdigit() else _VALUES[word]


def plural(noun: str) -> str:
    """A noun, or words that end in one, in the plural."""
    return _last(noun, _plural)


def singular(nouns: str) -> str:
    """A noun in the plural, or words that end in one, in the singular."""
    return _last(nouns, _singular)


def _last(words: str, change: Callable[[str], str]) -> str:
    head, space, last = words.rpartition(" ")
    return head + space + change(last)


def _plural(noun: str) -> str:
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(s|x|z|ch|sh)$", noun) else "s")


def _singular(nouns: str) -> str:
    if nouns in _SINGULARS:
        return _SINGULARS[nouns]
    if nouns.endswith("ies"):
        return nouns[:-3] + "y"
    if re.search(r"(ss|x|z|ch|sh)es$", nouns):
        return nouns[:-2]
    return nouns[:-1] if re.search(r"[^s]s$", nouns) else nouns
