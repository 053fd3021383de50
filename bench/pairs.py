"""Data-latent pairs: killed at random moments, damaged, of another teacher; and how well the shipped teacher inverts.

    python -m bench.pairs [--kills 10] [--seed 0] [--images 32] [--folder FOLDER]

A small `pairs` stage of the shipped `tiny` is run once undisturbed, and once in processes that are killed with SIGKILL
at random moments until the last is left alone: shards and `pairs.json` must be the same bytes. A shard is cut off: it
must be found, and made again, alone, to the same bytes. A teacher of other weights must be refused, both by the stage
and by the distillation of it. Then the round trip of held-out scenes (40 levels, Heun, no
guidance: 78 evaluations to invert, 79 back): at least 30 dB for the shipped model.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from bench.resume import PRELOADED

from pixelgrow import checkpoint
from pixelgrow.data.loader import take
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.guidance import Guided
from pixelgrow.errors import UserError
from pixelgrow.growth import ungrown
from pixelgrow.model import RECORD, find
from pixelgrow.onestep.pairs import INDEX, Ode, Pairs, psnr, read_shard, shard_path
from pixelgrow.recipe.read import Recipe, read_recipe
from pixelgrow.run import run
from pixelgrow.text.encoders import load_encoder

TEACHER = "tiny"
TARGET = 30.0  # dB
LEVELS = 40  # of the grid: 78 evaluations of Heun's method to invert, 79 back
PARTS = (0.25, 0.5, 0.75, 1.0)  # of the way along it
IMAGES, SHARD = 192, 8  # of the stage: 24 shards
NAME = "pairs"  # of the recipe and of its stage


# --- killed, damaged, refused -----------------------------------------------------------------------------------------


def recipe(teacher: Path, student: Path | None = None) -> Recipe:
    """Pairs of a checkpoint folder in many shards; `student`: a checkpoint to distil with them."""
    stages: list[dict[str, Any]] = [
        {"pairs": {"name": NAME, "from": f"{teacher}/", "n": IMAGES, "batch": SHARD, "shard": SHARD, "steps": 6}}
    ]
    if student is not None:
        stages.append({"distill": {"name": "onestep", "from": f"{student}/", "pairs": NAME, "images": 8, "batch": 8}})
    data = {"source": "scenes", "n": 1000, "captions": 32}
    held = {"source": "scenes", "split": "heldout", "n": 16, "captions": 16}
    return read_recipe({"name": NAME, "data": data, "heldout": held, "stages": stages}, "bench/pairs.py")


def work(teacher: str, root: str) -> None:
    """A process's work: make the pairs in `root`."""
    run(recipe(Path(teacher)), Path(root))


def contents(root: Path) -> dict[str, bytes]:
    """What must be the same: shards and index, by name."""
    folder = root / NAME / NAME
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*")) if p.name == INDEX or p.suffix == ".safetensors"}


def whole(root: Path) -> int:
    """How many shards of a folder are."""
    folder = root / NAME / NAME
    return sum(read_shard(path) is not None for path in folder.glob("[0-9]*.safetensors"))


def undisturbed(context: ForkServerContext, teacher: Path, root: Path) -> float:
    """Seconds that the stage takes where nobody kills it."""
    process = context.Process(target=time.sleep, args=(0,))  # starts the server, and imports
    process.start()
    process.join()
    began = time.monotonic()
    process = context.Process(target=work, args=(str(teacher), str(root)))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"the undisturbed run ended with status {process.exitcode}")
    return time.monotonic() - began


def killed(
    context: ForkServerContext, teacher: Path, root: Path, kills: int, seconds: float, chance: random.Random
) -> list[int]:
    """Kill the stage `kills` times at random moments, then let it finish; the whole shards at each kill.

    A stage that is done before its last kill is begun again, with half as long between kills.
    """
    found: list[int] = []
    while len(found) < kills:
        process = context.Process(target=work, args=(str(teacher), str(root)))
        process.start()
        process.join(chance.uniform(0, 2 * seconds / max(1, kills)))
        if process.is_alive():
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            found.append(whole(root))
            continue
        shutil.rmtree(root)
        found, seconds = [], seconds / 2
    process = context.Process(target=work, args=(str(teacher), str(root)))
    process.start()
    process.join()
    return found


def cut_off(teacher: Path, root: Path, chance: random.Random) -> dict[str, Any]:
    """Cut a shard off anywhere; what reading the pairs says, and whether it alone is made again, to the same bytes."""
    folder, before = root / NAME / NAME, contents(root)
    number = chance.randrange(whole(root))
    path = shard_path(folder, number)
    times = {p: p.stat().st_mtime_ns for p in folder.glob("*.safetensors") if p != path}
    path.write_bytes(before[path.name][: chance.randrange(len(before[path.name]))])
    said = refusal(lambda: Pairs(folder))
    (folder / RECORD).unlink()  # as it says
    run(recipe(teacher), root)
    alone = all(p.stat().st_mtime_ns == then for p, then in times.items())
    return {"shard": number, "found": path.name in said, "same": contents(root) == before, "alone": alone}


