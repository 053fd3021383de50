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
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.generator import Generator, with_guidance
from pixelgrow.growth import grow_network, grown_config
from pixelgrow.models.layers import box_down, details
from pixelgrow.models.uvit import UViT
from pixelgrow.onestep.pairs import Ode, reduced
from pixelgrow.recipe.stages import PairsStage
from pixelgrow.stages.materials import Materials
from pixelgrow.stages.pairs import Models, Work, _Stopped
from test_growth import cond, shallow


def work(denoiser: Denoiser, stage: PairsStage, generator: Generator | None = None) -> Work:
    side = denoiser.resolution
    loader = Loader(Scenes(n=50, captions=10, seed=1), size=(side, side), batch=4)
    text = SimpleNamespace(cond=lambda captions: cond(len(captions)))
    ode = Ode(stage.sampler, stage.steps, denoiser.sigma_min, denoiser.sigma_max)
    materials = cast(Materials, SimpleNamespace(text=text))
    return Work(stage, Models(denoiser, generator), ode, loader, materials, 0, threading.Lock(), threading.Event())


@pytest.mark.parametrize("direction", ["invert", "sample"])
def test_pairs_of_an_exact_teacher_are_solved_at_the_lowest_resolution(
    direction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a worker whose run was stopped ends after a step."""
    low = shallow(dtype=torch.float32)
    net, _ = grow_network(low.net, grown_config(low.net.config, 32, "preserve"), "preserve")
    made = work(Denoiser(net).eval(), PairsStage(name="p", n=4, direction=direction, batch=4, shard=4, steps=6))
    sides: list[int] = []
    real = UViT.rung
    monkeypatch.setattr(UViT, "rung", lambda net, rung, x, *a: sides.append(x.shape[-1]) or real(net, rung, x, *a))
    monkeypatch.setattr(
        "pixelgrow.diffusion.progressive.box_down",
        lambda x, k: sides.append(-x.shape[-1] // k) or box_down(x, k),
    )
    made.shard(0, 4, lambda _: None)
    assert {16, 32, -16} <= set(sides)  # the state itself was averaged down
    made.stopped.set()
    sides.clear()
    with pytest.raises(_Stopped):
        made.shard(0, 4, lambda _: None)
    assert sum(side == 16 for side in sides) <= 2  # Heun's method evaluates twice


@pytest.mark.parametrize("guided", [False, True])
def test_upscaled_pairs_average_down_to_the_generators_images(guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no network is evaluated above the gate; details are those of the teacher with the generator's image below."""
    low = shallow(dtype=torch.float32)
    net, _ = grow_network(low.net, grown_config(low.net.config, 32, "preserve", until=0.5), "preserve")
    for name, p in net.named_parameters():
        if name not in dict(low.net.named_parameters()):
            torch.nn.init.normal_(p, std=0.1)
    generator = Generator(with_guidance(shallow().net, 0) if guided else shallow().net).eval()
    settings: dict[str, Any] = {"direction": "sample", "upscales": "g", "guidance": 2.0, "sampler": "ddim", "steps": 8}
    made = work(Denoiser(net).eval(), PairsStage(name="p", n=4, batch=4, shard=4, **settings), generator)
    levels: list[float] = []
    real = Denoiser.forward
    monkeypatch.setattr(Denoiser, "forward", lambda d, x, s, *a: levels.append(float(s[0])) or real(d, x, s, *a))
    pairs = made.shard(0, 4, lambda _: None)
    assert levels and max(levels) <= 2 * 0.5  # sigma at 32 px
    z = reduced(pairs["latent"].float(), 16)
    captions = [text for _, texts, *_ in made.batches(0, 4, decode=False) for text in texts]
    images = generator(z, cond(len(captions)), torch.full((4,), 2.0) if guided else None).clamp(-1, 1)
    image = pairs["image"].float()
    assert torch.allclose(box_down(image, 2), images, atol=4e-3)
    assert details(image, 2).abs().max() > 0.01


def test_an_interval_limits_guidance() -> None:
    denoiser = shallow(dtype=torch.float32)

    def images(**given: Any) -> torch.Tensor:
        stage = PairsStage(name="p", n=4, batch=4, shard=4, direction="sample", sampler="ddim", steps=8, **given)
        return work(denoiser, stage).shard(0, 4, lambda _: None)["image"]

    none, all_of = images(guidance=1.0), images(guidance=5.0)
    assert not torch.equal(none, all_of)
    assert torch.equal(images(guidance=5.0, interval=(0.0, 1e4)), all_of)
    assert torch.equal(images(guidance=5.0, interval=(1e4, 2e4)), none)


def test_pairs_that_are_sampled_decode_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = shallow(dtype=torch.float32)
    loader = work(denoiser, PairsStage(name="p", n=8, batch=4, shard=4)).loader
    raw = loader.load(8)
    decoded: list[int] = []
    monkeypatch.setattr(Scenes, "image", lambda *_, **__: decoded.append(1) or np.zeros((16, 16, 3), np.uint8))

    def origins(direction: Any) -> torch.Tensor:
        made = work(denoiser, PairsStage(name="p", n=8, direction=direction, batch=4, shard=4, steps=2))
        return made.shard(8, 12, lambda _: None)["origin"]

    assert torch.equal(origins("sample"), origins("invert")) and len(decoded) == 4
    captions = loader.load(8, decode=False)
    assert captions.text == raw.text and np.array_equal(captions.origin, raw.origin)
    assert captions.image.size == 0
