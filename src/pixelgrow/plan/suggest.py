"""A recipe that fits images and a machine: the model's size, its stages, their lengths. The rules of thumb are ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pixelgrow.data.sources.base import Source, large_enough
from pixelgrow.plan.machine import Machine
from pixelgrow.plan.network import Cost
from pixelgrow.plan.recipe import plan_recipe
from pixelgrow.recipe.read import read_recipe

PATIENCE = 12 * 3600  # seconds that a run may take, by its plan
SHARE = 0.7  # of the memory that a step may take: the rest is for data, sample grids and other programs
CORES = (32, 64)  # resolutions of a core, of the smallest size and of the others
STRIDE, SMALLEST, LARGEST = 4, 16, 1024  # of smaller images the core has a multiple of STRIDE, SMALLEST at least
MANY, SOME = 2_000, 0.25  # a stage needs so many images, or that share of them
SHORTEST, SHORTEST_RUNG = 24_000, 4_000  # images that a core and a growth see at least
CPU_BATCH = 16  # a CPU is as fast with few images at a time as with many
PROMPTS = 64  # of the evaluation
Stages = list[dict[str, Any]]


@dataclass(frozen=True)
class Scale:
    """A size of the ladder for sets of at least `images`, and how to train it on a GPU."""

    size: str
    images: int
    batch: int
    lr: float


SCALES = (
    Scale("large", 2_000_000, 256, 2e-4),
    Scale("base", 100_000, 256, 5e-4),
    Scale("small", 2_000, 64, 1e-3),
    Scale("tiny", 0, 64, 1e-3),
)


@dataclass(frozen=True)
class Wanted:
    """What the data ask for.

    images: how many there are. sides: of stages that enough of them have, from `sides_of`. held: how many are held out.
    text: the recipe's. more: settings of every stage that trains.
    """

    images: int
    sides: tuple[int, ...]
    held: int
    text: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suggestion:
    """Stages as they stand in a recipe; the seconds that each takes by its plan; resolutions that only images have."""

    stages: Stages
    seconds: dict[str, float]
    beyond: tuple[int, ...]


def sides_of(train: Source, held: Source) -> tuple[int, ...]:
    """Resolutions of stages that enough images have: of a core, and its doublings. () if they are too small.

    `train`: what is trained on. `held`: what is held out.
    """

    def enough(side: int) -> bool:
        seen, looked_at = (len(large_enough(source, (side, side))) for source in (train, held))
        return seen >= min(MANY, max(1, SOME * len(train))) and looked_at > 0

    low = next((side for side in range(CORES[0], SMALLEST - 1, -STRIDE) if enough(side)), LARGEST + 1)
    sides = []
    while low <= LARGEST and enough(low):
        sides.append(low)
        low *= 2
    return tuple(sides)


def suggest(wanted: Wanted, machine: Machine) -> Suggestion:
    """The largest model that the number of images deserves and that the machine trains in PATIENCE.

    If the smallest takes longer, it is trained on fewer images, then in fewer stages.
    """
    for scale in SCALES:
        if wanted.images < scale.images:
            continue
        smallest = scale == SCALES[-1]
        sides = wanted.sides if smallest or wanted.sides[:2] != CORES else wanted.sides[1:]
        batch = scale.batch if machine.gpu else CPU_BATCH
        stages = _stages(wanted, scale, batch, sides)
        costs = _costs(stages, wanted, machine)
        batches = _each(stages, "batch")
        if not smallest and not all(_fits(cost, batches[name], machine) for name, cost in costs.items()):
            continue
        for count in range(len(sides), 0 if smallest else len(sides) - 1, -1):
            beyond = tuple(side for side in wanted.sides if side > sides[count - 1])
            share = 1.0
            for _ in range(2 if smallest else 1):  # as long as it should be, then as long as there is time
                stages = _stages(wanted, scale, batch, sides[:count], share)
                seconds = {name: n * costs[name].flops / machine.rate for name, n in _each(stages, "images").items()}
                made = Suggestion(_in_memory(stages, costs, machine), seconds, beyond)
                took = sum(seconds.values())
                if took <= PATIENCE:
                    return made
                share = PATIENCE / took
    return made  # the smallest with one stage: it takes longer than it should


def _stages(wanted: Wanted, scale: Scale, batch: int, sides: tuple[int, ...], share: float = 1.0) -> Stages:
    """A core, a growth for each doubling, and an evaluation.

    The core sees 10,000 sqrt(images) images, times `share`; the first growth an eighth of that, each further one half
    as many: its rung is local, and four times as dear. A growth has a quarter of the core's batch: steps are what
    rungs lack (docs/benchmarks.md). Noise levels scale with the resolution (arXiv 2301.11093). A
    rung meets the lowest level of the whole model once in a hundred images: what it does not meet, it lets pass
    (docs/benchmarks.md).
    """
    low, rungs = sides[0], sides[1:]
    count = _rounded(share * 10_000 * math.sqrt(wanted.images), SHORTEST)
    lowest = 0.03 / 2 ** max(0, len(rungs) - 1)
    shared = {"batch": batch, "lr": scale.lr, **wanted.more}
    core = {"name": "core", "size": scale.size, "resolution": low, "images": count, **shared}
    core["noise"] = {"mean": round(0.2 + math.log(low / CORES[0]), 2), "std": 1.6}
    core |= {"diffusion": {"sigma_min": lowest}, "sampling": {"guidance": 3}}
    stages: Stages = [{"train": core}]
    for number, side in enumerate(rungs):
        mean = -0.6 - number * math.log(2)
        noise = {"mean": round(mean, 2), "std": round((mean - math.log(lowest)) / 2.33, 2)}
        length = {"images": _rounded(count / 8 / 2**number, SHORTEST_RUNG), "batch": max(1, batch // 4)}
        grow = {"name": f"grown{side}", "to": side, **shared, **length}
        stages.append({"grow": grow | {"noise": noise, "sampling": {"guidance": 3}}})
    return [*stages, {"evaluate": {"name": "eval", "prompts": min(PROMPTS, wanted.held)}}]


def _rounded(images: float, least: int) -> int:
    """Rounded down to two digits; `least` at least."""
    unit = 10 ** max(0, int(math.log10(max(images, 1))) - 1)
    return max(least, int(images // unit) * unit)


def _each(stages: Stages, what: str) -> dict[str, int]:
    """A setting of each stage that trains."""
    return {body["name"]: body[what] for stage in stages for body in stage.values() if "images" in body}


def _costs(stages: Stages, wanted: Wanted, machine: Machine) -> dict[str, Cost]:
    """What an image and a step of each stage cost."""
    raw = {"name": "new", "text": wanted.text, "data": {"source": "."}, "stages": stages}
    return {plan.name: plan.cost for plan in plan_recipe(read_recipe(raw, "new"), gpu=machine.bf16)}


def _fits(cost: Cost, micro_batches: int, machine: Machine) -> bool:
    """Whether there is memory for a step whose batch is computed in so many parts, while a state is written."""
    m = cost.memory
    copy = 0 if machine.gpu else m.state  # it is in the CPU's memory
    return m.peak - m.activations * (1 - 1 / micro_batches) + copy <= SHARE * machine.memory


def _in_memory(stages: Stages, costs: Mapping[str, Cost], machine: Machine) -> Stages:
    """The stages, with micro-batches where a whole batch takes too much memory."""
    fitted: Stages = []
    for stage in stages:
        ((verb, body),) = stage.items()
        parts, cost = 1, costs.get(body["name"])
        while cost and parts < body["batch"] and not _fits(cost, parts, machine):
            parts *= 2
        fitted.append({verb: body | ({"accumulate": parts} if parts > 1 else {})})
    return fitted
