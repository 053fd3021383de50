"""Growth: the identity of `preserve`, what `random` keeps, what the core is told."""

from __future__ import annotations

import pytest
import torch

from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.errors import UserError
from pixelgrow.growth import freeze, grow, grown_config
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import CoreConfig
from pixelgrow.models.layers import box_down, up_nearest
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.models.uvit import UViT

CORE = CoreConfig(width=32, depth=2, heads=2, text_dim=8, pooled_dim=8)


def cond(n: int, dtype: torch.dtype = torch.float32) -> Cond:
    g = torch.Generator().manual_seed(5)
    mask = torch.arange(6) < torch.randint(1, 7, (n, 1), generator=g)
    return Cond(
        torch.randn(n, 6, 8, generator=g, dtype=dtype),
        mask,
        torch.randn(n, 8, generator=g, dtype=dtype),
        torch.arange(n) % 3 == 2,
    )


def shallow(resolution: int = 16, dtype: torch.dtype = torch.float32) -> Denoiser:
    """A denoiser whose every parameter is random, zero-started ones too, so that nothing passes by being zero."""
    torch.manual_seed(3)
    net = UViT(shallow_uvit("tiny", resolution, core=CORE))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return Denoiser(net).to(dtype).eval()


def held_out(n: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(7), dtype=dtype) * 2 - 1


@pytest.mark.parametrize("k", [2, 4])
def test_preserve_is_an_identity_bit_for_bit_in_float64(k: int) -> None:
    low = shallow(dtype=torch.float64)
    x, c = held_out(4, 16 * k, torch.float64), cond(4, torch.float64)
    high, _ = grow(low, 16 * k, images=x, cond=c)
    for sigma in (0.01, 0.7, 60.0):
        s = torch.full((4,), sigma, dtype=torch.float64)
        noisy = x + sigma * torch.randn_like(x)
        want = low(box_down(noisy, k), s / k, c)
        got = high(noisy, s, c)
        assert torch.equal(box_down(got, k), want)
        assert torch.equal(got, up_nearest(want, k))


def test_preserve_is_an_identity_to_rounding_in_float32_and_for_other_sizes() -> None:
    low = shallow()
    x, c = held_out(3, 32), cond(3)
    high, report = grow(low, 32, images=x, cond=c)
    wide = torch.randn(3, 3, 32, 48)
    s = torch.tensor([0.1, 1.0, 9.0])
    torch.testing.assert_close(box_down(high(wide, s, c), 2), low(box_down(wide, 2), s / 2, c), rtol=1e-5, atol=1e-5)
    assert report.before == pytest.approx(report.after, rel=1e-5)
    assert not report.dropped and set(report.loaded) == set(low.net.state_dict())


def test_a_grown_model_grows_again_and_stays_an_identity() -> None:
    low = shallow(dtype=torch.float64)
    x, c = held_out(2, 64, torch.float64), cond(2, torch.float64)
    mid = grow(low, 32, images=box_down(x, 2), cond=c)[0]
    for p in mid.net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    high = grow(mid, 64, images=x, cond=c)[0]
    s = torch.tensor([0.3, 20.0], dtype=torch.float64)
    assert torch.equal(box_down(high(x, s, c), 2), mid(box_down(x, 2), s / 2, c))
    assert torch.equal(high.base(x, s, c), high(x, s, c))
    direct = grow(low, 64, images=x, cond=c)[1]
    assert [n for n in direct.new if n.startswith("encoder.32")] and [
        n for n in direct.new if n.startswith("encoder.64")
    ]


def test_random_keeps_the_core_and_throws_the_shallow_ends_away() -> None:
    low = shallow()
    x, c = held_out(2, 64), cond(2)
    high, report = grow(low, 64, "random", images=x, cond=c)
    assert report.loaded and all(n.startswith("core.") for n in report.loaded)
    assert all(n.split(".")[1] == "16" for n in report.dropped)
    new, old = high.net.state_dict(), low.net.state_dict()
    assert all(torch.equal(new[n], old[n]) for n in report.loaded)
    assert sorted(report.loaded + report.new) == sorted(new)
    again, second = grow(high, 128, "random", images=held_out(2, 128), cond=c)
    assert {"encoder.32", "encoder.64"} == {
        ".".join(n.split(".")[:2]) for n in second.loaded if n.startswith("encoder")
    }
    assert sorted({n.split(".")[0] for n in second.dropped}) == ["entry", "exit"]
    assert again(held_out(2, 128), torch.ones(2), c).shape == (2, 3, 128, 128)


