"""Reading a caption of the built-in scenes back: the specification that it describes, or None."""

import re

from pixelgrow.data.scenes.captions import NUMBERS, Group, Spec, noun
from pixelgrow.data.scenes.vocabulary import BACKGROUNDS, COLOURS, INVERSE, SHAPES

_PATTERNS = {"striped": "striped", "checked": "checked", "checkered": "checked", "dotted": "dotted", "plain": "plain"}
_COUNTS = {"a": 1, "an": 1, "one": 1, "a single": 1, "a pair of": 2} | {NUMBERS[n]: n for n in range(2, len(NUMBERS))}
_NOUNS = {noun(shape, n): shape for shape in SHAPES for n in (1, 2)}
_PLACES = {
    "above": "above", "over": "above",
    "below": "below", "under": "below", "underneath": "below",
    "left of": "left of", "to the left of": "left of", "on the left of": "left of",
    "right of": "right of", "to the right of": "right of", "on the right of": "right of",
}  # fmt: skip
_ENDS = {
    ("at the top", "at the bottom"): "above",
    ("at the bottom", "at the top"): "below",
    ("on the left", "on the right"): "left of",
    ("on the right", "on the left"): "right of",
}


def _any(words: object) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))  # type: ignore[call-overload]


def _group(name: str) -> str:
    """A noun phrase, its parts in groups named after it."""
    colour = _any(COLOURS)
    return (
        rf"(?P<{name}n>{_any(_COUNTS)}) (?:(?P<{name}size>small|large) )?(?:(?P<{name}before>{colour}) )?"
        rf"(?P<{name}noun>{_any(_NOUNS)})(?: in (?P<{name}after>{colour}))?"
    )


_WHERE = rf"an? (?P<where>(?:(?:{_any(_PATTERNS)}|{_any(BACKGROUNDS)}) ?)+) background"
_FORMS = tuple(
    re.compile(form)
    for form in (
        _group("a"),
        rf"{_group('a')} (?P<end>{_any(e for e, _ in _ENDS)}) and {_group('b')} (?P<other>{_any(e for e, _ in _ENDS)})",
        rf"{_group('a')} with {_group('b')} (?P<far>{_any(_PLACES)}) (?:it|them)",
        rf"{_group('a')} (?:is |are )?(?P<place>{_any(_PLACES)}) {_group('b')}",
    )
)


def read(caption: str) -> Spec | None:
    """The specification of a caption in the built-in scenes' English; a background left unsaid is plain white."""
    words = re.sub(r"\s+", " ", caption.strip().rstrip(".").lower())
    background, pattern = "white", "plain"
    if found := re.fullmatch(rf"on {_WHERE}, (?P<rest>.*)", words) or re.fullmatch(
        rf"(?P<rest>.*?) (?:on|against) {_WHERE}", words
    ):
        parts = found["where"].split()
        colours = [p for p in parts if p in BACKGROUNDS]
        patterns = [_PATTERNS[p] for p in parts if p in _PATTERNS]
        if len(colours) != 1 or len(patterns) > 1:
            return None
        background, pattern, words = colours[0], (patterns or ["plain"])[0], found["rest"]
    words = re.sub(r"^(?:a picture|an image|a drawing) of ", "", words)
    for form in _FORMS:
        if match := form.fullmatch(words):
            return _spec(match.groupdict(), background, pattern)
    return None


def _spec(parts: dict[str, str | None], background: str, pattern: str) -> Spec | None:
    groups = []
    for name in ("a", "b") if "bn" in parts else ("a",):
        colour = parts[f"{name}before"] or parts[f"{name}after"]
        if colour is None:
            return None
        shape = _NOUNS[str(parts[f"{name}noun"])]
        groups.append(Group(_COUNTS[str(parts[f"{name}n"])], colour, shape, parts[f"{name}size"] or ""))
    relation = ""
    if len(groups) == 2:
        if "end" in parts:
            relation = _ENDS.get((str(parts["end"]), str(parts["other"])), "")
        elif "far" in parts:
            relation = INVERSE[_PLACES[str(parts["far"])]]
        else:
            relation = _PLACES[str(parts["place"])]
        if not relation:
            return None
    return Spec(tuple(groups), relation, background, pattern)
