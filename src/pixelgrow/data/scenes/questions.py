"""What a caption claims, as yes/no questions (the form of DSG, Cho et al. 2023)."""

from dataclasses import dataclass

from pixelgrow.data.scenes.captions import NUMBERS, Group, Spec, noun

KINDS = ("background", "colour", "shape", "count", "relation")


@dataclass(frozen=True)
class Question:
    """A yes/no question about an image, and the answer that an image true to its caption gives.

    `args` by kind: background (name), colour (name), shape (colour, shape), count (colour, number), relation
    (colour, "above" | "below" | "left of" | "right of", colour). Objects are distinguished by colour: no two groups of
    a scene share one.
    """

    kind: str
    text: str
    args: tuple[str | int, ...]
    expected: bool = True


def _name(group: Group) -> str:
    return f"{group.colour} {noun(group.shape, group.count)}"


def questions(spec: Spec) -> tuple[Question, ...]:
    """All questions that the checker can answer about a scene; yes to each if the image is true to its caption."""
    asked = [Question("background", f"Is the background {spec.background}?", (spec.background,))]
    for g in spec.groups:
        one = g.count == 1
        asked += [
            Question("colour", f"Is there anything {g.colour}?", (g.colour,)),
            Question(
                "shape",
                f"Is the {g.colour} object a {g.shape}?" if one else f"Are the {g.colour} objects {noun(g.shape, 2)}?",
                (g.colour, g.shape),
            ),
            Question(
                "count",
                f"{'Is' if one else 'Are'} there exactly {NUMBERS[g.count]} {_name(g)}?",
                (g.colour, g.count),
            ),
        ]
    if spec.relation:
        one_, two = spec.groups
        verb, place = ("Is" if one_.count == 1 else "Are"), spec.relation
        place = f"to the {place}" if place.endswith("of") else place
        asked.append(
            Question(
                "relation",
                f"{verb} the {_name(one_)} {place} the {_name(two)}?",
                (one_.colour, spec.relation, two.colour),
            )
        )
    return tuple(asked)
