"""The command line: verbs, options, and every user's mistake in one line. Slow imports wait inside the verbs."""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from pixelgrow.cli.data import data
from pixelgrow.cli.edit import edit
from pixelgrow.cli.streams import Unwritable, discard_output, secure_streams
from pixelgrow.cli.usage import in_one_line, is_usage_error
from pixelgrow.errors import UserError, out_of_memory

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(data, name="data")
app.add_typer(edit, name="edit")

Set = Annotated[list[str] | None, typer.Option("--set", help="a.b=value, such as stages.core.images=1000; repeatable.")]
Runs = Annotated[Path, typer.Option("--runs", help="The folder of all runs.")]
Rate = Annotated[float | None, typer.Option("--rate", min=1, help="FLOP/s that training achieves; else measured here.")]
Checkpoint = Annotated[str, typer.Argument(help="A folder of a checkpoint or stage, a built-in model, a hub name.")]
Recipe = Annotated[str, typer.Argument(help="A recipe's file, or the name of one that the package carries.")]


PICTURES = Path("samples.png")
# What to do when memory runs out, by verb; `run` says it by stage.
LESS_MEMORY = {
    "sample": "run it again with a smaller --batch, or a smaller --size",
    "edit": "crop the picture to the model's square (--fit), or edit with a smaller model",
    "grow": "grow it by a recipe's grow stage, with a smaller batch:",
    "recaption": "run the same command again with a smaller --batch: it goes on from what was saved",
}
MORE_MEMORY = "use a machine with more memory, or end other programs"
GO_ON = "run the same command again to go on"


@app.callback()
def _about() -> None:
    """Grow a pixel-space image generator from a small one."""


@app.command()
def demo(settings: Set = None, runs: Runs = Path("runs")) -> None:
    """Train a core, grow it, distil it to one step, and write a report: under twenty minutes on two CPU cores."""
    _run("demo", settings, runs)


@app.command()
def run(
    recipe: Recipe,
    settings: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done; touch nothing.")] = False,
    rate: Rate = None,
    runs: Runs = Path("runs"),
) -> None:
    """Run a recipe: do what is missing, go on with what was cut off."""
    if dry_run:
        _plan_recipe(recipe, settings, rate, runs, look=True)
    else:
        _run(recipe, settings, runs)


def _run(recipe: str, settings: list[str] | None, runs: Path) -> None:
    from pixelgrow.recipe.read import load_recipe

    read = load_recipe(recipe, settings or [])
    from pixelgrow.run import run as run_recipe
    from pixelgrow.training.cpu import tune_allocator

    tune_allocator()
    report = run_recipe(read, runs)
    typer.echo(f"report: {report}")


