"""The command line's `edit`: its verbs and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

edit = typer.Typer(rich_markup_mode=None)

Checkpoint = Annotated[str, typer.Argument(help="A folder of a checkpoint or stage, a built-in model, a hub name.")]
Picture = Annotated[Path, typer.Argument(metavar="IMAGE", help="A JPEG, PNG or WebP file.")]
Prompt = Annotated[str, typer.Option("--prompt", help="What the picture shows; of a model of classes, its class.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The PNG to write.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of the noise, or of the first latent that is tried; else 0.")]
Fit = Annotated[bool, typer.Option("--fit", help="Scale and crop to the model's square, a mask with its picture.")]
Teacher = Annotated[
    str | None,
    typer.Option("--teacher", help="One step: the multi-step checkpoint whose ODE shows where the descent begins."),
]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Multi-step: solver steps.")]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", min=0, help="Multi-step or guided: to the prompt; 1: none."),
]
Sampler = Annotated[str | None, typer.Option("--sampler", help="Multi-step: dpm++2m, heun, ddim or ddpm.")]
Iterations = Annotated[
    int | None,
    typer.Option(
        "--iterations", min=0, help="One step: of the descent, at most; else 200, from a teacher's latent 30."
    ),
]
Starts = Annotated[int | None, typer.Option("--starts", min=1, help="One step: latents tried before the descent.")]
Prior = Annotated[float | None, typer.Option("--prior", help="One step: how much likely latents are preferred.")]
Tolerance = Annotated[
    float | None, typer.Option("--tolerance", help="One step: the error, of [-1, 1], at which the descent ends.")
]


@edit.callback()
def _about() -> None:
    """Edit pictures, with a multi-step model or a one-step generator."""


@edit.command()
def inpaint(
    checkpoint: Checkpoint,
    image: Picture,
    mask: Annotated[Path, typer.Option("--mask", help="As large as the picture: black is kept, the rest filled.")],
    prompt: Prompt,
    out: Out = Path("inpainted.png"),
    fit: Fit = False,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    iterations: Iterations = None,
    starts: Starts = None,
    prior: Prior = None,
    tolerance: Tolerance = None,
) -> None:
    """Fill what a mask covers by the prompt; all else stays as it is."""
    _edit(
        "inpaint", checkpoint, [prompt], out, images=[image], mask=mask, fitted=fit, arguments={"seed": seed},
        settings=_settings(steps, guidance, sampler, iterations, starts, prior, tolerance),
    )  # fmt: skip


@edit.command()
def upscale(
    checkpoint: Checkpoint,
    image: Picture,
    prompt: Prompt,
    out: Out = Path("upscaled.png"),
    teacher: Teacher = None,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    iterations: Iterations = None,
    starts: Starts = None,
    prior: Prior = None,
    tolerance: Tolerance = None,
) -> None:
    """Enlarge a picture of half, a quarter ... of the model's side; averaged down again, it is the one given."""
    _edit(
        "upscale", checkpoint, [prompt], out, images=[image], teacher=teacher, arguments={"seed": seed},
        settings=_settings(steps, guidance, sampler, iterations, starts, prior, tolerance),
    )  # fmt: skip


@edit.command()
def transfer(
    checkpoint: Checkpoint,
    image: Picture,
    source: Annotated[str, typer.Option("--from", help="What the picture shows: a prompt, or a class.")],
    target: Annotated[str, typer.Option("--to", help="What it is to show.")],
    out: Out = Path("transferred.png"),
    strength: Annotated[
        float | None, typer.Option("--strength", help="Multi-step: how far back to noise, in (0, 1].")
    ] = None,
    teacher: Teacher = None,
    fit: Fit = False,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    iterations: Iterations = None,
    starts: Starts = None,
    prior: Prior = None,
    tolerance: Tolerance = None,
) -> None:
    """Change what a picture shows from one prompt, or class, to another."""
    _edit(
        "transfer", checkpoint, [source, target], out, images=[image], teacher=teacher, fitted=fit,
        arguments={"strength": strength, "seed": seed},
        settings=_settings(steps, guidance, sampler, iterations, starts, prior, tolerance),
    )  # fmt: skip


@edit.command()
def interpolate(
    checkpoint: Checkpoint,
    prompts: Annotated[list[str], typer.Option("--prompt", help="Of one end, and of the other; one: of both.")],
    out: Out = Path("interpolated.gif"),
    frames: Annotated[int, typer.Option("--frames", help="Pictures, both ends among them.")] = 8,
    images: Annotated[list[Path] | None, typer.Option("--image", help="The ends' pictures: give two.")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="The ends' seeds: one or two; else 0.")] = None,
    teacher: Teacher = None,
    fit: Fit = False,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    iterations: Iterations = None,
    starts: Starts = None,
    prior: Prior = None,
    tolerance: Tolerance = None,
) -> None:
    """From one prompt, seed or picture to another: a GIF, or a strip where --out ends in .png."""
    _edit(
        "interpolate", checkpoint, prompts, out, images=images or [], teacher=teacher, fitted=fit,
        arguments={"frames": frames, "seeds": seeds or None},
        settings=_settings(steps, guidance, sampler, iterations, starts, prior, tolerance),
    )  # fmt: skip


def _settings(
    steps: int | None, guidance: float | None, sampler: str | None,
    iterations: int | None, starts: int | None, prior: float | None, tolerance: float | None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "steps": steps, "guidance": guidance, "sampler": sampler,
        "iterations": iterations, "starts": starts, "prior": prior, "tolerance": tolerance,
    }  # fmt: skip


def _edit(verb: str, checkpoint: str, prompts: list[str], out: Path, **more: Any) -> None:
    from pixelgrow.cli.retouch import Request, retouch

    typer.echo(retouch(Request(verb, checkpoint, prompts, out, **more)))
