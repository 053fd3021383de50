"""What exact growth costs and saves.

    python -m bench.exact --cost                         # a few minutes: full against progressive sampling
    python -m bench.exact --root runs/bench-exact        # about 90 minutes of two cores: trains, then prints the tables

Trained: the core of the shipped `tiny` is grown from 32 to 64 px, frozen, three times a seed on equal images: by plain
`preserve` (`exact: false`), by exact rungs without a gate, and by exact rungs with the default gate. Held-out error by
noise level, the checker's accuracies and the size of details (mean square of x - up(down(x))) of samples of held-out
captions. Exact may be at most 2% worse than plain at any level, its accuracies at most 1.5 points.

Cost: 32 guided steps at full resolution without gates over the same steps by the default (progressive, gated), in
network FLOPs and in wall time of one run: `tiny` from 32 to 64 px and to 256 px, untrained; from 64 to 1024 px FLOPs
alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench.drift import before
from bench.growth_summary import spread
from bench.sampling_overhead import conditions

from pixelgrow import checkpoint
from pixelgrow.data.scenes.questions import KINDS
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.guidance import Guided
from pixelgrow.diffusion.heldout import SIGMAS
from pixelgrow.diffusion.progressive import floors_of, needed_floor
from pixelgrow.diffusion.sampling import karras_grid, sample
from pixelgrow.errors import UserError
from pixelgrow.growth import grown_config, ungrown
from pixelgrow.model import find
from pixelgrow.models.config import NetConfig
from pixelgrow.models.layers import box_down
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.models.uvit import UViT
from pixelgrow.plan.network import spent
from pixelgrow.recipe.read import Recipe, read_recipe
from pixelgrow.run import run
from pixelgrow.training.stopping import Interrupted

REGIMES: dict[str, dict[str, Any]] = {
    "plain": {"exact": False},
    "exact, no gate": {"until": float("inf")},
    "exact": {},
}
WORSE, POINTS, FASTER = 1.02, 1.5, 2.5
CASES = ((32, 64, True), (32, 256, True), (64, 1024, False))
STEPS = 32


def stage_of(regime: str) -> str:
    return regime.replace(", ", "-").replace(" ", "-")


def core(root: Path) -> Path:
    """The core of the shipped `tiny` as a checkpoint of its own."""
    folder = root / "core"
    if not (folder / checkpoint.CONFIG).is_file():
        denoiser, config = checkpoint.load(find("tiny"))
        alone = ungrown(denoiser)
        checkpoint.save(folder, alone, before(config))
    return folder


def recipe(seed: int, args: argparse.Namespace) -> Recipe:
    """Every regime's growth of the core, and its evaluation."""
    stages: list[dict[str, Any]] = []
    for regime, settings in REGIMES.items():
        name = stage_of(regime)
        stages.append(
            {
                "grow": {
                    "name": name, "from": f"{core(args.root)}/", "to": 64, "core": "frozen", "images": args.images,
                    "batch": 16, "lr": 1e-3, "noise": {"mean": -0.4, "std": 1.2}, "sample_every": 0,
                    "snapshot_every": 0, "validate_every": args.images,
                }
                | settings
            }
        )  # fmt: skip
        stages.append(
            {"evaluate": {"name": f"eval-{name}", "from": name, "prompts": args.prompts, "guidance": 4, "steps": STEPS}}
        )
    return read_recipe(
        {
            "name": f"seed{seed}",
            "seed": seed,
            "text": {"encoder": "minilm", "max_tokens": 32},
            "data": {"source": "scenes", "n": 1_000_000, "captions": 8_000},
            "heldout": {"source": "scenes", "split": "heldout", "n": args.prompts, "captions": args.prompts},
            "stages": stages,
        },
        "bench exact",
    )


