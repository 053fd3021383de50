"""The verbs of the command line with their options and help. Slow imports wait inside the verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixelgrow import __version__
from pixelgrow.cli.data import data
from pixelgrow.cli.edit import edit
from pixelgrow.cli.evaluation import compare, evaluate
from pixelgrow.errors import UserError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data, name="data")
app.add_typer(edit, name="edit")
app.command()(evaluate)
app.command()(compare)

Checkpoint = Annotated[
    str, typer.Argument(help="A checkpoint's or stage's folder, a built-in model (tiny, emoji, ...), or a hub name.")
]
Recipe = Annotated[str, typer.Argument(help="A recipe file, or a built-in recipe (demo, smoke, photos, tiny, ...).")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE: change a setting, such as stages.core.images=1000. Repeatable."),
]
Runs = Annotated[Path, typer.Option("--runs", help="The folder that holds all runs.")]
Rate = Annotated[
    float | None,
    typer.Option("--rate", min=1, help="FLOP/s that training achieves. Default: measured here."),
]
SAMPLES = Path("samples.png")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pixelgrow {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Grow a pixel-space image generator from a small one.

    \b
    Try it:           pixelgrow sample tiny "a red circle above two blue stars"
    Train your own:   pixelgrow new FOLDER
    """


@app.command()
def demo(settings: Set = None, runs: Runs = Path("runs")) -> None:
    """Train, grow and distill a tiny model. Takes about 20 minutes on two CPU cores and ends with a report."""
    _run("demo", settings, runs)


@app.command()
def new(
    source: Annotated[str, typer.Argument(help="A folder of images with captions or in class folders, or tar shards.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The recipe to write. Default: the name of SOURCE, .yaml.")
    ] = None,
    kind: Annotated[str, typer.Option("--kind", help="What SOURCE is: auto, folder, classes or tar.")] = "auto",
) -> None:
    """Look at images and at this machine, and write a commented recipe that fits both, for run.

    \b
    pixelgrow new path/to/pictures
    pixelgrow run pictures.yaml
    """
    from pixelgrow.cli.new import new_recipe

    made = new_recipe(source, out, kind)
    typer.echo(f"written to {made}; train it with: pixelgrow run {made}")


@app.command()
def run(
    recipe: Recipe,
    settings: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages, data and cost of the run. Write nothing.")
    ] = False,
    rate: Rate = None,
    runs: Runs = Path("runs"),
) -> None:
    """Run or resume a recipe. The same command again resumes a run that was stopped.

    \b
    pixelgrow run photos --set data.source=FOLDER --dry-run
    pixelgrow run photos --set data.source=FOLDER
    pixelgrow run my-recipe.yaml --set stages.core.images=100000 --set seed=1
    """
    if dry_run:
        _plan_recipe(recipe, settings, rate, runs, look=True)
    else:
        _run(recipe, settings, runs)


def _run(recipe: str, settings: list[str] | None, runs: Path) -> None:
    from pixelgrow.distributed import join
    from pixelgrow.recipe.read import load_recipe

    with join() as team:
        read = load_recipe(recipe, settings or [])
        from pixelgrow.run import run as run_recipe
        from pixelgrow.training.cpu import tune_allocator

        tune_allocator()
        report = run_recipe(read, runs, team)
        if team.first:
            typer.echo(f"report: {report}")


