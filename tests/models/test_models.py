"""The networks: counts on the meta device, any size that fits, conditions that matter, text that is masked."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.errors import UserError
from pixelgrow.growth import grown_config
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import CoreConfig, LevelConfig, NetConfig, RungConfig
from pixelgrow.models.core import Block
from pixelgrow.models.layers import sincos_positions
from pixelgrow.models.sizes import SIZES, core_config, shallow_uvit, size
from pixelgrow.models.uvit import UViT

CORE = CoreConfig(width=32, depth=2, heads=2, text_dim=8, pooled_dim=8)


def net(resolution: int = 16, core: CoreConfig = CORE) -> Denoiser:
    torch.manual_seed(0)
    model = UViT(shallow_uvit("tiny", resolution, core=core))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return Denoiser(model).eval()


def cond(n: int, length: int = 6) -> Cond:
    g = torch.Generator().manual_seed(5)
    return Cond(
        torch.randn(n, length, 8, generator=g),
        torch.ones(n, length, dtype=torch.bool),
        torch.randn(n, 8, generator=g),
        torch.zeros(n, dtype=torch.bool),
    )


def count(config: NetConfig) -> tuple[int, int]:
    """Parameters of the core and of everything else, nothing allocated."""
    with torch.device("meta"):
        model = UViT(config)
    core = sum(p.numel() for p in model.core.parameters())
    return core, sum(p.numel() for p in model.parameters()) - core


@pytest.mark.parametrize("name", SIZES)
def test_the_ladder_counts_what_its_names_say(name: str) -> None:
    core, levels = count(shallow_uvit(name, 64))
    assert core + levels == pytest.approx(SIZES[name].parameters, rel=0.03)
    assert levels < core / 4


@pytest.mark.parametrize("width", [2048, 4096])
def test_a_core_block_has_the_papers_count(width: int) -> None:
    """14 d^2 + 8192 d with 4096-wide text: 75.5M at 2048, 268M at 4096; biases, norms and tables are below 0.1%."""
    with torch.device("meta"):
        block = Block(CoreConfig(width=width, depth=1, heads=width // 64, text_dim=4096, pooled_dim=4096))
    assert sum(p.numel() for p in block.parameters()) == pytest.approx(14 * width**2 + 8192 * width, rel=1e-3)


def test_unknown_size_is_one_line() -> None:
    with pytest.raises(UserError, match="tiny, small"):
        size("medium")


@pytest.mark.parametrize("hw", [(16, 16), (8, 24), (40, 4)])
def test_any_size_that_the_grid_divides(hw: tuple[int, int]) -> None:
    out = net()(torch.randn(2, 3, *hw), torch.ones(2), cond(2))
    assert out.shape == (2, 3, *hw) and out.isfinite().all()


def test_a_position_means_the_same_in_every_shape_and_no_two_are_alike() -> None:
    at = {
        size: sincos_positions(size, 64, torch.device("cpu"), torch.float32) for size in ((16, 16), (8, 32), (128, 32))
    }
    square, wide, long = (at[size].unflatten(0, size) for size in at)
    assert torch.equal(square[4:12], wide[:, 8:24])  # the same offsets from the centre
    assert torch.cdist(long.flatten(0, 1), long.flatten(0, 1)).fill_diagonal_(9).min() > 0.5


def test_a_size_that_does_not_fit_says_what_would() -> None:
    with pytest.raises(UserError, match="multiples of 4; the nearest is 16x20"):
        net()(torch.randn(1, 3, 17, 21), torch.ones(1), cond(1))


@pytest.mark.parametrize(("init", "to"), [("preserve", 32), ("preserve", 64), ("random", 32), ("random", 64)])
def test_grown_networks_take_other_shapes(init: str, to: int) -> None:
    config = grown_config(net().net.config, to, init)  # type: ignore[arg-type]
    out = Denoiser(UViT(config))(torch.randn(1, 3, to, 2 * to), torch.ones(1), cond(1))
    assert out.shape == (1, 3, to, 2 * to)


@pytest.mark.parametrize("patch", [1, 2])
def test_a_finer_entry_keeps_the_cores_grid(patch: int) -> None:
    config = shallow_uvit("tiny", 16, patch=patch, core=CORE)
    assert (config.stride, config.rungs[0].patch) == (4, patch)
    assert Denoiser(UViT(config))(torch.randn(1, 3, 8, 16), torch.ones(1), cond(1)).shape == (1, 3, 8, 16)
    grown = grown_config(config, 32, "random")
    assert [level.resolution for level in grown.rungs[0].levels] == [32]
    with pytest.raises(UserError, match="does not divide"):
        shallow_uvit("tiny", 16, patch=3, core=CORE)


def test_masked_tokens_have_no_effect_and_rows_are_independent() -> None:
    d, c = net(), cond(3)
    assert c.tokens is not None and c.mask is not None
    x, s = torch.randn(3, 3, 16, 16), torch.tensor([0.1, 1.0, 10.0])
    mask = c.mask.clone()
    mask[:, 4:] = False
    garbage = c.tokens.clone()
    garbage[:, 4:] = 100.0
    short = Cond(c.tokens[:, :4], c.mask[:, :4], c.pooled, c.null)
    want = d(x, s, short)
    torch.testing.assert_close(d(x, s, Cond(garbage, mask, c.pooled, c.null)), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d(x[1:2], s[1:2], short[1:2]), want[1:2], rtol=1e-4, atol=1e-5)


def test_text_noise_level_and_null_matter() -> None:
    d, c = net(), cond(2)
    x, s = torch.randn(1, 3, 16, 16).expand(2, -1, -1, -1), torch.ones(2)
    out = d(x, s, c)
    assert (out[0] - out[1]).abs().max() > 1e-3
    null = d(x, s, c.dropped())
    torch.testing.assert_close(null[0], null[1])
    assert (null[0] - out[0]).abs().max() > 1e-3
    one = c.dropped(torch.tensor([False, True]))
    torch.testing.assert_close(d(x, s, one), torch.stack([out[0], null[1]]), rtol=1e-4, atol=1e-5)


def test_text_tokens_arrive_white() -> None:
    g = torch.Generator().manual_seed(0)
    few = torch.randn(5000, 6, generator=g) * torch.tensor([0.05, 0.1, 1, 2, 5, 9]) @ torch.randn(6, 8, generator=g) + 3
    core = net().net.core
    tokens = few[:64].view(8, 8, 8)
    c = Cond(tokens, torch.ones(8, 8, dtype=torch.bool), torch.randn(8, 8), torch.zeros(8, dtype=torch.bool))
    torch.testing.assert_close(core.embed(torch.zeros(8), c).text, tokens)
    core.whiten(few.split(999))
    seen = (few - core.text_mean) @ core.text_scale
    assert seen.mean(0).abs().max() < 1e-3
    spread = torch.linalg.eigvalsh(seen.T.cov().double())
    assert spread[:2].max() < 1e-3  # directions without variance are not amplified
    assert spread[-3:].min() > 0.9
    torch.testing.assert_close(core.embed(torch.zeros(8), c).text, seen[:64].view(8, 8, 8))
    null = core.embed(torch.zeros(8), c.dropped()).text
    torch.testing.assert_close(null[0, 0], core.null_token)


def test_class_labels_are_learned_tokens() -> None:
    core = CoreConfig(width=32, depth=1, heads=2, text_dim=8, pooled_dim=8, classes=5)
    d = net(core=core)
    c = Cond(None, None, None, torch.tensor([False, False, True]), torch.tensor([1, 4, 4]))
    out = d(torch.ones(3, 3, 16, 16), torch.ones(3), c)
    assert (out[0] - out[1]).abs().max() > 1e-3 and (out[1] - out[2]).abs().max() > 1e-3


def test_configurations_that_make_no_sense_are_refused() -> None:
    level = LevelConfig(resolution=16, channels=8)
    with pytest.raises(ValidationError, match="doublings"):
        RungConfig(levels=(level,), patch=4)
        NetConfig(
            size="tiny", core=CORE, core_resolution=16, core_stride=4,
            rungs=(RungConfig(levels=(level, LevelConfig(resolution=48, channels=8)), patch=4),),
        )  # fmt: skip
    with pytest.raises(ValidationError, match="heads"):
        CoreConfig(width=32, depth=1, heads=5)
    with pytest.raises(ValidationError, match="depht"):
        CoreConfig.model_validate({"width": 32, "depht": 1, "heads": 2})


def test_the_default_core_takes_the_encoders_width() -> None:
    assert core_config("tiny", text_dim=512, pooled_dim=64).pooled_dim == 64
    assert core_config("huge").text_dim == 4096
