"""The one-step generator: its teacher evaluated once, and its growth by decoder halves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pixelgrow.diffusion.generator import Generator, with_guidance
from pixelgrow.diffusion.sampling import generate, initial_noise
from pixelgrow.errors import UserError
from pixelgrow.growth import grow_network, grown_config
from pixelgrow.models.layers import box_down, up_nearest
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.models.uvit import UViT
from test_growth import CORE, cond, shallow


def generator(dtype: torch.dtype = torch.float32) -> Generator:
    return Generator(shallow(dtype=dtype).net)


def grown(low: Generator, to: int, init: Any) -> tuple[Generator, list[str]]:
    net, report = grow_network(low.net, grown_config(low.net.config, to, init, generator=True), init)
    return Generator(net, low.config), report.loaded


def test_a_generator_is_its_teacher_evaluated_once_at_the_highest_noise() -> None:
    teacher = shallow()
    z, c = torch.randn(3, 3, 16, 16), cond(3)
    want = teacher(80 * z, torch.full((3,), 80.0), c)
    assert torch.equal(Generator(teacher.net)(z, c), want)
    one_step = generate(Generator(teacher.net), c, size=(16, 16), seed=4, batch=2)
    again = teacher(80 * initial_noise((16, 16), 4, range(3)), torch.full((3,), 80.0), c)
    torch.testing.assert_close(one_step.images, again.clamp(-1, 1))
    assert one_step.nfe == 1
    for given, words in (({"size": (8196, 16)}, "each from 1 to 8192 pixels"), ({"batch": 0}, "a batch of 1 or more"),
                         ({"index": [1]}, "3 conditions and 1 indices")):  # fmt: skip
        settings: dict[str, Any] = {"size": (16, 16)} | given
        with pytest.raises(UserError, match=words):
            generate(Generator(teacher.net), c, **settings)


@pytest.mark.parametrize("to", [32, 64])
def test_preserve_growth_of_a_generator_is_an_identity(to: int) -> None:
    low = generator(torch.float64)
    z, c = torch.randn(2, 3, 16, 16, dtype=torch.float64), cond(2, torch.float64)
    high, _ = grown(low, to, "preserve")
    assert (high.resolution, high.latent_resolution) == (to, 16)
    assert torch.equal(high(z, c), up_nearest(low(z, c), to // 16))
    for p in high.net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    twice, _ = grown(high, 2 * to, "preserve")
    assert torch.equal(twice(z, c), up_nearest(high(z, c), 2))


def test_the_papers_growth_of_a_generator_decodes_the_features_with_a_new_output_layer() -> None:
    low = generator()
    z, c = torch.randn(2, 3, 16, 24), cond(2)  # not square
    high, loaded = grown(low, 64, "random")
    assert set(loaded) == set(low.net.state_dict())
    assert high(z, c).shape == (2, 3, 64, 96)
    assert high.last_layer is high.net.exit["64"].conv.weight
    images = [r.image for r in high.rungs(z, c)]
    assert torch.equal(images[0], low(z, c))  # the image of the base
    assert not [n for n in high.net.state_dict() if n.startswith(("encoder.32", "encoder.64", "entry.64"))]
    with pytest.raises(UserError, match="is not for one-step generators"):
        grown_config(low.net.config, 64, "scratch", generator=True)


def test_a_denoiser_that_was_grown_is_a_teacher_too() -> None:
    small = UViT(shallow_uvit("tiny", 16, core=CORE))
    net, _ = grow_network(small, grown_config(small.config, 32, "preserve"), "preserve")
    made = Generator(net)
    assert (made.latent_resolution, made.denoiser.sigma_max) == (32, 160.0)
    high, _ = grown(made, 64, "preserve")
    z = torch.randn(1, 3, 32, 32)
    assert high(z, cond(1)).shape == (1, 3, 64, 64)
    assert high.latent_size((64, 128)) == (32, 64)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("init", ["preserve", "random"])
def test_a_rung_of_a_generator_adds_to_the_image_from_below_or_takes_its_place(init: Any, exact: bool) -> None:
    """`preserve`: up(G_low(z)) + detail_std F, with P F, P = 1 - up(box_down(.)), if exact; `random`: F in units
    of the data's deviation."""
    low = generator()
    config = grown_config(low.net.config, 32, init, generator=True, exact=exact, detail_std=0.3)
    net, _ = grow_network(low.net, config, init)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    z, c = torch.randn(2, 3, 16, 16), cond(2)
    below, made = Generator(net).rungs(z, c)
    f = net.decode(net.config.rungs[1], below.ctx, below.features).image
    assert f.abs().mean() > 1e-3
    want = 0.5 * f
    if init == "preserve":
        want = up_nearest(below.image, 2) + 0.3 * (f - up_nearest(box_down(f, 2), 2) if exact else f)
    torch.testing.assert_close(made.image, want)


def test_a_guidance_weight_is_a_condition_that_changes_nothing_at_first() -> None:
    plain = generator()
    net = with_guidance(plain.net, seed=0)
    made, z, c = Generator(net), torch.randn(2, 3, 16, 16), cond(2)
    assert made.guided and not plain.guided
    assert torch.equal(made(z, c, torch.tensor([1.0, 9.0])), plain(z, c))
    torch.nn.init.normal_(net.guidance.out.weight)
    low, high = (torch.full((2,), weight) for weight in (2.0, 9.0))
    assert (made(z, c, low) - made(z, c, high)).abs().mean() > 0.01
    assert torch.equal(made.preview(z, c, high), made(z, c, high))  # of one rung
    other = with_guidance(plain.net, seed=1)
    assert not torch.equal(other.guidance.up.weight, with_guidance(plain.net, seed=0).guidance.up.weight)
