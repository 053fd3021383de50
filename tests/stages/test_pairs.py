"""The `pairs` stage: how shards are made."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from pixelgrow.data.loader import Loader
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.onestep.pairs import Ode
from pixelgrow.recipe.stages import PairsStage
from pixelgrow.stages.materials import Materials
from pixelgrow.stages.pairs import Work
from test_growth import cond, shallow


def test_pairs_that_are_sampled_decode_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = shallow(dtype=torch.float32)
    loader = Loader(Scenes(n=50, captions=10, seed=1), size=(16, 16), batch=4)
    text = SimpleNamespace(cond=lambda captions: cond(len(captions)))
    raw = loader.load(8)
    decoded: list[int] = []
    monkeypatch.setattr(Scenes, "image", lambda *_, **__: decoded.append(1) or np.zeros((16, 16, 3), np.uint8))

    def origins(direction: Any) -> torch.Tensor:
        stage = PairsStage(name="p", n=8, direction=direction, batch=4, shard=4, steps=2)
        ode = Ode(stage.sampler, stage.steps, denoiser.sigma_min, denoiser.sigma_max)
        materials = cast(Materials, SimpleNamespace(text=text))
        work = Work(stage, denoiser, ode, loader, materials, 0, threading.Lock(), threading.Event())
        return work.shard(8, 12, lambda _: None)["origin"]

    assert torch.equal(origins("sample"), origins("invert")) and len(decoded) == 4
    captions = loader.load(8, decode=False)
    assert captions.text == raw.text and np.array_equal(captions.origin, raw.origin)
    assert captions.image.size == 0
