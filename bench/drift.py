"""Does a generator that grows keep its picture? Growth by 4 with and without reconstruction (PaGoDA, Fig. 3).

    python -m bench.drift [--growth exact] [--images 800] [--folder FOLDER]    # about eight minutes

The 32 px generator inside the shipped `tiny-onestep` grows to 128 px by decoder halves, its base frozen, once with
reconstruction and the adversarial loss in adaptive balance and once with the adversarial loss alone, of weight 1, on
the same pairs of the shipped core. Drift is the PSNR of box_down(G_high(z)) against G_low(z), on 64 prior samples. The
claim, and the exit status: by exact rungs at least 100 dB in both, which is rounding; by plain `preserve` or `random`,
with reconstruction at least 25 dB, and at least 5 dB more than without; and every tensor of the base as it was, to the
bit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from pixelgrow import checkpoint
from pixelgrow.diffusion.generator import Generator
from pixelgrow.growth import ungrown
from pixelgrow.model import find
from pixelgrow.recipe.read import Recipe, read_recipe
from pixelgrow.run import run

TEACHER, STUDENT = "tiny", "tiny-onestep"
FACTOR = 4
EXACT, ENOUGH, APART = 100.0, 25.0, 5.0  # dB
GROWTHS: dict[str, dict[str, Any]] = {"exact": {}, "plain": {"exact": False}, "random": {"init": "random"}}
REGIMES: dict[str, dict[str, Any]] = {  # reconstruction, and the adversarial loss weighed against it or alone
    "with": {"balance": "adaptive"},
    "without": {"features": 0, "pixels": 0, "balance": "fixed"},
}


def recipe(folder: Path, side: int, growth: str, images: int) -> Recipe:
    """Pairs of the core, and a growth of the generator in each regime."""
    often = {"validate_every": images // 4, "sample_every": images, "snapshot_every": 0}
    grow = {"from": f"{folder}/student", "pairs": "pairs", "to": FACTOR * side, "images": images}
    grow |= GROWTHS[growth]
    stages: list[dict[str, Any]] = [
        {"pairs": {"name": "pairs", "from": f"{folder}/teacher", "n": 256, "sampler": "dpm++2m", "steps": 16}}
    ]
    for name, losses in REGIMES.items():
        stages.append({"grow": {"name": name, "batch": 8, "losses": losses} | grow | often})
    data = {"source": "scenes", "n": 100_000, "captions": 2_000}
    held = {"source": "scenes", "split": "heldout", "n": 64, "captions": 64}
    return read_recipe({"name": "drift", "data": data, "heldout": held, "stages": stages}, "bench/drift.py")


def before(config: checkpoint.CheckpointConfig) -> checkpoint.CheckpointConfig:
    """The configuration of what grew; if the grown model was cast, of what grew, cast."""
    at = next(i for i, entry in enumerate(config.lineage) if entry["verb"] == "grow")
    casts = [e | {"parent": config.lineage[at]["parent"]} for e in config.lineage[at + 1 :] if e["verb"] == "cast"]
    return config.model_copy(update={"lineage": [*config.lineage[:at], *casts], "sampling": {}})


def bases(folder: Path) -> int:
    """Write the shipped models as they were before their last growth, `teacher` and `student`; the side of both."""
    teacher, config = checkpoint.load(find(TEACHER))
    checkpoint.save(folder / "teacher", ungrown(teacher), before(config))
    grown, config = checkpoint.load_generator(find(STUDENT))
    student = Generator(ungrown(grown.denoiser).net, grown.config)
    checkpoint.save(folder / "student", student, before(config))
    return student.resolution


def drifts(stage: Path) -> dict[int, float]:
    """Drift in dB by images of training."""
    lines = [json.loads(line) for line in (stage / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    key = "validation/drift_psnr"
    return {line["images"]: round(line[key], 2) for line in lines if line.get(key) is not None}


def frozen(stage: Path, student: Path) -> bool:
    """Whether a grown generator's base is the student, to the bit."""
    old = checkpoint.load_generator(student)[0].net.state_dict()
    new = checkpoint.load_generator(stage / "checkpoint")[0].net.state_dict()
    return all(torch.equal(new[name], tensor) for name, tensor in old.items())


def misses(growth: str, drift: dict[str, float], same: bool) -> list[str]:
    """What a growth falls short of; `drift`: by regime, in dB; `same`: whether the base is."""
    least = EXACT if growth == "exact" else ENOUGH
    found = {f"with reconstruction {drift['with']:g} dB, expected {least:g}": drift["with"] >= least}
    if growth == "exact":
        found[f"without it {drift['without']:g} dB, expected {least:g}"] = drift["without"] >= least
    else:
        apart = drift["with"] - drift["without"]
        found[f"without it {drift['without']:g} dB, expected {APART:g} less"] = apart >= APART
    found["a tensor of the base has changed"] = same
    return [what for what, good in found.items() if not good]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", choices=GROWTHS, default="exact", help="random: the paper's")
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--folder", type=Path, help="where to work, kept; a temporary folder if absent")
    args = parser.parse_args(argv)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="drift-"))
    side = bases(folder)
    run(recipe(folder.absolute(), side, args.growth, args.images), folder)
    found = {name: drifts(folder / "drift" / name) for name in REGIMES}
    same = all(frozen(folder / "drift" / name, folder / "student") for name in REGIMES)
    last = {name: list(found[name].values())[-1] for name in REGIMES}
    facts = {"growth": args.growth, "pixels": [side, FACTOR * side], "images": args.images, "frozen": same}
    print(json.dumps({"bench": "drift"} | facts | {"drift": found}))
    if args.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    if missed := misses(args.growth, last, same):
        sys.exit("; ".join(missed))


if __name__ == "__main__":
    main()