@app.command()
def sample(
    checkpoint: Checkpoint,
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw.")] = None,
    file: Annotated[Path | None, typer.Option("--prompts", help="More prompts, one a line.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="A PNG (a grid), or a folder (single files).")] = PICTURES,
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Images of each prompt: 1; with --preview and --pick 64.")
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Numbered thumbnails by the core alone: what the images average down to.")
    ] = False,
    pick: Annotated[str | None, typer.Option("--pick", help="Numbers of a preview to sample large: 3,17.")] = None,
    best_of: Annotated[
        int | None, typer.Option("--best-of", min=1, help="Let a --judge choose among so many thumbnails.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="checker, a CLIP's folder or hub name, or MODULE:FUNCTION.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Picture i of a call is a function of the seed and i.")] = 0,
    steps: Annotated[int | None, typer.Option("--steps", min=1)] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", min=0, help="1: none.")] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="dpm++2m, heun, ddim or ddpm.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="HxW in pixels, such as 64x96.")] = None,
    grid: Annotated[bool | None, typer.Option("--grid/--single", help="One grid, or a file for each picture.")] = None,
    threshold: Annotated[float | None, typer.Option("--threshold", help="Dynamic thresholding's percentile.")] = None,
    guide: Annotated[
        str | None,
        typer.Option("--guide", help="A weaker checkpoint to be guided by; base: this one ungrown."),
    ] = None,
    interval: Annotated[
        tuple[float, float] | None, typer.Option("--interval", help="Guide between two noise levels alone: LO HI.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", help="Noise levels: karras, or native, as dense as training was.")
    ] = None,
    guide_details: Annotated[
        bool | None, typer.Option("--guide-details/--guide-core", help="Guide the whole image, or the core alone.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1)] = 64,
) -> None:
    """Sample images from prompts; the settings are in the PNGs' metadata."""
    from pixelgrow.cli.sample import Request, sample_images

    request = Request(
        checkpoint=checkpoint, prompts=list(prompts or []), file=file, out=out, n=n, seed=seed, size=size, grid=grid,
        guide=guide, batch=batch, preview=preview, pick=pick, best_of=best_of, judge=judge,
        settings={
            "steps": steps, "guidance": guidance, "sampler": sampler, "threshold": threshold, "interval": interval,
            "grid": schedule, "guide_details": guide_details,
        },
    )  # fmt: skip
    for path in sample_images(request):
        typer.echo(path)


@app.command()
def grow(
    checkpoint: Annotated[str, typer.Argument(help="What to grow.")],
    to: Annotated[int, typer.Option("--to", help="Pixels: a power of two times what it has.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The grown checkpoint's folder.")],
    source: Annotated[str, typer.Option("--data", help="Pictures like the model's: a folder, shards, or scenes.")],
    kind: Annotated[str, typer.Option("--kind", help="What --data is: auto, folder, classes or tar.")] = "auto",
    init: Annotated[str, typer.Option("--init", help="preserve, random or scratch.")] = "preserve",
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Grow a checkpoint, without training: prints what became of its tensors and the error before and after.

    The same, and pictures of both, go to a folder beside it, `<out>-growth`. The size of details that growth starts
    from is measured on the pictures of --data.
    """
    from pixelgrow.cli.grow import grow_checkpoint

    typer.echo(grow_checkpoint(checkpoint, to, out, source=source, kind=kind, init=init, seed=seed))


@app.command()
def average(
    stage: Annotated[Path, typer.Argument(help="The folder of a stage that has trained, such as runs/photos/core.")],
    length: Annotated[float, typer.Option("--length", help="As a share of the run (EDM2's sigma_rel).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The checkpoint's folder.")],
    images: Annotated[int | None, typer.Option("--images", help="As of so many images; else at the end.")] = None,
) -> None:
    """Choose another average of a stage's weights, or an earlier one, after its training: writes a checkpoint.

    An earlier one can guide the finished model: `pixelgrow sample ... --guide`.
    """
    from pixelgrow.cli.average import average_checkpoint

    typer.echo(average_checkpoint(stage, length, out, images))


@app.command()
def graft(
    core: Annotated[str, typer.Argument(help="The checkpoint to keep: a core, or a grown model.")],
    rung: Annotated[str, typer.Option("--rung", help="The checkpoint whose rungs go on it, grown from the same core.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The new checkpoint's folder.")],
) -> None:
    """Put the rungs of one model on the same core of another: other details, the same thumbnails."""
    from pixelgrow.cli.graft import graft_checkpoint

    typer.echo(graft_checkpoint(core, rung, out))


@app.command()
def info(
    checkpoint: Checkpoint,
) -> None:
    """Show a checkpoint: configuration, parameters by part, lineage."""
    from pixelgrow.checkpoint import read_config
    from pixelgrow.model import find
    from pixelgrow.plan.recipe import parts_of
    from pixelgrow.report.tables import checkpoint_tables, show

    folder = find(checkpoint)
    config = read_config(folder)
    show(checkpoint_tables(folder, config, parts_of(config.network)))


@app.command()
def plan(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; or use --size.")] = None,
    settings: Set = None,
    size: Annotated[str | None, typer.Option("--size", help="tiny to huge, in place of a recipe.")] = None,
    resolution: Annotated[int, typer.Option("--resolution", help="With --size: pixels in the end.")] = 64,
    core: Annotated[int | None, typer.Option("--core", help="With --size: pixels of the core's training.")] = None,
    stride: Annotated[int, typer.Option("--stride", help="With --size: pixels per core token.")] = 4,
    images: Annotated[int, typer.Option("--images", min=1, help="With --size: images of each stage.")] = 1_000_000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="With --size: images per micro-batch.")] = 8,
    rate: Rate = None,
) -> None:
    """Parameters, FLOPs, memory and time, with nothing allocated."""
    if (recipe is None) == (size is None):
        raise UserError("plan: expected a recipe or --size, one of the two")
    if recipe is not None:
        _plan_recipe(recipe, settings, rate, Path("runs"))
        return
    from pixelgrow.models.sizes import SIZES
    from pixelgrow.plan.recipe import plan_recipe, plan_size
    from pixelgrow.report.tables import plan_tables, show

    assert size is not None
    if size not in SIZES:
        raise UserError(f"--size: got {size!r}, expected one of {', '.join(SIZES)}")
    sized = plan_size(size, resolution, core=core, stride=stride, images=images, batch=batch)
    show(plan_tables(plan_recipe(sized), *_rate(rate)))


def _plan_recipe(
    recipe: str, settings: list[str] | None, rate: float | None, runs: Path, *, look: bool = False
) -> None:
    """Print the plan of a recipe; `look`: into its data too, where they are there."""
    from pixelgrow.plan.recipe import plan_recipe
    from pixelgrow.recipe.read import load_recipe
    from pixelgrow.report.tables import plan_tables, recipe_heading, show
    from pixelgrow.stages.foresight import foreseen
    from pixelgrow.stages.record import done_before

    read = load_recipe(recipe, settings or [])
    done = done_before(read, runs / read.name)
    seen = foreseen(read) if look else None
    show(recipe_heading(read, runs / read.name, done, seen), plan_tables(plan_recipe(read), *_rate(rate)))


def _rate(given: float | None) -> tuple[float, str]:
    """FLOP/s achieved, and how that is known."""
    if given is not None:
        return given, "as given"
    from pixelgrow.plan.recipe import SHARE, measured_rate

    return measured_rate(), f"{100 * SHARE:.0f}% of the matrix-product rate measured here"


def main() -> None:
    """The entry point. A mistake is one line on stderr and status 2, a stop by a signal one line and 128 + signal.

    Status 141 and no line where the reader of standard output has gone, as with `| head`.
    """
    secure_streams()
    log = logging.getLogger("pixelgrow")
    log.setLevel(logging.INFO)
    log.handlers = [_Stderr()]
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup
            signal.signal(signum, _stopped)
    share_cores()
    end = _obey()
    try:
        sys.stdout.flush()
    except Unwritable as error:
        discard_output()
        end = end if end.status else _lost(error)
    if end.message:
        sys.stderr.write(f"pixelgrow: {end.message}\n")
    if end.status:
        sys.exit(end.status)


@dataclass(frozen=True)
class End:
    """How a command ended: its exit status, and a line for stderr."""

    status: int = 0
    message: str = ""


def _obey() -> End:
    """Carry out the command line."""
    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="pixelgrow", standalone_mode=False)
        if status == 130:  # typer has caught a KeyboardInterrupt
            return _signalled(signal.SIGINT)
        return End(status if isinstance(status, int) else 0)
    except UserError as error:
        return End(2, str(error))
    except Unwritable as error:
        return _lost(error)
    except (KeyboardInterrupt, typer.Abort):
        return _signalled(signal.SIGINT)
    except _Stopped as stop:
        return _signalled(stop.signum)
    except Exception as error:
        if out_of_memory(error):
            reason = str(error).partition("\n")[0][:120] or type(error).__name__
            return End(2, f"out of memory ({reason}): {LESS_MEMORY.get(_verb(), MORE_MEMORY)}")
        if is_usage_error(error):
            return End(2, in_one_line(error, sys.argv[1:]))
        if type(error).__name__ != "Interrupted":  # of training; its import would bring torch along
            raise
        return End(getattr(error, "status", 1), str(error))


def _lost(error: Unwritable) -> End:
    return End(128 + signal.SIGPIPE) if error.unread else End(2, str(error))


def _signalled(signum: int) -> End:
    message = f"stopped by {signal.Signals(signum).name}"
    return End(128 + signum, f"{message}: {GO_ON}" if _verb() in ("run", "demo", "recaption") else message)


def _verb() -> str:
    """The verb of the command line, `recaption` of `data recaption`."""
    words = [*sys.argv[1:3], "", ""]
    return words[1] if words[:2] == ["data", "recaption"] else words[0]


def share_cores() -> None:
    """Have idle threads of libgomp sleep soon (about 10 us) in place of spinning for milliseconds; before torch is
    imported. Costs nothing alone, and saves speed where others use the cores (`python -m bench.contention`)."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


class _Stderr(logging.Handler):
    """Messages to what stderr is now: a live progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


class _Stopped(BaseException):
    """SIGTERM or SIGHUP outside of training."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def _stopped(signum: int, frame: FrameType | None) -> None:
    raise _Stopped(signum)
