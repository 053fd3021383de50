"""The estimator of guidance weights: what it sees, what it says before it learns, its units and its stream."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.models.cond import Cond
from pixelgrow.onestep.estimator import (
    EstimateBatch,
    EstimateObjective,
    Estimator,
    batches_of,
    described,
    load_estimator,
    save_estimator,
)
from pixelgrow.onestep.features import FeatureOutput
from pixelgrow.onestep.losses import spread_of


def test_a_description_is_the_moments_of_each_layer_and_the_condition() -> None:
    given: list[Tensor] = []

    class Layers:
        teacher = SimpleNamespace(resolution=4)

        def __call__(self, images: Tensor, cond: Cond, crop: Tensor) -> FeatureOutput:
            given.append(images)
            assert torch.equal(crop, torch.full((2, 2), 0.5))
            pixels = images.flatten(2).transpose(1, 2)  # (B, 16, 3)
            return FeatureOutput([pixels, pixels[:, :, :2] ** 2], torch.tensor([[7.0], [8.0]]))

    images = torch.randn(2, 3, 8, 8)
    features: Any = Layers()
    found = described(features, images, Cond(None, None, None, torch.zeros(2, dtype=torch.bool)))
    small = torch.nn.functional.avg_pool2d(images, 2).flatten(2)  # (B, 3, 16)
    squares = small[:, :2] ** 2
    want = [small.mean(2), small.std(2, correction=0), squares.mean(2), squares.std(2, correction=0)]
    torch.testing.assert_close(found, torch.cat([*want, torch.tensor([[7.0], [8.0]])], 1))
    assert given[0].shape == (2, 3, 4, 4)


def test_it_says_the_mean_until_it_learns_and_keeps_to_the_limits_outside_of_training() -> None:
    made, spread = Estimator(6, "recaptions"), spread_of("recaptions")
    x = torch.randn(50, 6)
    torch.testing.assert_close(made(x), torch.full((50,), spread.mean))
    torch.nn.init.normal_(made.out.weight, std=20)
    wild = made(x)
    assert wild.min() < spread.low and wild.max() > spread.high  # or no gradient would lead back
    made.eval()
    torch.testing.assert_close(made(x), wild.clamp(1, 10))


def test_descriptions_arrive_standardised() -> None:
    made = Estimator(3, "captions")
    some = torch.randn(400, 3) * torch.tensor([5.0, 0.01, 0.0]) + torch.tensor([3.0, -2.0, 4.0])
    made.standardise(some)
    seen: list[Tensor] = []
    made.up.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made(some)
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[0].std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-3, rtol=0)
    assert float(made.std[2]) == pytest.approx(1e-4)  # what does not vary is not blown up without end


def test_a_constant_guess_costs_one() -> None:
    """In units of the variance; of weights that are a deviation off their mean."""
    made, spread = Estimator(4, "captions"), spread_of("captions")
    objective = EstimateObjective(made)
    assert objective.modules == {"estimator": made} and objective.rates == {"estimator": 1.0} and made.training
    off = torch.tensor([1.0, -1.0, 1.0]) * spread.std
    batch = EstimateBatch(torch.randn(3, 4), spread.mean + off, torch.arange(3))
    assert objective.loss(batch).loss.item() == pytest.approx(1, rel=1e-5)


def test_batches_are_rows_with_their_weights_each_once_in_an_epoch() -> None:
    of = torch.randn(10, 4)
    weights = of.sum(1)
    stream = batches_of(of, weights, 5, seed=3, start=20)
    some = [next(stream) for _ in range(4)]
    for i, batch in enumerate(some):
        torch.testing.assert_close(batch.description.sum(1), batch.guidance)
        assert batch.index.tolist() == list(range(20 + 5 * i, 25 + 5 * i))
    for two in (some[:2], some[2:]):
        assert torch.equal(torch.cat([b.guidance for b in two]).sort().values, weights.sort().values)
    assert not torch.equal(some[0].guidance, some[2].guidance)  # another epoch, another order
    assert not torch.equal(next(batches_of(of, weights, 5, seed=4, start=20)).guidance, some[0].guidance)


def test_a_damaged_record_is_one_line(tmp_path: Path) -> None:
    made = Estimator(4, "captions")
    facts = save_estimator(tmp_path, made, "teacher", 0.5)
    assert (facts["teacher"], facts["distribution"], facts["heldout_rmse"]) == ("teacher", "captions", 0.5)
    path = tmp_path / "estimator.json"
    for text in ("{", "[]", "{}", json.dumps(facts | {"distribution": "others"})):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"estimator\.json is damaged"):
            load_estimator(tmp_path, "teacher", "captions", torch.device("cpu"))
    path.write_text(json.dumps(facts), encoding="utf-8")
    loaded = load_estimator(tmp_path, "teacher", "captions", torch.device("cpu"))
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in made.state_dict().items())
    path.write_text(json.dumps(facts | {"sha256": "0"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"estimator\.safetensors"):
        load_estimator(tmp_path, "teacher", "captions", torch.device("cpu"))
