"""A scene's specification in words: many ways to describe the same image."""

from dataclasses import dataclass
from random import Random
from typing import TypeVar

from pixelgrow.data.scenes.vocabulary import INVERSE

T = TypeVar("T")
NUMBERS = ("no", "one", "two", "three", "four", "five")
PLURAL = {"cross": "crosses"}


@dataclass(frozen=True)
class Group:
    """`count` objects alike: colour and shape from the vocabulary, size "" or "small" or "large"."""

    count: int
    colour: str
    shape: str
    size: str = ""


@dataclass(frozen=True)
class Spec:
    """What an image shows: one group, or two (the first is `relation` the second), and the background."""

    groups: tuple[Group, ...]
    relation: str  # "" for one group
    background: str
    pattern: str = "plain"

    def canonical(self) -> str:
        """The composition: groups and relation, without sizes and background; the same for inverse wordings."""
        groups, relation = self.groups, self.relation
        if relation in ("below", "right of"):
            groups, relation = groups[::-1], INVERSE[relation]
        return f" {relation} ".join(f"{g.count} {g.colour} {g.shape}" for g in groups)


def pick(rng: Random, options: "tuple[T, ...] | list[T]") -> T:
    """One of the options, uniformly; spends exactly one `rng.random()`."""
    return options[int(rng.random() * len(options))]


def noun(shape: str, count: int) -> str:
    """The shape's name, plural unless `count` is 1."""
    return shape if count == 1 else PLURAL.get(shape, shape + "s")


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def phrase(group: Group, rng: Random) -> str:
    """A noun phrase: "two small blue stars", "a circle in red", "a pair of green rings"."""
    name = noun(group.shape, group.count)
    trailing = rng.random() < 0.1
    words = f"{group.size} {name} in {group.colour}" if trailing else f"{group.size} {group.colour} {name}"
    words = words.strip()
    u = rng.random()
    if group.count == 1:
        return _article(words) if u < 0.75 else f"one {words}" if u < 0.9 else f"a single {words}"
    if group.count == 2 and u < 0.12:
        return f"a pair of {words}"
    return f"{NUMBERS[group.count]} {words}"


def _related(spec: Spec, rng: Random) -> str:
    first, second = (phrase(g, rng) for g in spec.groups)
    relation = spec.relation
    them = "it" if spec.groups[0].count == 1 else "them"
    u = rng.random()
    if u < 0.15:  # both places named
        places = {
            "above": ("at the top", "at the bottom"),
            "below": ("at the bottom", "at the top"),
            "left of": ("on the left", "on the right"),
            "right of": ("on the right", "on the left"),
        }[relation]
        return f"{first} {places[0]} and {second} {places[1]}"
    if u < 0.3:  # the other way round, same order of mention
        far = {
            "above": ("below {}", "underneath {}"),
            "below": ("above {}",),
            "left of": ("to the right of {}", "on the right of {}"),
            "right of": ("to the left of {}", "on the left of {}"),
        }[relation]
        return f"{first} with {second} {pick(rng, far).format(them)}"
    words = {
        "above": ("above", "above", "above", "over"),
        "below": ("below", "below", "below", "under"),
        "left of": ("to the left of", "to the left of", "left of"),
        "right of": ("to the right of", "to the right of", "right of"),
    }[relation]
    if u < 0.4:
        verb = "is" if spec.groups[0].count == 1 else "are"
        return f"{first} {verb} {pick(rng, words)} {second}"
    return f"{first} {pick(rng, words)} {second}"


def caption(spec: Spec, rng: Random) -> str:
    """One English phrase that says everything in `spec`; it may leave out a plain white background."""
    words = _related(spec, rng) if spec.relation else phrase(spec.groups[0], rng)
    if rng.random() < 0.15 and " is " not in words and " are " not in words:
        words = pick(rng, ("a picture of ", "an image of ", "a drawing of ")) + words
    silent = spec.background == "white" and spec.pattern == "plain" and rng.random() < 0.8
    u = rng.random()
    if silent:
        return words
    colour = spec.background
    where = pick(
        rng,
        {
            "plain": (colour, colour, colour, f"plain {colour}"),
            "striped": (f"striped {colour}", f"{colour} striped"),
            "checked": (f"checked {colour}", f"{colour} checkered"),
            "dotted": (f"dotted {colour}", f"{colour} dotted"),
        }[spec.pattern],
    )
    where = _article(where) + " background"
    if u < 0.12:
        return f"on {where}, {words}"
    return f"{words} against {where}" if u < 0.25 else f"{words} on {where}"
