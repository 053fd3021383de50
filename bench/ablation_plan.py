"""What the ablation trains: recipes by part and seed, with as many images as a budget of FLOPs buys."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cascade import NOISE as CASCADE_NOISE
from bench.cascade import config_above
from bench.growth import NOISE, grow
from bench.growth_plan import REGIMES, TERA

from pixelgrow.models.config import NetConfig
from pixelgrow.models.sizes import SIZES, Size, shallow_uvit
from pixelgrow.plan.network import network_cost
from pixelgrow.plan.recipe import plan_recipe
from pixelgrow.plan.shapes import planned_core
from pixelgrow.recipe.read import read_recipe
from pixelgrow.recipe.stages import GrowStage, Recipe
from pixelgrow.training.settings import TrainSettings

Stage = dict[str, dict[str, Any]]

LOW, TO, TOP = 16, 32, 64  # pixels of the cores, of the grown denoisers, of the grown generators
STRIDE, PATCH = 2, 2  # pixels per token of the cores at LOW; pixels per cell of the top map of what is grown
SIZE = "nano"
WORLD = "simple"  # of the scenes: one that these budgets teach
BATCH = 8
TOKENS = 32
# TFLOP of each training at scale 1.
CORE, WEAK, GROWTH, DISTIL, GENERATOR, SCALING, STRESS = 8.0, 1.0, 3.0, 3.0, 3.0, 2.5, 1.5
PAIRS = 768
BATCHES = (16, 64, 256)  # of the stress test
SHARES = (0.01, 0.1)  # of the pairs; 1 is `rec-adv`
CASCADE = "cascade"
GROWN = tuple(name for name in REGIMES if name not in ("unfreeze-preserve", "finetune-exact"))
FEW = 400  # large images, in the part `few`
SCARCE = ("scratch", "finetune-random", "frozen-random")
STRESSED = ("scratch", "frozen-random")
# Three cores whose ends are alike.
MIDDLE = SIZES[SIZE]
CORES: dict[str, Size] = {
    "core-s": Size(0.4e6, 64, 2, 1, MIDDLE.channels, MIDDLE.text_dim, MIDDLE.mlp_ratio),
    "core-m": MIDDLE,
    "core-l": Size(3e6, 192, 4, 3, MIDDLE.channels, MIDDLE.text_dim, MIDDLE.mlp_ratio),
}
# Of the part `cores`: TFLOP, pixels, pixels per token. Both resolutions have the same tokens.
OWN = {"core": (CORE, LOW, STRIDE), "weak": (WEAK, LOW, STRIDE), "core32": (CORE, TO, STRIDE * TO // LOW)}
DISTANCES = ("fd",)


@dataclass(frozen=True)
class Settings:
    """root: absolute. scale: factor on all budgets and on the number of pairs. prompts: held-out captions of each
    evaluation; steps, guidance: of sampling them with a multi-step model."""

    root: Path
    scale: float = 1.0
    prompts: int = 128
    steps: int = 16
    guidance: float = 2.0
    captions: int = 4000
    encoder: str = "minilm"


@dataclass(frozen=True)
class Work:
    """A training, or a making of pairs, of each seed. flops: of an image, by phase; images likewise."""

    part: str
    name: str
    images: tuple[int, ...]
    flops: tuple[float, ...]

    @property
    def cost(self) -> float:
        return sum(n * f for n, f in zip(self.images, self.flops, strict=True))


def register() -> None:
    """Make the cores of the ablation sizes that recipes can name."""
    SIZES.update(CORES)


# --- the parts' stages; "tflop" stands for images ---------------------------------------------------------------------


def cores(s: Settings) -> list[Stage]:
    """A teacher, a weak one, and one at twice the resolution."""
    made = [
        _train(name, tflop, size=SIZE, resolution=side, stride=stride) for name, (tflop, side, stride) in OWN.items()
    ]
    return made + [_evaluate(name, s, many_steps=True) for name in OWN]


def growth(s: Settings) -> list[Stage]:
    """Every regime's growth of the core; `scratch` gets the core's budget on top."""
    made = []
    for name in GROWN:
        tflop = GROWTH + (CORE if name == "scratch" else 0)
        made.append({"grow": _grow(name) | _settings(tflop) | {"name": name}})
    return made + [_evaluate(name, s, many_steps=True) for name in GROWN]


def few(s: Settings) -> list[Stage]:
    """Growth and `scratch` on FEW large images alone; the core saw all that are small."""
    made = []
    data = [{"source": "scenes", "world": WORLD, "n": FEW, "captions": FEW}]
    for name in SCARCE:
        tflop = GROWTH + (CORE if name == "scratch" else 0)
        made.append({"grow": _grow(name) | _settings(tflop) | {"name": f"{name}-few", "data": data}})
    return made + [_evaluate(stage["grow"]["name"], s, many_steps=True) for stage in made]


def onestep(s: Settings) -> list[Stage]:
    """Losses, teachers, shares of the pairs; base resolutions and steps of growth."""
    n = max(64, round(PAIRS * s.scale / 64) * 64)
    one = {"n": n, "sampler": "dpm++2m", "steps": 16, "batch": 64, "shard": n}
    made: list[Stage] = []
    for name, teacher, direction in (
        ("inverted", "core", "invert"),
        ("sampled", "core", "sample"),
        ("weak-inverted", "weak", "invert"),
        ("weak-sampled", "weak", "sample"),
        ("inverted32", "core32", "invert"),
    ):
        made.append({"pairs": {"name": name, "from": teacher, "direction": direction} | one})
    for name, teacher, pairs, more in (
        ("rec", "core", "inverted", {"losses": {"adversarial": False}}),
        ("rec-adv", "core", "inverted", {}),
        ("dstl", "core", "sampled", {"losses": {"adversarial": False}}),
        ("dstl-adv", "core", "sampled", {}),
        ("weak-rec-adv", "weak", "weak-inverted", {}),
        ("weak-dstl-adv", "weak", "weak-sampled", {}),
        *((f"share-{share:g}", "core", "inverted", {"fraction": share}) for share in SHARES),
        ("base32", "core32", "inverted32", {}),
    ):
        made.append({"distill": {"name": name, "from": teacher, "pairs": pairs} | _settings(DISTIL) | more})
    for name, parent, pairs, to, tflop in (
        ("16-to-64", "rec-adv", "inverted", TOP, GENERATOR),
        ("16-to-32", "rec-adv", "inverted", TO, GENERATOR / 2),
        ("32-to-64", "16-to-32", "inverted", TOP, GENERATOR / 2),
        ("base32-to-64", "base32", "inverted32", TOP, GENERATOR),
    ):
        settings = {"name": name, "from": parent, "pairs": pairs, "to": to, "init": "random"} | _settings(tflop)
        made.append({"grow": settings})
    trained = [settings["name"] for stage in made for verb, settings in stage.items() if verb != "pairs"]
    return made + [_evaluate(name, s) for name in trained]


def scaling(s: Settings) -> list[Stage]:
    """Three cores, on the images of the middle one (`-images`), and on its compute."""
    like = {"resolution": LOW, "stride": STRIDE}
    made = [_train("core-m", SCALING, size="core-m", **like)]
    for name in ("core-s", "core-l"):
        made.append(_train(name, SCALING, size=name, **like))
        made.append(_train(f"{name}-images", None, size=name, **like, images_of="core-m"))
    names = [stage["train"]["name"] for stage in made]
    return made + [_evaluate(name, s, many_steps=True, distance=False) for name in names]


def batches(s: Settings) -> list[Stage]:
    """From nothing and grown, at three batch sizes on equal compute, without clipping; every step is logged."""
    made = []
    for name in STRESSED:
        for batch in BATCHES:
            own = {"name": f"{name}-{batch}", "batch": batch, "clip": 0, "log_every": batch}
            made.append({"grow": _grow(name) | _settings(STRESS) | own | {"max_bad_steps": 10**9}})
    return made + [_evaluate(stage["grow"]["name"], s, many_steps=True, distance=False) for stage in made]


PARTS = {
    "cores": cores,
    "growth": growth,
    "onestep": onestep,
    "scaling": scaling,
    "batches": batches,
    "few": few,
}


def _settings(tflop: float) -> dict[str, Any]:
    return {"tflop": tflop, "batch": BATCH, "lr": 1e-3, "sample_every": 0, "snapshot_every": 0}


def _grow(name: str) -> dict[str, Any]:
    return grow(name, TO, 1) | {"patch": PATCH}


def _train(name: str, tflop: float | None, **more: Any) -> Stage:
    made = _settings(tflop or 0) | {"name": name, "noise": NOISE} | more
    if tflop is None:
        del made["tflop"]
    return {"train": made}


def _evaluate(of: str, s: Settings, *, many_steps: bool = False, distance: bool = True) -> Stage:
    made: dict[str, Any] = {"name": f"eval-{of}", "from": of, "prompts": s.prompts}
    made |= {"steps": s.steps, "guidance": s.guidance} if many_steps else {}
    return {"evaluate": made | ({"metrics": list(DISTANCES)} if distance else {})}


# --- budgets to images ------------------------------------------------------------------------------------------------


def plan_part(part: str, s: Settings) -> list[Work]:
    """What a part trains for each seed, in order."""
    stages = PARTS[part](s)
    known = [] if part == "cores" else cores(s)
    probe = read_recipe(_head("probe", 0, s) | {"stages": [_probed(one) for one in known + stages]}, "bench ablation")
    costs: dict[str, list[float]] = {}
    for found in plan_recipe(probe, gpu=False):
        costs.setdefault(found.name, []).append(found.cost.flops)
    done: dict[str, Work] = {}
    for stage in stages:
        ((verb, given),) = stage.items()
        name = given["name"]
        if verb == "evaluate":
            continue
        flops = tuple(costs[name])
        if verb == "pairs":
            images: tuple[int, ...] = (given["n"],)
        elif "images_of" in given:
            images = done[given["images_of"]].images
        else:
            images = tuple(bought(s.scale * given["tflop"] / len(flops), f, given["batch"]) for f in flops)
        done[name] = Work(part, name, images, flops)
    if part == "growth":
        flop = network_cost(enlarging(s), TrainSettings(images=BATCH, batch=BATCH), tokens=TOKENS).flops
        done[CASCADE] = Work(part, CASCADE, (bought(s.scale * GROWTH, flop, BATCH),), (flop,))
    return list(done.values())


def bought(tflop: float, flops: float, batch: int) -> int:
    """Images of whole batches that a budget buys; one batch at least."""
    return max(1, round(tflop * TERA / flops / batch)) * batch


def enlarging(s: Settings) -> NetConfig:
    """The network of the cascade's second model."""
    low = shallow_uvit(SIZE, LOW, stride=STRIDE, core=planned_core(SIZE, _recipe_head(s).text))
    return config_above(low, TO, PATCH)