def refused(teacher: Path, root: Path) -> dict[str, str]:
    """What is said of a teacher of other weights: by the stage in its place, and by the distillation of it."""
    other = teacher.with_name("other")
    model, config = checkpoint.load(teacher)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    checkpoint.save(other, model, config)
    distilled = refusal(lambda: run(recipe(teacher, other), root))
    original = teacher.rename(teacher.with_name("original"))
    other.rename(teacher)
    remade = refusal(lambda: run(recipe(teacher), root))
    shutil.rmtree(teacher)
    original.rename(teacher)
    return {"stage": remade, "distillation": distilled}


def refusal(attempt: Any) -> str:
    """The one line that an attempt ends with; nothing if it went through."""
    try:
        attempt()
    except UserError as error:
        return str(error)
    return ""


# --- there and back ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def round_trip(denoiser: Denoiser, images: int, levels: int = LEVELS, batch: int = 16) -> dict[str, float]:
    """PSNR in dB of held-out scenes inverted and solved back under their captions, by the noise level that they were
    inverted to; `stored`: from the highest, through the half precision of stored latents."""
    config = checkpoint.read_config(find(TEACHER)).text
    side = (denoiser.resolution, denoiser.resolution)
    some = take(Scenes(n=images, captions=images, split="heldout"), images, side)
    cond = load_encoder(config["encoder"], max_tokens=config["max_tokens"]).encode(list(some.text))
    ode = Ode("heun", levels, denoiser.sigma_min, denoiser.sigma_max)
    found: dict[str, list[float]] = {}
    for start in range(0, images, batch):
        rows = slice(start, min(start + batch, images))
        x, denoise = some.image[rows], Guided(denoiser, cond[rows])
        trips = ode.round_trip(denoise, x, PARTS)
        stored = psnr(ode.to_image(denoise, ode.to_latent(denoise, x).half().float()), x)
        for name, db in (trips | {"stored": stored}).items():
            found.setdefault(name, []).append(len(x) * 10 ** (-db / 10))
    return {name: round(-10 * math.log10(sum(errors) / images), 2) for name, errors in found.items()}


def trips_table(found: dict[str, dict[str, float]], images: int) -> str:
    """The round trips as Markdown; noise levels are those of each model's resolution."""
    lines = [
        f"PSNR in dB of {images} held-out scenes, inverted to a part of the grid and solved back, in all "
        f"{2 * LEVELS - 2} evaluations there and {2 * LEVELS - 1} back (σ: the noise level there).",
        "",
        "| model | " + " | ".join(f"{part:.0%} of the grid" for part in PARTS) + " | through fp16 |",
        "|---|" + "---:|" * (len(PARTS) + 1),
    ]
    for name, of in found.items():
        cells = [f"{db:.1f}" + (f" (σ {level})" if level != "stored" else "") for level, db in of.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=32, help="of the round trip")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if absent")
    args = parser.parse_args(argv)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="pairs-"))
    teacher = folder / "teacher"
    for old in ("teacher", "original", "other", "whole", "cut"):
        shutil.rmtree(folder / old, ignore_errors=True)
    shutil.copytree(find(TEACHER), teacher)
    chance = random.Random(args.seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # what is timed is work, not imports
    seconds = undisturbed(context, teacher, folder / "whole")
    expected = contents(folder / "whole")
    print(json.dumps({"bench": "pairs", "seconds": round(seconds, 1), "files": len(expected)}), flush=True)
    at = killed(context, teacher, folder / "cut", args.kills, seconds, chance)
    same = contents(folder / "cut") == expected
    print(json.dumps({"bench": "pairs", "kills": len(at), "shards_at_kills": at, "same": same}), flush=True)
    cut = cut_off(teacher, folder / "cut", chance)
    print(json.dumps({"bench": "pairs", "cut_off": cut}), flush=True)
    said = refused(teacher, folder / "cut")
    print(json.dumps({"bench": "pairs", "another_teacher": said}), flush=True)
    grown = checkpoint.load(find(TEACHER))[0]
    models = {f"{TEACHER}, {m.resolution} px": m for m in (grown, ungrown(grown))}
    trips = {name: round_trip(model, args.images) for name, model in models.items()}
    print(trips_table(trips, args.images))
    if args.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    worst = min(next(iter(trips.values())).values())
    missed = [
        what
        for what, good in {
            "a stage that was killed ends with other bytes": same,
            "a shard that was cut off is not found, or not made again alone to the same bytes": all(
                v is not False for v in cut.values()
            ),
            "another teacher is not refused": all(said.values()),
            f"the round trip is {worst:g} dB, expected {TARGET:g}": worst >= TARGET,
        }.items()
        if not good
    ]
    if missed:
        sys.exit("bench pairs: " + "; ".join(missed))


if __name__ == "__main__":
    main()
