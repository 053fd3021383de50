"""Presets of distillation: what they fill in, what the recipe says stands, how much of a base trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pixelgrow.errors import UserError
from pixelgrow.growth import freeze, grow_network, grown_config, last_blocks
from pixelgrow.onestep.settings import LossSettings
from pixelgrow.plan.shapes import networks
from pixelgrow.recipe.read import read_recipe
from pixelgrow.recipe.stages import DistillStage, GrowStage
from pixelgrow.training.optim import optimizers
from pixelgrow.training.settings import TrainSettings
from test_growth import shallow


def stages(distill: dict[str, Any], grow: dict[str, Any]) -> Any:
    first: list[Any] = [
        {"train": {"name": "core", "size": "tiny", "resolution": 16, "images": 16}},
        {"pairs": {"name": "pairs", "n": 8}},
        {"distill": {"name": "onestep", "pairs": "pairs", "images": 640_000} | distill},
        {"grow": {"name": "grown", "pairs": "pairs", "to": 32, "images": 6400} | grow},
    ]
    return read_recipe({"name": "x", "data": {"source": "scenes"}, "stages": first}, "x.yaml")


@pytest.mark.parametrize(("preset", "norms", "trained"), [("paper", "squared", 1), ("released-code", "plain", 0)])
def test_a_preset_fills_in_what_is_known_and_no_more(preset: str, norms: str, trained: int) -> None:
    *_, distilled, grown = stages({"preset": preset}, {"preset": preset}).stages
    assert isinstance(distilled, DistillStage) and isinstance(grown, GrowStage)
    for stage in (distilled, grown):
        assert (stage.optimizer, stage.lr) == ("radam", 8e-6) and stage.losses is not None
        assert stage.lr * stage.losses.discriminator_rate == pytest.approx(2e-3)
        assert not stage.losses.mismatched  # ours
    assert (distilled.losses.norms, distilled.losses.balance, distilled.losses.scale) == (norms, "adaptive", 0.2)
    assert grown.losses is not None and (grown.losses.balance, grown.losses.scale) == ("fixed", 1.0)
    assert grown.base_blocks == trained
    assert distilled.ema == (0.1,) and grown.ema == (0.25,)  # 1000 steps of 64 in 640,000 images
    assert distilled.training().ema == (0.1,) and distilled.training().optimizer == "radam"


@pytest.mark.parametrize(("batch", "want"), [(None, 0.1), (16, 0.025), (640, 0.25)])
def test_a_presets_average_is_1000_steps_long_whatever_the_batch(batch: int | None, want: float) -> None:
    """Of 640,000 images, and 0.25 at most."""
    given = {"preset": "paper"} | ({} if batch is None else {"batch": batch})
    *_, distilled, _ = stages(given, {}).stages
    assert distilled.ema == (pytest.approx(want),)


def test_where_the_whole_base_trains_a_preset_names_no_blocks_of_it() -> None:
    for whole in ({"core": "finetune"}, {"init": "scratch"}):
        *_, grown = stages({}, {"preset": "paper"} | whole).stages
        assert isinstance(grown, GrowStage) and grown.trains_core and grown.base_blocks == 0


def test_what_the_recipe_says_stands() -> None:
    given = {"preset": "paper", "lr": 1e-4, "losses": {"norms": "plain", "pixels": 0}, "ema": [0.05]}
    *_, distilled, grown = stages(given, {}).stages
    assert (distilled.lr, distilled.losses.norms, distilled.losses.pixels) == (1e-4, "plain", 0)
    assert distilled.ema == (0.05,) and distilled.losses.discriminator_rate == 250
    assert (grown.optimizer, grown.base_blocks) == ("adamw", 0)


def test_without_a_preset_a_growth_weighs_pixels_more() -> None:
    for given, want in (
        ({}, (0.2, 4.0, 0.2, "adaptive")),
        ({"losses": {"features": 0}}, (0.0, 4.0, 0.2, "adaptive")),
        ({"losses": {"balance": "fixed"}}, (0.2, 4.0, 1.0, "fixed")),
        ({"preset": "paper"}, (1.0, 1.0, 1.0, "fixed")),
    ):
        *_, grown = stages({}, given).stages
        assert isinstance(grown, GrowStage) and grown.losses is not None
        assert (grown.losses.features, grown.losses.pixels, grown.losses.scale, grown.losses.balance) == want


@pytest.mark.parametrize(
    ("distill", "grow", "words"),
    [
        ({"preset": "papers"}, {}, "preset: got 'papers', expected to be 'paper' or 'released-code'"),
        ({"preset": ["paper"]}, {}, "preset: got a list, expected to be 'paper' or 'released-code'"),
        ({"losses": {"features": 0, "pixels": 0}}, {}, "losses: features: 0 and pixels: 0 leave no reconstruction"),
        ({}, {"losses": {"features": 0, "pixels": 0, "balance": "fixed", "adversarial": False}}, "write adversarial:"),
        ({}, {"base_blocks": 1, "core": "finetune"}, "base_blocks is for a frozen base"),
        ({}, {"base_blocks": 2}, "base_blocks: got 2, expected at most 1, the blocks of"),
        ({}, {"pairs": None, "from": "core", "preset": "paper"}, "preset is for the growth of a one-step generator"),
    ],
)
def test_mistakes_are_one_line(distill: dict[str, Any], grow: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        networks(stages(distill, grow))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"features": -0.1},
        {"pixels": -0.1},
        {"scale": 0},
        {"discriminator_rate": 0},
        {"discriminator": "lpips"},
        {"augment": ["flip"]},
        {"similarity": {"model": "x", "weight": -0.1}},
        {"similarity": {}},
        {"weight": 1},
    ],
)
def test_losses_that_mean_nothing_are_refused(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ValidationError, match=name):
        LossSettings(**given)
    edge = {"features": 0, "pixels": 0, "scale": 1e-9, "discriminator_rate": 1e-9}
    if name in edge:
        assert getattr(LossSettings(**{name: edge[name]}), name) == edge[name]


def test_the_last_blocks_of_a_base_train_and_the_rest_of_it_stays() -> None:
    low = shallow()
    free = last_blocks(low.net.config, 1)
    net, report = grow_network(low.net, grown_config(low.net.config, 32, "random", generator=True), "random")
    freeze(net, [n for n in report.loaded if not n.startswith(free)])
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert {n for n in trained if n in report.loaded} == {
        n for n in report.loaded if n.startswith("decoder.16.blocks.0.")
    }
    assert set(report.new) <= trained and last_blocks(low.net.config, 0) == ()


def test_radam_is_torchs() -> None:
    weight = torch.nn.Linear(3, 3)
    settings = TrainSettings(images=1, optimizer="radam", lr=1e-2, betas=(0.5, 0.9), weight_decay=0.1)
    (made,) = optimizers(weight, settings)
    assert isinstance(made, torch.optim.RAdam) and made.defaults["decoupled_weight_decay"]
    assert [(g["lr"], g["betas"], g["weight_decay"]) for g in made.param_groups] == [
        (1e-2, (0.5, 0.9), 0.1),
        (1e-2, (0.5, 0.9), 0.0),
    ]