def _probed(stage: Stage) -> Stage:
    """A stage with images in the place of its budget."""
    ((verb, given),) = stage.items()
    made = {k: v for k, v in given.items() if k not in ("tflop", "images_of")}
    if verb not in ("pairs", "evaluate"):
        made["images"] = 2 * given["batch"]
        if isinstance(made.get("core"), Mapping):
            made["core"] = {"unfreeze_after": given["batch"]}
    return {verb: made}


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipe(part: str, seed: int, work: list[Work], s: Settings) -> Recipe:
    """The recipe of a part and seed; the models of `cores` are checkpoints of its run."""
    images = {w.name: w.images for w in work}
    return read_recipe(
        _head(f"{part}-seed{seed}", seed, s)
        | {"stages": [_whole(one, part, seed, images, s) for one in PARTS[part](s)]},
        "bench ablation",
    )


def _whole(stage: Stage, part: str, seed: int, images: Mapping[str, tuple[int, ...]], s: Settings) -> Stage:
    ((verb, given),) = stage.items()
    made = {k: v for k, v in given.items() if k not in ("tflop", "images_of")}
    if part != "cores" and made.get("from") in OWN:
        made["from"] = core_folder(made["from"], seed, s)
    if verb in ("train", "grow", "distill"):
        of = images[given["name"]]
        made |= {"images": sum(of), "validate_every": max(given["batch"], sum(of) // 5)}
        if isinstance(made.get("core"), Mapping):
            made["core"] = {"unfreeze_after": of[0]}
    return {verb: made}


def core_folder(name: str, seed: int, s: Settings) -> str:
    """Where the part `cores` puts a model, as a `from` names it."""
    return f"{s.root / f'cores-seed{seed}' / name / 'checkpoint'}{os.sep}"


def cascade_stage(like: Recipe, images: int) -> GrowStage:
    """The settings that the cascade's second model trains with: those of `scratch`, other images and noise."""
    stage = like.stage("scratch")
    assert isinstance(stage, GrowStage)
    changed = {"name": CASCADE, "images": images, "noise": CASCADE_NOISE, "warmup": None, "validate_every": 0}
    given = stage.model_dump(exclude_unset=True, by_alias=True) | changed
    return GrowStage.model_validate(given)


def _recipe_head(s: Settings) -> Recipe:
    return read_recipe(_head("head", 0, s) | {"stages": [_probed(cores(s)[0])]}, "bench ablation")


def _head(name: str, seed: int, s: Settings) -> dict[str, Any]:
    scenes = {"source": "scenes", "world": WORLD}
    return {
        "name": name,
        "seed": seed,
        "text": {"encoder": s.encoder, "max_tokens": TOKENS},
        "data": scenes | {"n": 1_000_000, "captions": s.captions},
        "heldout": scenes | {"split": "heldout", "n": s.prompts, "captions": s.prompts},
    }


def describe(works: list[Work], seeds: int) -> str:
    """The plan as Markdown."""
    lines = ["| part | run | images | GFLOP an image | TFLOP |", "|---|---|---:|---:|---:|"]
    for w in works:
        images, flops = " + ".join(f"{n:,}" for n in w.images), " + ".join(f"{f / 1e9:.2f}" for f in w.flops)
        lines.append(f"| {w.part} | {w.name} | {images} | {flops} | {w.cost / TERA:.2f} |")
    parts = {part: sum(w.cost for w in works if w.part == part) / TERA for part in dict.fromkeys(w.part for w in works)}
    each = ", ".join(f"{part} {tera:.0f}" for part, tera in parts.items())
    lines += ["", f"Training, TFLOP a seed: {each}; {seeds} seeds: {seeds * sum(parts.values()):.0f} TFLOP"]
    return "\n".join(lines)
