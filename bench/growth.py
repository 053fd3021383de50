"""Ways to a 64 px model at equal training compute: from nothing, and grown from a core by `random` or `preserve`.

    python -m bench.growth --dry-run                     # what would be trained, and how long it takes
    python -m bench.growth --root runs/bench-growth --figures docs/figures

Each seed trains one core; each regime grows it on a budget of FLOPs of its own, the same for all; `scratch`, which has
the shape of `random` and loads nothing, gets the core's budget on top. FLOPs are those of matrix products, convolutions
and attention as training does them: what is frozen is evaluated and, where the gradient must pass through it
(`random`), differentiated by its input, never by its weights. `unfreeze` frees the core at half of its budget: one run
with one learning-rate schedule, as the paper's (arXiv 2405.16759). The paper does not say how the core starts to train;
ours: with an empty optimizer state and no warm-up of its own.

"Held-out error" is the mean over the noise levels of `pixelgrow.diffusion.heldout.SIGMAS` of the squared error of the
denoised image, on images whose captions are held out, with the averaged weights; measured along the way. At the end
held-out captions are drawn and looked at by the checker.

A seed is a recipe run by `pixelgrow.run`, one stage a regime: run the same command again to go on where it was cut off.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from bench.growth_plan import DEFAULT, PATCH, REGIMES, Plan, describe, make_plan
from bench.growth_summary import summarize

from pixelgrow.data.scenes.source import WORLDS
from pixelgrow.errors import UserError
from pixelgrow.recipe.read import read_recipe
from pixelgrow.recipe.stages import Recipe
from pixelgrow.run import run
from pixelgrow.training.stopping import Interrupted

# The shipped recipe's: what learns to draw from nothing is trained at every level that the error is measured at; what
# `preserve` puts on a finished core, at those where details are decided.
NOISE = {"mean": 0.8, "std": 1.8}
DETAILS = {"mean": -0.4, "std": 1.2}


def grow(name: str, to: int, frozen: int) -> dict[str, Any]:
    """The settings by which a regime grows the stage `core`. frozen: images after which `unfreeze` frees it."""
    init, core, exact = REGIMES[name]
    how = {"unfreeze_after": frozen} if core == "unfreeze" else core
    made: dict[str, Any] = {"name": name, "from": "core", "to": to, "init": init, "core": how, "patch": PATCH}
    made["noise"] = DETAILS if init == "preserve" else NOISE
    return made | ({"exact": exact} if init == "preserve" else {})


def recipe(seed: int, plan: Plan, args: argparse.Namespace) -> Recipe:
    """A core and every regime's growth of it."""

    def settings(images: int, noise: dict[str, float]) -> dict[str, Any]:
        every = {"validate_every": max(args.batch, images // args.evaluations), "sample_every": 0, "snapshot_every": 0}
        return {"images": images, "batch": args.batch, "lr": args.lr, "noise": noise} | every

    core = {"name": "core", "size": args.size, "resolution": args.low, "stride": args.stride}
    stages: list[dict[str, Any]] = [{"train": core | settings(plan.core.images, NOISE)}]
    for name, phases in plan.regimes.items():
        made = grow(name, args.to, phases[0].images)
        stages.append({"grow": made | settings(sum(p.images for p in phases), made["noise"])})
    return read_recipe(_head(f"seed{seed}", seed, plan, args.heldout, args) | {"stages": stages}, "bench growth")


def questions(seed: int, plan: Plan, args: argparse.Namespace) -> Recipe:
    """What the checker is asked of each regime's model, on more held-out captions than the error is measured on."""
    stages = [
        {
            "evaluate": {
                "name": name,
                "from": f"{args.root / f'seed{seed}' / name / 'checkpoint'}{os.sep}",
                "prompts": args.prompts,
                "steps": args.steps,
                "guidance": args.guidance,
            }
        }
        for name in plan.regimes
    ]
    head = _head(f"seed{seed}-checker", seed, plan, args.prompts, args)
    return read_recipe(head | {"stages": stages}, "bench growth")


def _head(name: str, seed: int, plan: Plan, heldout: int, args: argparse.Namespace) -> dict[str, Any]:
    """A recipe but for its stages; as many pictures as the longest run sees, so that none of them comes twice."""
    longest = max(sum(p.images for p in phases) for phases in ((plan.core,), *plan.regimes.values()))
    scenes = {"source": "scenes", "world": args.world}
    return {
        "name": name,
        "seed": seed,
        "text": {"encoder": args.encoder},
        "data": scenes | {"n": max(longest, args.captions), "captions": args.captions},
        "heldout": scenes | {"split": "heldout", "n": heldout, "captions": heldout},
    }


def share_text(root: Path, name: str) -> None:
    """Let a recipe's run use the text cache of all."""
    (root / "text").mkdir(parents=True, exist_ok=True)
    (root / name).mkdir(exist_ok=True)
    link = root / name / "text"
    if not link.exists():
        link.symlink_to(Path("..") / "text")


def execute(plan: Plan, args: argparse.Namespace) -> None:
    """Run what is missing, one run at a time."""
    for seed in range(args.seeds):
        for make in (recipe, questions):
            made = make(seed, plan, args)
            share_text(args.root, made.name)
            run(made, args.root)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dry-run", action="store_true", help="print the plan, touch nothing")
    made.add_argument("--summary", action="store_true", help="train nothing, summarize what is there")
    made.add_argument("--root", type=Path, default=Path("runs/bench-growth"))
    made.add_argument("--figures", type=Path, default=Path("docs/figures"))
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=DEFAULT, metavar="REGIME")
    made.add_argument("--budget", type=float, default=1.0, help="factor on both budgets below")
    made.add_argument("--core", type=float, default=4.0, help="TFLOP of a core's training")
    made.add_argument("--growth", type=float, default=10.0, help="TFLOP of a growth's training")
    made.add_argument("--size", default="tiny")
    made.add_argument("--low", type=int, default=16, help="pixels of the core")
    made.add_argument("--stride", type=int, default=4, help="pixels per token of the core")
    made.add_argument("--to", type=int, default=64, help="pixels of the grown models")
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--world", choices=WORLDS, default="full", help="of the scenes")
    made.add_argument("--captions", type=int, default=4000, help="distinct training captions")
    made.add_argument("--encoder", default="minilm")
    made.add_argument("--heldout", type=int, default=32, help="images that the error is measured on, 64 at most")
    made.add_argument("--evaluations", type=int, default=10, help="of the error, evenly along each run")
    made.add_argument("--prompts", type=int, default=64, help="held-out captions for the checker")
    made.add_argument("--steps", type=int, default=12, help="of sampling them")
    made.add_argument("--guidance", type=float, default=2.0)
    made.add_argument("--rate", type=float, default=90.0, help="GFLOP/s that training achieves, to tell the time")
    return made


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    try:
        plan = make_plan(args)
        print(describe(plan, args), flush=True)
        if args.dry_run:
            return
        if not args.summary:
            execute(plan, args)
        text, met = summarize(plan, args.root, args.seeds, args.figures)
        print("\n" + text)
        if not met:
            sys.exit("bench growth: a target is missed")
    except UserError as error:
        sys.exit(f"bench growth: {error}")
    except Interrupted as stopped:
        print(f"bench growth: {stopped}", file=sys.stderr)
        sys.exit(stopped.status)


if __name__ == "__main__":
    main()