@app.command()
def sample(
    checkpoint: Checkpoint,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts, each in quotes; class names or numbers for a model of classes.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--prompts", help="A text file of more prompts, one a line.")] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="A .png for one grid of all images, or a folder for one file an image.")
    ] = SAMPLES,
    n: Annotated[
        int | None,
        typer.Option("-n", min=1, help="Images of each prompt. Default: 1, or 64 with --preview and --pick."),
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Sample numbered thumbnails with the core alone (exact models).")
    ] = False,
    pick: Annotated[
        str | None, typer.Option("--pick", help="Sample these images of a preview at full size: 3,17.")
    ] = None,
    best_of: Annotated[
        int | None,
        typer.Option("--best-of", min=1, help="Sample this many thumbnails; --judge chooses the best."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="checker, a CLIP's folder or hub name, or MODULE:FUNCTION.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Random seed. Image i depends on the seed and on i alone.")] = 0,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Sampling steps. Default: the checkpoint's, or 32.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", min=0, help="Guidance weight; 1 is none. Default: the checkpoint's, or 2."),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option("--sampler", help="dpm++2m (default), heun, ddim or ddpm."),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="HEIGHTxWIDTH in pixels, such as 64x96. Default: the model's square.")
    ] = None,
    grid: Annotated[
        bool | None, typer.Option("--grid/--single", help="Write one grid, or one file an image. Default: by --out.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Percentile of dynamic thresholding, such as 0.995.")
    ] = None,
    guide: Annotated[
        str | None,
        typer.Option("--guide", help="Autoguidance: a weaker checkpoint, or base, this model before its last growth."),
    ] = None,
    interval: Annotated[
        tuple[float, float] | None,
        typer.Option("--interval", help="LO HI: guide only where LO < sigma <= HI."),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help="Noise levels of the steps: karras, or native, spaced as in training."),
    ] = None,
    guide_details: Annotated[
        bool | None, typer.Option("--guide-details/--guide-core", help="Guide the whole image, or the core alone.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images sampled at a time.")] = 64,
) -> None:
    """Sample images from prompts. Each PNG holds its settings as metadata.

    \b
    pixelgrow sample tiny "a red circle" "three green squares" -o grid.png
    pixelgrow sample runs/photos/grown --prompts prompts.txt -n 4 -o folder
    pixelgrow sample tiny-onestep "a red circle above two blue stars" -n 64
    """
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
    checkpoint: Checkpoint,
    to: Annotated[int, typer.Option("--to", help="The new resolution: the model's times 2, 4, 8, ...")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the grown checkpoint.")],
    source: Annotated[
        str, typer.Option("--data", help="Images like those the model was trained on: a folder, tar shards, or scenes.")
    ],
    kind: Annotated[str, typer.Option("--kind", help="What --data is: auto, folder, classes or tar.")] = "auto",
    init: Annotated[
        str, typer.Option("--init", help="Start of the new levels: preserve, random, or scratch.")
    ] = "preserve",
    seed: Annotated[int, typer.Option("--seed", help="Random seed of the new weights and of the noise.")] = 0,
) -> None:
    """Grow a checkpoint to a higher resolution without training it.

    Prints which tensors were loaded, are new or were dropped, and the denoising error on --data before and after. That
    report and samples of both models go to OUT-growth. The scale of the new details is measured on --data.

    \b
    pixelgrow grow tiny --to 128 -o tiny128 --data scenes
    """
    from pixelgrow.cli.grow import grow_checkpoint

    typer.echo(grow_checkpoint(checkpoint, to, out, source=source, kind=kind, init=init, seed=seed))


