"""What the stages of a recipe would see of their data, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from pixelgrow.data.account import Account
from pixelgrow.data.sources.base import Source, wordings_of
from pixelgrow.external.autoencoder import Autoencoder
from pixelgrow.plan.shapes import networks, parent_network
from pixelgrow.plan.text import TextPlan, plan_text
from pixelgrow.recipe.data import DataSpec
from pixelgrow.recipe.stages import EvaluateStage, ModelStage, PairsStage, Recipe
from pixelgrow.stages.data import StageData, whole
from pixelgrow.stages.materials import shapes_of
from pixelgrow.text.cache import LOOKED_AT
from pixelgrow.writing import reading


@dataclass(frozen=True)
class Foresight:
    """`accounts`: what each stage whose data are on this machine would see, by its name.

    `held_out`: how many images are held out of how many, "" if the recipe's data are not here. `text`: what the
    captions take, as far as that can be told.
    """

    accounts: dict[str, Account]
    held_out: str
    text: TextPlan | None


def foreseen(recipe: Recipe) -> Foresight:
    """Look into a recipe's data as far as they are here.

    Reads the header of every image, as a run does when it starts. Raises UserError for data that a run would refuse.
    """
    data, nets, accounts = StageData(recipe, None), networks(recipe), dict[str, Account]()
    factor = Autoencoder(recipe.latent.autoencoder).factor if recipe.latent else 1
    held = [recipe.heldout] if recipe.heldout.source else recipe.data
    for stage in recipe.stages:
        network = nets.get(stage.name) or parent_network(str(stage.parent), nets)
        shapes = shapes_of(stage, network).times(factor)
        if isinstance(stage, ModelStage | PairsStage) and _are_here(data.specs(stage)):
            accounts[stage.name] = data.images(stage, shapes)
        elif isinstance(stage, EvaluateStage) and _are_here(held):
            accounts[stage.name] = data.prompts(stage.prompts, shapes.size)
    held_out = ""
    if _are_here(held):
        parts = [(len(part), len(whole(part))) for part in data.heldout_sources]
        many = f" of {sum(n for _, n in parts):,}" if not recipe.heldout.source else ""
        held_out = f"{sum(n for n, _ in parts):,}{many} images"
    return Foresight(accounts, held_out, _text(recipe, data))


def _text(recipe: Recipe, data: StageData) -> TextPlan | None:
    """The plan of the captions of all data that are here, each source counted once."""
    sources: dict[str, Source] = {}
    for stage in recipe.stages:
        if isinstance(stage, ModelStage | PairsStage) and _are_here(data.specs(stage)):
            sources |= {source.fingerprint: source for source in data.mixture(stage).sources}
    captions, some = 0, list[str]()
    for source in sources.values():
        many = min(len(source), getattr(source, "captions", None) or len(source))
        chosen = [wordings_of(source, i) for i in range(0, many, -(-many // LOOKED_AT))]
        captions += round(many * sum(map(len, chosen)) / len(chosen))
        some += [wording.text for wordings in chosen for wording in wordings]
    return plan_text(recipe, captions or None, some)


def _are_here(specs: Iterable[DataSpec]) -> bool:
    for spec in specs:
        with reading(spec.source):
            if spec.source != "scenes" and not Path(expanduser(spec.source)).exists():
                return False
    return True
