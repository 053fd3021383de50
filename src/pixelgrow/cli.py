"""The command line: verbs, options, and every user's mistake in one line. Torch is imported late."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
Runs = Annotated[Path, typer.Option("--runs", help="Folder of all runs.")]


@app.callback()
def _root() -> None:
    """Grow a pixel-space image generator from a small one."""


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of one that the package carries.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="a.b=value, such as stages.core.images=1000")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, touch nothing.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Run a recipe: do what is missing, go on with what was cut off."""
    from pixelgrow.recipe import load_recipe

    read = load_recipe(recipe, settings or [])
    from pixelgrow.run import run as run_recipe

    typer.echo(run_recipe(read, runs))


def main() -> None:
    """The entry point: runs a verb; a user's mistake is one line on stderr and status 2."""
    from pixelgrow.errors import UserError

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except UserError as error:
        typer.echo(f"pixelgrow: {error}", err=True)
        sys.exit(2)


def _terminated(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)
