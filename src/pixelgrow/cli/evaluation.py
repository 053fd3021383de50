"""The verbs `evaluate` and `compare` with their options and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    candidate: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint, stage, built-in model or hub name; a folder of images; a diffusers pipeline.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option("--data", help="Real images, whose captions are the prompts: scenes, a folder, tar shards."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", help="Names with commas between. Default: fd,precision,recall, and alignment."),
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Images of each seed. Default: 1,000; of a folder of images, all.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Sampling seeds, 0, 1, ...; for intervals.")] = 1,
    extractor: Annotated[
        str, typer.Option("--extractor", help="Feature extractors with commas between: inception, dinov2, clip, ...")
    ] = "efficientnet-lite0",
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="The .json to write. Default: evaluation-MODEL.json.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="Statistics of the real images: read if there, else written.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="SETTING=VALUE,VALUE: evaluate each, such as guidance=1,2,4,6.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Sampling steps. Default: the checkpoint's, or 16.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", min=0, help="Guidance weight. Default: the checkpoint's, or 2.")
    ] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="dpm++2m (default), heun, ddim or ddpm.")] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Percentile of dynamic thresholding, such as 0.995.")
    ] = None,
    interval: Annotated[
        tuple[float, float] | None, typer.Option("--interval", help="LO HI: guide only where LO < sigma <= HI.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", help="Noise levels of the steps: karras, or native.")
    ] = None,
    train: Annotated[
        str | None, typer.Option("--train", help="Training images, for fd-ratio: scenes, a folder, tar shards.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option("--questions", help="Prompts with questions, in place of --data; see --form.")
    ] = None,
    form: Annotated[str, typer.Option("--form", help="Of --questions: dsg, geneval2 or gecko.")] = "dsg",
    vqa: Annotated[
        str | None, typer.Option("--vqa", help="The model that answers questions: a folder, or a name on the hub.")
    ] = None,
    detector: Annotated[
        str | None, typer.Option("--detector", help="The model that counts objects: a folder, or a name on the hub.")
    ] = None,
    kind: Annotated[str, typer.Option("--kind", help="What --data is: auto, folder, classes or tar.")] = "auto",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at a time.")] = 16,
) -> None:
    """Measure how good images are: distance, precision and recall, alignment. If it is interrupted, the same command
    goes on.

    \b
    pixelgrow evaluate tiny --data scenes -n 2000 --seeds 3
    pixelgrow evaluate tiny --data scenes --sweep guidance=1,2,4,6
    pixelgrow evaluate folder/of/images --data folder/of/real/images
    """
    from pixelgrow.cli.evaluate import Request, evaluate_candidate
    from pixelgrow.distributed import join
    from pixelgrow.evaluation.planning import Asked

    asked = Asked(
        data=data, kind=kind, metrics=None if metrics is None else _names(metrics), extractors=_names(extractor), n=n,
        seeds=seeds, reference=reference, train=train, questions=questions, form=form, vqa=vqa, detector=detector,
        batch=batch,
    )  # fmt: skip
    settings = {
        "steps": steps, "guidance": guidance, "sampler": sampler, "threshold": threshold, "interval": interval,
        "grid": schedule,
    }  # fmt: skip
    with join() as team:
        evaluate_candidate(Request(candidate, asked, out, sweep, settings), team)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def compare(
    files: Annotated[list[Path], typer.Argument(help="Files that evaluate wrote.")],
    plot: Annotated[Path | None, typer.Option("--plot", help="An .svg of alignment against distance to write.")] = None,
) -> None:
    """Show evaluations side by side. What is not comparable is refused: other data, other prompts, another number.

    \b
    pixelgrow compare a.json b.json --plot comparison.svg
    """
    from pixelgrow.cli.evaluate import compare_files

    compare_files(files, plot)