@app.command()
def average(
    stage: Annotated[Path, typer.Argument(help="Folder of a stage that was trained, such as runs/photos/core.")],
    length: Annotated[
        float, typer.Option("--length", help="Length of the average, as a share of the training (EDM2's sigma_rel).")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the checkpoint.")],
    images: Annotated[
        int | None, typer.Option("--images", help="Average as of this many images seen. Default: the end of training.")
    ] = None,
) -> None:
    """Make another average of a stage's weights. A checkpoint is made from the stage's snapshots (post-hoc EMA).

    An earlier average can guide the finished model: pixelgrow sample ... --guide.

    \b
    pixelgrow average runs/photos/core --length 0.05 -o sharper
    """
    from pixelgrow.cli.average import average_checkpoint

    typer.echo(average_checkpoint(stage, length, out, images))


@app.command()
def graft(
    core: Annotated[str, typer.Argument(help="The checkpoint to keep: a core, or a grown model.")],
    rung: Annotated[str, typer.Option("--rung", help="The checkpoint whose rungs to use; grown from the same core.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the new checkpoint.")],
) -> None:
    """Put one model's rungs on another's core. Both must have the same core: other details, the same thumbnails."""
    from pixelgrow.cli.graft import graft_checkpoint

    typer.echo(graft_checkpoint(core, rung, out))


@app.command()
def info(checkpoint: Checkpoint) -> None:
    """Show a checkpoint's configuration, parameter counts and lineage."""
    from pixelgrow.checkpoint import read_config
    from pixelgrow.model import find
    from pixelgrow.plan.recipe import parts_of
    from pixelgrow.report.tables import checkpoint_tables, show

    folder = find(checkpoint)
    config = read_config(folder)
    show(checkpoint_tables(folder, config, parts_of(config.network)))


@app.command()
def plan(
    recipe: Annotated[str | None, typer.Argument(help="A recipe, as for run; or give --size.")] = None,
    settings: Set = None,
    size: Annotated[
        str | None, typer.Option("--size", help="nano, tiny, small, base, large, xl, xxl or huge, instead of a recipe.")
    ] = None,
    resolution: Annotated[int, typer.Option("--resolution", help="With --size: final resolution in pixels.")] = 64,
    core: Annotated[int | None, typer.Option("--core", help="With --size: resolution that the core trains at.")] = None,
    stride: Annotated[int, typer.Option("--stride", help="With --size: pixels per core token.")] = 4,
    images: Annotated[int, typer.Option("--images", min=1, help="With --size: images of each stage.")] = 1_000_000,
    batch: Annotated[int, typer.Option("--batch", min=1, max=2**20, help="With --size: images per micro-batch.")] = 8,
    rate: Rate = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="Plan for so many GPUs: layout, memory, time, disk.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="With --gpus: h100, h200, b200, a100, a100-40, l40s or rtx4090.")
    ] = None,
    mfu: Annotated[
        float, typer.Option("--mfu", min=0.01, max=1, help="With --gpus: share of their FLOP/s that training reaches.")
    ] = 0.4,
) -> None:
    """Estimate parameters, FLOPs, memory and time. Of a recipe or of a model size; nothing is allocated.

    \b
    pixelgrow plan huge
    pixelgrow plan huge --gpus 64 --gpu h100
    pixelgrow plan --size base --resolution 256 --core 64
    """
    if (recipe is None) == (size is None):
        raise UserError("plan: expected a recipe or --size, one of the two")
    if (gpus is None) != (gpu is None):
        given, other = ("--gpus", "--gpu h100") if gpu is None else ("--gpu", "--gpus 8")
        raise UserError(f"plan: got {given} alone, expected the number and the kind of the GPUs; add {other}")
    if recipe is not None and gpus is not None and gpu is not None:
        _plan_cluster(recipe, settings, gpus, gpu, mfu)
        return
    if recipe is not None:
        _plan_recipe(recipe, settings, rate, Path("runs"))
        return
    from pixelgrow.models.sizes import SIZES
    from pixelgrow.plan.recipe import plan_recipe, plan_size
    from pixelgrow.report.tables import plan_tables, show

    assert size is not None
    if gpus is not None:
        raise UserError("plan: --gpus is for recipes; name one instead of --size")
    if size not in SIZES:
        raise UserError(f"--size: got {size!r}, expected one of {', '.join(SIZES)}")
    sized = plan_size(size, resolution, core=core, stride=stride, images=images, batch=batch)
    show(plan_tables(plan_recipe(sized), *_rate(rate)))


def _plan_recipe(
    recipe: str, settings: list[str] | None, rate: float | None, runs: Path, *, look: bool = False
) -> None:
    """Print the plan of a recipe. `look`: also open its data, if they are there."""
    from pixelgrow.plan.recipe import plan_recipe
    from pixelgrow.plan.text import plan_text
    from pixelgrow.recipe.read import load_recipe
    from pixelgrow.report.tables import plan_tables, recipe_heading, show, text_line
    from pixelgrow.stages.foresight import foreseen
    from pixelgrow.stages.materials import text_folder
    from pixelgrow.stages.record import done_before

    read = load_recipe(recipe, settings or [])
    done = done_before(read, runs / read.name)
    seen = foreseen(read) if look else None
    reached, how = _rate(rate)
    text = seen.text if seen else plan_text(read)
    show(recipe_heading(read, runs / read.name, done, seen), plan_tables(plan_recipe(read), reached, how))
    if text is not None:
        show("", text_line(text, text_folder(read, runs / read.name), reached))


def _plan_cluster(recipe: str, settings: list[str] | None, gpus: int, gpu: str, mfu: float) -> None:
    """Print the plan of a recipe on a cluster."""
    from pixelgrow.plan.cluster import disks, place
    from pixelgrow.plan.gpus import Cluster
    from pixelgrow.plan.text import plan_text
    from pixelgrow.recipe.read import load_recipe
    from pixelgrow.report.cluster import cluster_tables, encoder_line
    from pixelgrow.report.tables import show, text_line
    from pixelgrow.stages.materials import text_folder

    read = load_recipe(recipe, settings or [])
    text = plan_text(read)
    cluster = Cluster(gpus, gpu, mfu, taken=text.resident if text else 0)
    show(cluster_tables(cluster, place(read, cluster), disks(read)))
    if text is not None:
        show("", text_line(text, text_folder(read, Path("runs") / read.name), cluster.rate), encoder_line(text))


def _rate(given: float | None) -> tuple[float, str]:
    """FLOP/s of training, and its origin in words."""
    if given is not None:
        return given, "as given"
    from pixelgrow.plan.recipe import SHARE, measured_rate

    return measured_rate(), f"{100 * SHARE:.0f}% of the matrix-product rate measured here"
