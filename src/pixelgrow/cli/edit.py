"""The verbs of `edit` with their options and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

edit = typer.Typer(rich_markup_mode=None)

Checkpoint = Annotated[
    str, typer.Argument(help="A checkpoint's or stage's folder, a built-in model (tiny, emoji, ...), or a hub name.")
]
Image = Annotated[Path, typer.Argument(help="A JPEG, PNG or WebP file.")]
Prompt = Annotated[str, typer.Option("--prompt", help="What the image shows; a class for a model of classes.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="The .png to write.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Random seed. Default: 0.")]
Fit = Annotated[bool, typer.Option("--fit", help="Scale and crop the image, and its mask, to the model's square.")]
Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher", help="One-step: the multi-step checkpoint to invert the image with, where fitting starts."
    ),
]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Multi-step: sampling steps.")]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", min=0, help="Multi-step, or one-step with guidance: guidance weight; 1 is none."),
]
Sampler = Annotated[str | None, typer.Option("--sampler", help="Multi-step: dpm++2m, heun, ddim or ddpm.")]
Iterations = Annotated[
    int | None,
    typer.Option(
        "--iterations", min=0, help="One-step: most steps to fit the latent. Default: 200; 30 with --teacher."
    ),
]
Starts = Annotated[
    int | None,
    typer.Option("--starts", min=1, help="One-step: random latents to try first; the best is fitted. Default: 8."),
]
Prior = Annotated[
    float | None, typer.Option("--prior", help="One-step: weight of the latent's prior in the fit. Default: 0.01.")
]
Tolerance = Annotated[
    float | None,
    typer.Option("--tolerance", help="One-step: stop fitting at this error of pixels in [-1, 1]. Default: 0.02."),
]


@edit.callback()
def _about() -> None:
    """Edit images: inpaint, upscale, transfer, interpolate.

    Multi-step models and one-step generators both edit; options for one kind say so.
    """


@edit.command()
def inpaint(
    checkpoint: Checkpoint,
    image: Image,
    mask: Annotated[Path, typer.Option("--mask", help="Mask of the image's size: black is kept, the rest is filled.")],
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
    """Fill the masked part of an image. All other pixels stay as they are.

    \b
    pixelgrow edit inpaint tiny photo.png --mask mask.png --prompt "a red circle"
    """
    _edit(
        "inpaint", checkpoint, [prompt], out, images=[image], mask=mask, fitted=fit, arguments={"seed": seed},
        settings=_settings(steps, guidance, sampler, iterations, starts, prior, tolerance),
    )  # fmt: skip


@edit.command()
def upscale(
    checkpoint: Checkpoint,
    image: Image,
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
    """Upscale a small image to the model's resolution.

    The image's shorter side is the model's divided by 2, 4, 8 and so on. Averaged down, the result is the image given.

    \b
    pixelgrow edit upscale tiny small.png --prompt "a red circle"
    """
    _edit(
        "upscale", checkpoint, [prompt], out, images=[image], teacher=teacher, arguments={"seed": seed},
        settings=_settings(steps, guidance, sampler, iterations, starts, prior, tolerance),
    )  # fmt: skip


@edit.command()
def transfer(
    checkpoint: Checkpoint,
    image: Image,
    source: Annotated[str, typer.Option("--from", help="What the image shows: a prompt or a class.")],
    target: Annotated[str, typer.Option("--to", help="What the result is to show: a prompt or a class.")],
    out: Out = Path("transferred.png"),
    strength: Annotated[
        float | None,
        typer.Option("--strength", help="Multi-step: how far back towards noise, in (0, 1]. Default: 0.7."),
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
    """Change an image from one prompt or class to another.

    \b
    pixelgrow edit transfer tiny photo.png --from "a red circle" --to "a blue star"
    """
    _edit(
        "transfer", checkpoint, [source, target], out, images=[image], teacher=teacher, fitted=fit,
        arguments={"strength": strength, "seed": seed},
        settings=_settings(steps, guidance, sampler, iterations, starts, prior, tolerance),
    )  # fmt: skip


@edit.command()
def interpolate(
    checkpoint: Checkpoint,
    prompts: Annotated[list[str], typer.Option("--prompt", help="Prompt of both ends; give two for one each.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .gif to write, or a .png with all frames.")] = Path(
        "interpolated.gif"
    ),
    frames: Annotated[int, typer.Option("--frames", help="Number of images, both ends included.")] = 8,
    images: Annotated[
        list[Path] | None, typer.Option("--image", help="Start from images in place of seeds: give two, one an end.")
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", help="Random seed of both ends; give two for one each. Default: 0.")
    ] = None,
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
    """Interpolate between two prompts, seeds or images.

    \b
    pixelgrow edit interpolate tiny --prompt "a red circle" --prompt "a blue star"
    pixelgrow edit interpolate tiny --prompt "a red circle" --seed 1 --seed 2 -o strip.png
    """
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