def tables(found: list[dict[str, dict[str, Any]]]) -> tuple[str, bool]:
    """Errors, accuracies and details by regime; whether exact is as good as plain."""
    lines = [
        f"Held-out error x 1000 by noise level at the core; mean and deviation of {len(found)} seeds.", "",
        "| growth | " + " | ".join(f"σ {s:g}" for s in SIGMAS) + " |", "|---|" + "---:|" * len(SIGMAS),
    ]  # fmt: skip
    for regime in REGIMES:
        cells = [spread((1e3 * of[regime]["error"][f"{s:g}"] for of in found), 2) for s in SIGMAS]
        lines.append(f"| {regime} | " + " | ".join(cells) + " |")
    lines += ["", "| growth | " + " | ".join(KINDS) + " | all | details x 1000 |", "|---|" + "---:|" * (len(KINDS) + 2)]
    kinds = [*KINDS, "all"]
    for regime in REGIMES:
        cells = [spread((100 * of[regime]["accuracy"][k] for of in found), 1) for k in kinds]
        cells.append(spread((1e3 * of[regime]["details"]["samples"] for of in found), 2))
        lines.append(f"| {regime} | " + " | ".join(cells) + " |")

    def mean(regime: str, part: str, key: str) -> float:
        return statistics.mean(of[regime][part][key] for of in found)

    met = all(mean("exact, no gate", "error", f"{s:g}") <= WORSE * mean("plain", "error", f"{s:g}") for s in SIGMAS)
    met &= all(100 * (mean("plain", "accuracy", k) - mean("exact", "accuracy", k)) <= POINTS for k in kinds)
    return "\n".join(lines), met


# --- cost -------------------------------------------------------------------------------------------------------------


def grown(low: int, to: int, gates: bool) -> NetConfig:
    """`tiny` at `low` px, grown to `to` px by doublings."""
    config = shallow_uvit("tiny", low)
    while config.resolution < to:
        until = None if gates else float("inf")
        config = grown_config(config, 2 * config.resolution, "preserve", until=until)
    return config


@torch.no_grad()
def flops(config: NetConfig) -> float:
    """Network FLOPs of an image in STEPS guided steps: one evaluation counted at each resolution, times its steps."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    denoiser = Denoiser(UViT(config)).eval()
    sigmas = karras_grid(STEPS, denoiser.sigma_min, denoiser.sigma_max).tolist()[:-1]
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = Denoiser(UViT(config)).eval()
        made.gated = False  # fake noise levels open no gate
        x = torch.zeros(1, 3, config.resolution, config.resolution)
        floors = floors_of(Guided(made, conditions(config.core, 1, torch.device("cpu")), guidance=4.0))
        each = [spent(lambda f=floor: f.denoise(box_down(x, f.scale), 1.0)).forward for floor in floors]  # type: ignore[misc]
    return sum(each[needed_floor(floors, sigma)] for sigma in sigmas)


def seconds(config: NetConfig, batch: int, progressive: bool) -> float:
    """Wall time of sampling a batch."""
    denoiser = Denoiser(UViT(config)).eval()
    cond = conditions(config.core, batch, torch.device("cpu"))
    began = time.perf_counter()
    sample(
        denoiser, cond, size=(config.resolution,) * 2, steps=STEPS, guidance=4.0, batch=batch, progressive=progressive
    )
    return time.perf_counter() - began


def cost(args: argparse.Namespace) -> tuple[str, bool]:
    """Full over progressive, by case."""
    lines = [
        "| growth | full, GFLOP an image | progressive | ratio | ratio of wall times |",
        "|---|---:|---:|---:|---:|",
    ]
    met = True
    for low, to, timed in CASES:
        full, gated = grown(low, to, gates=False), grown(low, to, gates=True)
        ratio = flops(full) / flops(gated)
        walls = "by the plan alone"
        if timed:
            batch = max(1, args.batch * 64 // to)
            pairs = [(seconds(full, batch, False), seconds(gated, batch, True)) for _ in range(args.rounds)]
            wall = statistics.median(a / b for a, b in pairs)
            walls = f"{wall:.2f}"
            met &= to != 256 or min(wall, ratio) >= FASTER
        lines.append(
            f"| {low} to {to} px | {flops(full) / 1e9:.1f} | {flops(gated) / 1e9:.1f} | {ratio:.2f} | {walls} |"
        )
    return "\n".join(lines), met


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true", help="the cost of sampling alone")
    parser.add_argument("--root", type=Path, default=Path("runs/bench-exact"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=16_000)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="images at 64 px; fewer above")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        text, met = cost(args)
        print(text, flush=True)
        if not args.cost:
            found = []
            for seed in range(args.seeds):
                made = recipe(seed, args)
                run(made, args.root)
                folder = args.root / made.name
                names = {regime: folder / f"eval-{stage_of(regime)}" / "metrics.json" for regime in REGIMES}
                found.append({r: json.loads(path.read_text(encoding="utf-8")) for r, path in names.items()})
            text, as_good = tables(found)
            print("\n" + text)
            met &= as_good
    except UserError as error:
        sys.exit(f"bench exact: {error}")
    except Interrupted as stopped:
        sys.exit(f"bench exact: {stopped}")
    if not met:
        sys.exit("bench exact: a target is missed")


if __name__ == "__main__":
    main()
