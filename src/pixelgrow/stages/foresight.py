"""What the stages of a recipe would see of their data, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from pixelgrow.data.account import Account
from pixelgrow.external.autoencoder import Autoencoder
from pixelgrow.plan.shapes import networks, parent_network
from pixelgrow.recipe.data import DataSpec
from pixelgrow.recipe.stages import EvaluateStage, ModelStage, PairsStage, Recipe
from pixelgrow.stages.data import StageData, whole
from pixelgrow.writing import reading


@dataclass(frozen=True)
class Foresight:
    """`accounts`: what each stage whose data are on this machine would see, by its name.

    `held_out`: how many images are held out of how many, "" if the recipe's data are not here.
    """

    accounts: dict[str, Account]
    held_out: str


def foreseen(recipe: Recipe) -> Foresight:
    """Look into a recipe's data as far as they are here.

    Reads the header of every image, as a run does when it starts. Raises UserError for data that a run would refuse.
    """
    data, nets, accounts = StageData(recipe, None), networks(recipe), dict[str, Account]()
    factor = Autoencoder(recipe.latent.autoencoder).factor if recipe.latent else 1
    held = [recipe.heldout] if recipe.heldout.source else recipe.data
    for stage in recipe.stages:
        side = factor * (nets.get(stage.name) or parent_network(str(stage.parent), nets)).resolution
        if isinstance(stage, ModelStage | PairsStage) and _are_here(data.specs(stage)):
            accounts[stage.name] = data.images(stage, (side, side))
        elif isinstance(stage, EvaluateStage) and _are_here(held):
            accounts[stage.name] = data.prompts(stage.prompts, (side, side))
    held_out = ""
    if _are_here(held):
        parts = [(len(part), len(whole(part))) for part in data.heldout_sources]
        many = f" of {sum(n for _, n in parts):,}" if not recipe.heldout.source else ""
        held_out = f"{sum(n for n, _ in parts):,}{many} images"
    return Foresight(accounts, held_out)


def _are_here(specs: Iterable[DataSpec]) -> bool:
    for spec in specs:
        with reading(spec.source):
            if spec.source != "scenes" and not Path(expanduser(spec.source)).exists():
                return False
    return True
