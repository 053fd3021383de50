"""The papers' comparisons on scenes, each at equal training compute: growth, losses, base resolutions, cores, batches.

    make ablation                                             # all of it: about two hours of two cores
    python -m bench.ablation --dry-run                        # what would be trained (a minute)
    python -m bench.ablation --root runs/ablation --scale 0.25 --only cores growth

Simple scenes, the size `nano` and batches of 8: what these budgets can teach, so that runs differ by more than chance.

Parts, for each seed:
- cores: what the others start from: a 16 px core, one that was trained an eighth as long, one at 32 px
- growth: the core grown to 32 px from nothing, fine-tuned, frozen, unfrozen, by plain and exact `preserve`; a cascade
- onestep: the core distilled with and without adversarial loss, on inverted (`rec`) and sampled (`dstl`) pairs, of a
  weak teacher, on a share of the pairs; grown to 64 px at once, in two doublings, and from a base at 32 px
- scaling: three cores, on equal images and on equal compute
- batches: `scratch` and the grown core at batches of 16 to 256, without clipping of gradients: spikes are counted
- few: `scratch` and growth on 400 large images alone, where the core saw all that are small
- decode: once: growth blocks against the decoder of an autoencoder of Stable Diffusion's shape (bench.onestep)

Equal compute: equal FLOPs of training, as the planner counts them; `scratch` gets the core's on top. Everything is
judged on the same held-out captions by the checker, and by the Frechet distance of EfficientNet-Lite0's features.

Run the same command again to go on where it was cut off. With --processes 2, two processes of one thread each work on
parts and seeds. Every call ends by writing ablation.md, ablation.json and the figures of what is there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.ablation_plan import (
    CASCADE,
    PARTS,
    Settings,
    Work,
    cascade_stage,
    core_folder,
    describe,
    enlarging,
    plan_part,
    recipe,
    register,
)
from bench.ablation_summary import summarize
from bench.cascade import run_cascade
from bench.growth import share_text

from bench import onestep
from pixelgrow.errors import UserError
from pixelgrow.recipe.stages import EvaluateStage
from pixelgrow.run import locked, run
from pixelgrow.stages.materials import Materials
from pixelgrow.training.stopping import Interrupted
from pixelgrow.writing import read_json, write_json

DECODE = "decode"
PLAN = "plan-{}.json"
SIDES = (64, 128, 256, 512)  # at which decoding is timed


def execute(part: str, seed: int, works: list[Work], settings: Settings) -> None:
    """Run what is missing of a part and seed."""
    made = recipe(part, seed, works, settings)
    share_text(settings.root, made.name)
    run(made, settings.root)
    if part != "growth":
        return
    folder = settings.root / made.name
    asked = EvaluateStage.model_validate(
        made.stage("eval-scratch").model_dump(exclude_unset=True, by_alias=True)
        | {"name": f"eval-{CASCADE}", "from": CASCADE}
    )
    if not (folder / asked.name / "metrics.json").is_file():
        (images,) = next(work for work in works if work.name == CASCADE).images
        training = cascade_stage(made, images)
        with locked(folder):
            core = core_folder("core", seed, settings)
            run_cascade(training, asked, core, enlarging(settings), Materials(made, folder))


def decode(root: Path, memory: float) -> None:
    """Time decoding; once for all seeds."""
    path = root / f"{DECODE}.json"
    if not path.is_file():
        costs = onestep.by_resolution(["tiny"], SIDES, rounds=3, memory=memory, longest=60)
        write_json(path, {name: {side: vars(cost) for side, cost in of.items()} for name, of in costs.items()})


def planned(parts: Sequence[str], settings: Settings) -> dict[str, list[Work]]:
    """What the parts train; from the root, if they were planned there before."""
    found = {}
    for part in parts:
        kept = read_json(settings.root / PLAN.format(part))
        if kept is None:
            found[part] = plan_part(part, settings)
        else:
            found[part] = [Work(w["part"], w["name"], tuple(w["images"]), tuple(w["flops"])) for w in kept["works"]]
    return found


def in_processes(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Run each part and seed in a process of one thread, `args.processes` at a time; `cores` before all others.

    Raises UserError if one fails, after all others ended; SystemExit ends them all."""
    command = [sys.executable, "-m", "bench.ablation", *argv, "--processes", "1"]
    running: set[subprocess.Popen[bytes]] = set()

    def work(job: tuple[str, int]) -> str:
        part, seed = job
        process = subprocess.Popen(
            [*command, "--only", part, "--seeds", str(seed)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        running.add(process)
        status = process.wait()
        running.discard(process)
        return f"{part} of seed {seed}" if status else ""

    parts = [part for part in args.only if part != DECODE]
    for some in ([p for p in parts if p == "cores"], [p for p in parts if p != "cores"]):
        pool = ThreadPoolExecutor(args.processes)
        try:
            failed = [what for what in pool.map(work, [(part, seed) for part in some for seed in args.seeds]) if what]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise
        if failed:
            raise UserError(f"{', '.join(failed)} failed, see above: run the same command again to go on")


def check_settings(settings: Settings) -> None:
    """Raise UserError if the root was made with other settings; else remember them."""
    path = settings.root / "settings.json"
    now = json.loads(json.dumps({k: v for k, v in vars(settings).items() if k != "root"}))
    was = read_json(path)
    if was is None:
        write_json(path, now)
    elif was != now:
        odd = next(k for k in now if was.get(k) != now[k])
        raise UserError(f"{settings.root} was begun with --{odd} {was.get(odd)}, got {now[odd]}: name another --root")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*PARTS, DECODE]
    made.add_argument("--dry-run", action="store_true", help="print the plan, touch nothing")
    made.add_argument("--summary", action="store_true", help="train nothing, summarize what is there")
    made.add_argument("--root", type=Path, default=Path("runs/ablation"))
    made.add_argument("--figures", type=Path, help="where the figures go; the root if left out")
    made.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    made.add_argument("--scale", type=float, default=Settings.scale, help="factor on all budgets")
    made.add_argument("--prompts", type=int, default=Settings.prompts, help="held-out captions of each evaluation")
    made.add_argument("--captions", type=int, default=Settings.captions, help="distinct training captions")
    made.add_argument("--encoder", default=Settings.encoder)
    made.add_argument("--processes", type=int, default=1, help="parts and seeds that are run at a time")
    made.add_argument("--memory", type=float, default=8.0, help="GiB that timing a decoder may take")
    return made


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    register()
    root = args.root.absolute()
    settings = Settings(root, scale=args.scale, prompts=args.prompts, captions=args.captions, encoder=args.encoder)
    try:
        if not args.summary:
            plan = planned([part for part in PARTS if part in args.only], settings)
            print(describe([work for works in plan.values() for work in works], len(args.seeds)), flush=True)
            if args.dry_run:
                return
            check_settings(settings)
            for part, works in plan.items():
                write_json(root / PLAN.format(part), {"works": [vars(work) for work in works]})
            if args.processes > 1:
                in_processes(args, sys.argv[1:] if argv is None else argv)
            else:
                for part, works in plan.items():
                    for seed in args.seeds:
                        execute(part, seed, works, settings)
            if DECODE in args.only:
                decode(root, args.memory)
        text, files = summarize(root, args.figures or root)
        print("\n" + text)
        print("\nOpen " + ", ".join(map(str, files)))
    except UserError as error:
        sys.exit(f"bench ablation: {error}")
    except Interrupted as stopped:
        print(f"bench ablation: {stopped}", file=sys.stderr)
        sys.exit(stopped.status)


if __name__ == "__main__":
    main()