def test_random_throws_away_what_preserve_had_added_even_where_a_level_of_the_same_shape_comes() -> None:
    low = shallow()
    mid = grow(low, 64, images=held_out(2, 64), cond=cond(2))[0]  # levels 32 and 64 on the finished network
    high, report = grow(mid, 128, "random", images=held_out(2, 128), cond=cond(2))
    shared = [n for n, t in high.net.state_dict().items() if n in mid.net.state_dict() and not n.startswith("core.")]
    assert shared and all(n.startswith("core.") for n in report.loaded) and set(shared) <= set(report.new)
    assert not torch.equal(high.net.decoder["64"].up.weight, mid.net.decoder["64"].up.weight)


def test_several_steps_at_once_are_an_identity_and_report_the_whole_way() -> None:
    low = shallow(dtype=torch.float64)
    x, c = held_out(2, 64, torch.float64), cond(2, torch.float64)
    high, report = grow(low, (32, 64), images=x, cond=c)
    assert [r.resolution for r in high.net.config.rungs] == [16, 32, 64] and report.resolution == (16, 64)
    assert set(report.loaded) == set(low.net.state_dict())
    s = torch.tensor([0.3, 20.0], dtype=torch.float64)
    assert torch.equal(box_down(high(x, s, c), 4), low(box_down(x, 4), s / 4, c))
    assert report.before == pytest.approx(report.after, rel=1e-9)


def test_a_core_with_a_finer_entry_than_usual_grows_by_default() -> None:
    config = shallow_uvit("tiny", 32, stride=8, patch=1, core=CORE)
    assert grown_config(config, 64, "preserve").rungs[-1].patch == 2


def test_scratch_has_the_shape_of_random_and_loads_no_weight() -> None:
    low = shallow()
    low.net.core.whiten([torch.randn(100, 8) * 3 + 1])
    x, c = held_out(2, 32), cond(2)
    a, report = grow(low, 32, "scratch", images=x, cond=c)
    b, _ = grow(low, 32, "random", images=x, cond=c)
    assert report.loaded == ["core.text_mean", "core.text_scale"]
    assert torch.equal(a.net.core.text_scale, low.net.core.text_scale)
    assert {k: v.shape for k, v in a.net.state_dict().items()} == {k: v.shape for k, v in b.net.state_dict().items()}


@pytest.mark.parametrize("init", ["random", "preserve"])
def test_the_core_is_told_the_noise_level_it_was_trained_with(init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooling k x k pixels divides the noise by k: measured on noise itself, then on what the core is told."""
    k, sigma = 4, 3.0
    noise = sigma * torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert box_down(noise, k).std().item() == pytest.approx(sigma / k, rel=0.01)
    low = shallow()
    x, c = held_out(2, 64), cond(2)
    high, _ = grow(low, 64, init, images=x, cond=c)  # type: ignore[arg-type]
    told = []
    real = UViT.embed
    monkeypatch.setattr(UViT, "embed", lambda self, level, *rest: (told.append(level), real(self, level, *rest))[1])
    high(x, torch.full((2,), sigma), c)
    low(box_down(x, k), torch.full((2,), sigma / k), c)
    torch.testing.assert_close(told[0], told[1])


def test_frozen_means_no_gradient() -> None:
    low = shallow()
    x, c = held_out(2, 32), cond(2)
    high, report = grow(low, 32, images=x, cond=c)
    freeze(high.net, report.loaded)
    high(x, torch.ones(2), c).square().mean().backward()
    for name, p in high.net.named_parameters():
        assert (p.grad is None) == (name in report.loaded), name


@pytest.mark.parametrize("to", [16, 24, 48, 8])
def test_growth_by_no_power_of_two_is_one_line(to: int) -> None:
    with pytest.raises(UserError, match="powers of two"):
        grow(shallow(), to, images=held_out(2, to), cond=cond(2))


@pytest.mark.parametrize("patch", [3, 16])
@pytest.mark.parametrize("init", ["preserve", "random"])
def test_a_patch_that_does_not_fit_is_one_line(patch: int, init: str) -> None:
    with pytest.raises(UserError, match=f"patch {patch} does not fit a growth to 32 px"):
        grown_config(shallow().net.config, 32, init, patch=patch)  # type: ignore[arg-type]


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("to", [32, 64])
def test_patches_that_fit_run(patch: int, to: int) -> None:
    for init in ("preserve", "random"):
        denoiser = Denoiser(UViT(grown_config(shallow().net.config, to, init, patch=patch)))  # type: ignore[arg-type]
        x = torch.zeros(2, 3, to, to)
        assert denoiser(x, torch.ones(2), cond(2)).shape == x.shape
