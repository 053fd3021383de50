"""The verbs of `data`: look into a source of images, or write new captions for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pixelgrow.errors import UserError

if TYPE_CHECKING:
    from pixelgrow.data.buckets import Shapes
    from pixelgrow.data.sources.base import Source, Subset
    from pixelgrow.recipe.stages import Recipe
    from pixelgrow.text.cut import Cut

logger = logging.getLogger(__name__)
COUNT = "count"
SHEET = Path("contact-sheet.png")


class _Data(TyperGroup):
    """`data SOURCE` is short for `data count SOURCE`; a source with the name of a verb is written as ./recaption."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args[:1] not in (["--help"], ["-h"]) and args[:1] not in ([name] for name in self.commands):
            args = [COUNT, *args]
        return super().parse_args(ctx, args)


data = typer.Typer(cls=_Data, rich_markup_mode=None)


@data.callback()
def _about() -> None:
    """Look into a source of images (`data SOURCE` is short for `data count SOURCE`), or write new captions for it."""


@data.command(COUNT)
def count(
    source: Annotated[str, typer.Argument(help="A folder, tar shards, or the word scenes.")],
    recipe: Annotated[str | None, typer.Option("--recipe", help="Show what each of its stages would see.")] = None,
    kind: Annotated[str, typer.Option("--kind", help="auto, folder, classes or tar.")] = "auto",
    ground: Annotated[str, typer.Option("--ground", help="The colour of transparent parts.")] = "white",
    fit: Annotated[
        str, typer.Option("--fit", help="Of images that are not square: crop, or pad with the ground.")
    ] = "crop",
    buckets: Annotated[
        bool, typer.Option("--buckets", help="Group images by shape, instead of cropping all to squares.")
    ] = False,
    decode: Annotated[
        int, typer.Option("--decode", min=0, help="How many images to decode, to find damage; 0: all.")
    ] = 1000,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="The contact sheet to write; else contact-sheet.png.")
    ] = None,
    bad: Annotated[
        Path | None, typer.Option("--bad", help="The list of bad files to write, like bad_files.jsonl.")
    ] = None,
) -> None:
    """Show counts, sizes, captions and bad files of a source, and write a contact sheet. The source stays as it is."""
    from pixelgrow.data.badfiles import write_list
    from pixelgrow.data.inspect import STAGES, captions_in, inspect_source
    from pixelgrow.data.sources.base import strays_of
    from pixelgrow.data.sources.opening import open_source
    from pixelgrow.recipe.read import load_recipe
    from pixelgrow.report.tables import inspection_tables, show

    for option, path in (("--sheet", sheet), ("--bad", bad)):
        if path is not None and within(path, source):
            raise UserError(f"{option} {path}: lies in {source}, where nothing is written; name another place")
    sheet_path = sheet or (None if within(SHEET, source) else SHEET)
    read = load_recipe(recipe) if recipe is not None else None
    opened = open_source(
        {"source": source}
        | ({} if source == "scenes" else {"kind": kind, "ground": ground, "fit": fit, "buckets": buckets})
    )
    stages, train = (STAGES, None) if read is None else (_shapes(read), _train(read, opened))
    found = inspect_source(opened, stages, decode or None, sheet_path, train)
    if bad is not None:
        write_list(bad, opened, [*found.bad, *strays_of(opened)])
    cut = None if read is None or found.classes else _cut(read, captions_in(opened))
    show(inspection_tables(found, cut))
    if sheet_path is None:
        typer.echo(f"no contact sheet: it would lie in {source}, where nothing is written; name a place with --sheet")


def within(path: Path, source: str) -> bool:
    """Whether a file would lie in the folder of a source."""
    folder = Path(source).expanduser()
    return source != "scenes" and folder.is_dir() and path.resolve().is_relative_to(folder.resolve())


@data.command()
def recaption(
    source: Annotated[str, typer.Argument(help="A folder with metadata.jsonl, or a .txt beside each image.")],
    model: Annotated[
        str, typer.Option("--model", help="An image-to-text model of transformers: a folder, or a name on the hub.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The metadata.jsonl to write.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The prompt, for a model that takes text beside the image.")
    ] = None,
    weight: Annotated[
        float, typer.Option("--weight", min=1e-6, help="The weight of a new caption; the others have 1.")
    ] = 1.0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at a time.")] = 8,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of a new caption, at most.")] = 64,
) -> None:
    """Write a second caption for every image. If it is interrupted, the same command goes on."""
    from pixelgrow.cli.recaption import Recaption, recaption

    typer.echo(recaption(Recaption(source, model, out, prompt, weight, batch, tokens)))


def _cut(recipe: Recipe, captions: list[str]) -> Cut | None:
    """Which captions the recipe's text encoder truncates; None without an encoder, or if it is not on this machine."""
    from pixelgrow.plan.shapes import is_here
    from pixelgrow.text.cut import cut_in
    from pixelgrow.text.encoders import load_tokenizer
    from pixelgrow.text.spec import describe

    if recipe.text.classes or not is_here(recipe.text):
        return None
    spec = describe(recipe.text.encoder, recipe.text.max_tokens)
    return cut_in(load_tokenizer(spec), list(dict.fromkeys(captions)), spec.max_tokens)


def _train(recipe: Recipe, source: Source) -> Subset | None:
    """The part of a source that a run of the recipe would train on; None: all of it.

    Warns if a run would refuse the source.
    """
    from pixelgrow.data.scenes.source import Scenes
    from pixelgrow.data.sources.base import heldout_split
    from pixelgrow.stages.data import StageData

    try:
        StageData(recipe, None).check_classes([source])
        if recipe.heldout.source or isinstance(source, Scenes):
            return None
        return heldout_split(source, recipe.heldout.fraction, recipe.seed, at_most=recipe.heldout.at_most)[0]
    except UserError as error:
        logger.warning("a run of %s would be refused: %s", recipe.name, error)
        return None


def _shapes(recipe: Recipe) -> list[Shapes]:
    """The shapes of the images of a recipe's stages, in pixels, each once.

    Warns if a run would refuse them.
    """
    from pixelgrow.data.inspect import STAGES
    from pixelgrow.plan.shapes import networks, parent_network
    from pixelgrow.stages.materials import shapes_of

    factor = 1
    if recipe.latent is not None:
        from pixelgrow.external.autoencoder import Autoencoder

        factor = Autoencoder(recipe.latent.autoencoder).factor
    try:
        nets = networks(recipe)
    except UserError as error:
        logger.warning("a run of %s would be refused: %s", recipe.name, error)
        return list(STAGES)
    made = (
        shapes_of(stage, nets.get(stage.name) or parent_network(str(stage.parent), nets)) for stage in recipe.stages
    )
    first: dict[tuple[int, int], Shapes] = {}
    for shapes in made:
        if shapes.size not in first or shapes.stride:
            first[shapes.size] = shapes.times(factor)
    return list(first.values())
