"""Growth: the identity of `preserve`, what `random` keeps, the noise level that the core receives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pixelgrow.diffusion.denoiser import Denoiser, DiffusionConfig
from pixelgrow.diffusion.heldout import SIGMAS
from pixelgrow.errors import UserError
from pixelgrow.growth import detail_std, freeze, graft, grow, grow_network, grown_config, kept_in, last_blocks, ungrown
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import CoreConfig
from pixelgrow.models.layers import box_down, up_nearest
from pixelgrow.models.sizes import SIZES, shallow_uvit
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
    """A denoiser with random parameters, those initialised to zero too: no test passes because a branch is zero."""
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


def test_random_keeps_the_core_and_removes_the_shallow_ends() -> None:
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


def test_random_removes_what_preserve_had_added_even_if_a_level_of_the_same_shape_is_new() -> None:
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
def test_the_core_receives_the_noise_level_that_it_was_trained_with(init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Averaging k x k pixels divides the noise by k: measured on noise, then on the core's input."""
    k, sigma = 4, 3.0
    noise = sigma * torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert box_down(noise, k).std().item() == pytest.approx(sigma / k, rel=0.01)
    low = shallow()
    x, c = held_out(2, 64), cond(2)
    high, _ = grow(low, 64, init, images=x, cond=c)  # type: ignore[arg-type]
    received = []
    real = UViT.embed
    monkeypatch.setattr(UViT, "embed", lambda self, level, *rest: (received.append(level), real(self, level, *rest))[1])
    high(x, torch.full((2,), sigma), c)
    low(box_down(x, k), torch.full((2,), sigma / k), c)
    torch.testing.assert_close(received[0], received[1])


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


# --- shapes by hand: tiny, 16 px on a grid of 4 x 4 -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "settings", "rungs"),
    [
        (32, {"init": "preserve"}, [("core", 4, [16]), ("base", 2, [32])]),
        (64, {"init": "preserve"}, [("core", 4, [16]), ("base", 2, [32, 64])]),
        (64, {"init": "preserve", "generator": True}, [("core", 4, [16]), ("image", 2, [32, 64])]),
        (64, {"init": "random", "generator": True}, [("core", 4, [16]), ("features", 2, [32, 64])]),
        (32, {"init": "random"}, [("core", 4, [32])]),
        (128, {"init": "random"}, [("core", 4, [32, 64, 128])]),
        (64, {"init": "scratch", "patch": 2}, [("core", 2, [32, 64])]),
        (32, {"init": "preserve", "patch": 8}, [("core", 4, [16]), ("base", 8, [32])]),
    ],
)
def test_the_rungs_that_a_core_grows(to: int, settings: dict[str, Any], rungs: list[Any]) -> None:
    made = grown_config(shallow_uvit("tiny", 16, core=CORE), to, **settings, blocks=2, detail_std=0.3)
    assert [(r.attach, r.patch, [lv.resolution for lv in r.levels]) for r in made.rungs] == rungs
    assert made.rungs[-1].detail_std == 0.3 and {lv.blocks for lv in made.rungs[-1].levels} == {2}
    assert (made.resolution, made.core_resolution, made.core_stride) == (to, 16, 4)


def test_a_level_is_as_wide_as_its_map_is_fine() -> None:
    """A map of 2^i times the core's grid has the size's i-th width; the finest all have the last."""
    widths = SIZES["tiny"].channels
    assert len(set(widths)) > 2
    core = shallow_uvit("tiny", 16, core=CORE)
    for config, doublings in (
        (grown_config(core, 128, "random"), [1, 2, 3]),  # maps of 8, 16 and 32 cells a side; the grid has 4
        (grown_config(core, 32, "preserve", patch=1), [3]),
        (grown_config(core, 32, "preserve", patch=8), [0]),
    ):
        found = [level.channels for level in config.rungs[-1].levels]
        assert found == [widths[min(i, len(widths) - 1)] for i in doublings]
    default = grown_config(core, 32, "preserve").rungs[-1]
    assert (default.detail_std, default.levels[0].blocks) == (0.1, 1)


def test_a_uvit_grows_around_its_levels_and_keeps_their_patch() -> None:
    uvit = grown_config(shallow_uvit("tiny", 16, core=CORE), 32, "random", patch=2)
    made = grown_config(uvit, 128, "random")
    assert [(r.patch, [lv.resolution for lv in r.levels]) for r in made.rungs] == [(2, [32, 64, 128])]
    assert made.rungs[0].levels[0] == uvit.rungs[0].levels[0]
    for patch in (1, 2, 4):  # a rung on top may halve the map that it stands on, and no more
        assert grown_config(uvit, 64, "preserve", patch=patch).rungs[-1].patch == patch
    with pytest.raises(UserError, match="patch 8 does not fit a growth to 64 px: choose a power of two up to 4"):
        grown_config(uvit, 64, "preserve", patch=8)


# --- what comes from where --------------------------------------------------------------------------------------------


def test_a_child_denoises_as_its_parent_did_and_its_report_counts() -> None:
    config = DiffusionConfig(prediction="v", sigma_data=0.7, sigma_min=0.01, sigma_max=30.0)
    low = Denoiser(shallow().net, config).eval()
    high, report = grow(low, 32, images=held_out(2, 32), cond=cond(2))
    assert high.config == config and not high.training
    sizes = {name: t.numel() for name, t in high.state_dict().items()}
    old = sum(t.numel() for t in low.state_dict().values())
    assert report.parameters == {"loaded": old, "new": sum(sizes.values()) - old}
    assert (report.init, report.resolution) == ("preserve", (16, 32))
    assert report.to_dict()["parameters"] == report.parameters
    deep, _ = grow(low, 32, images=held_out(2, 32), cond=cond(2), blocks=2, patch=4)
    assert (deep.net.config.rungs[1].patch, deep.net.config.rungs[1].levels[0].blocks) == (4, 2)


def test_what_is_new_is_a_function_of_the_seed_alone() -> None:
    low, made = shallow().net, []
    config = grown_config(low.config, 32, "random")
    for seed, mess in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(mess)
        before = torch.get_rng_state()
        net, report = grow_network(low, config, "random", seed)
        assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers are not used
        made.append({name: net.state_dict()[name] for name in report.new})
    assert all(torch.equal(made[0][name], t) for name, t in made[1].items())
    assert not torch.equal(made[0]["entry.32.weight"], made[2]["entry.32.weight"])


def test_both_errors_are_on_the_held_out_images_at_the_cores_noise_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`before`: the parent on the averaged noisy image, up-sampled. The error of a black image is the image itself."""
    calls: list[tuple[int, int, float]] = []

    def black(self: Denoiser, x: Tensor, sigma: Tensor, c: Cond) -> Tensor:
        calls.append((x.shape[-1], len(x), float(sigma[0])))
        return 0 * x

    monkeypatch.setattr(Denoiser, "forward", black)
    x = held_out(5, 32)
    _, report = grow(shallow(), 32, "random", images=x, cond=cond(5), batch=2)
    want = {sigma: x.double().square().mean().item() for sigma in SIGMAS}
    assert report.before == pytest.approx(want) and report.after == pytest.approx(want)
    for side, scale in ((16, 1), (32, 2)):  # in batches of at most 2, at the level that each has at its own resolution
        rows = [2, 2, 1] * len(SIGMAS)
        levels = [scale * sigma for sigma in SIGMAS for _ in range(3)]
        mine = [(n, sigma) for s, n, sigma in calls if s == side]
        assert [n for n, _ in mine] == rows and [sigma for _, sigma in mine] == pytest.approx(levels)


def test_details_are_measured_on_the_images() -> None:
    smooth = up_nearest(torch.randn(4, 3, 8, 8), 2)
    checker = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8)
    assert detail_std(smooth + 0.3 * checker, 2) == pytest.approx(0.3, rel=1e-3)
    assert detail_std(smooth, 2) == 1e-3  # never 0, which would be divided by
    fine = checker.repeat(4, 4).expand(2, 3, 64, 64)
    coarse = up_nearest(checker.repeat(2, 2).expand(2, 3, 32, 32), 2)
    for images, wanted in ((0.3 * fine, [1e-3, 0.3]), (0.3 * coarse, [0.3, 1e-3])):  # at 32 px, at 64 px
        child, _ = grow(shallow(), (32, 64), images=images, cond=cond(2))
        assert [r.detail_std for r in child.net.config.rungs[1:]] == pytest.approx(wanted, rel=1e-3)


def test_ungrown_is_the_parent() -> None:
    low = shallow()
    high = grow(low, 32, images=held_out(2, 32), cond=cond(2))[0]
    back = ungrown(high)
    assert back.net.config == low.net.config and back.config == low.config and not back.training
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in low.state_dict().items())
    with torch.no_grad():
        back.net.exit["16"].conv.weight.zero_()
    assert high.net.exit["16"].conv.weight.any()  # a copy


def entry(parent: str, **more: Any) -> dict[str, Any]:
    tensors = {"loaded": 5, "new": 2, "frozen": 5}
    return {"verb": "grow", "init": "preserve", "parent": parent, "tensors": tensors} | more


@pytest.mark.parametrize(
    ("lineage", "kept"),
    [
        ([], []),
        ([{"verb": "train"}], []),
        ([{"verb": "train"}, entry("core")], ["core"]),
        ([entry("core"), entry("mid")], ["mid", "core"]),
        ([entry("core"), entry("mid", unfrozen_after=8)], []),
        ([entry("core", unfrozen_after=8), entry("mid")], ["mid"]),
        ([entry("core", init="random")], []),
        ([entry("core", tensors={"loaded": 5, "frozen": 3})], []),
        ([entry("core", tensors={"loaded": 5})], ["core"]),  # grown, never trained
        ([entry("core"), {"verb": "train", "parent": "grown"}], []),
        ([{"verb": "grow", "init": "preserve"}], []),
        ([entry("core"), entry("mid", verb="graft", tensors={"loaded": 5, "new": 2, "dropped": 0})], ["mid", "core"]),
        ([entry("core"), entry("wide", verb="graft", tensors={"loaded": 5, "new": 2, "dropped": 2})], []),
        ([entry("core"), {"verb": "cast", "parent": "wide"}], ["wide", "core"]),  # rounded, not trained
    ],
)
def test_the_models_that_a_model_contains(lineage: list[dict[str, Any]], kept: list[str]) -> None:
    assert kept_in(lineage) == kept


def test_the_last_blocks_of_a_base() -> None:
    config = grown_config(shallow_uvit("tiny", 16, core=CORE), 64, "preserve", blocks=3)
    assert last_blocks(config, 0) == ()
    assert last_blocks(config, 2) == ("decoder.64.blocks.1.", "decoder.64.blocks.2.")
    assert len(last_blocks(config, 3)) == 3
    with pytest.raises(UserError, match="base_blocks: got 4, expected at most 3, the blocks of the base's last level"):
        last_blocks(config, 4)
    names = UViT(config).state_dict()
    assert all(any(name.startswith(prefix) for name in names) for prefix in last_blocks(config, 3))


# --- a rung of one model on another -----------------------------------------------------------------------------------


def on_top(low: UViT, to: int, seed: int, init: Any = "preserve") -> UViT:
    """`low` with a rung of `to` px, all of whose weights are random."""
    net, report = grow_network(low, grown_config(low.config, to, init), init)
    torch.manual_seed(seed)
    for name, p in net.named_parameters():
        if name in report.new:
            torch.nn.init.normal_(p, std=0.2)
    return net


def test_a_grafted_model_is_the_one_below_with_the_donors_rungs_above() -> None:
    low = shallow().net
    first, second = on_top(low, 32, 1), on_top(low, 32, 2)
    highest = on_top(second, 64, 3)
    x, s, c = held_out(2, 32), torch.tensor([0.3, 4.0]), cond(2)
    for below, donor, taken in ((low, first, first), (first, second, second), (second, highest, highest)):
        net, _ = graft(below, donor)
        assert net.config == donor.config and not net.training
        assert all(torch.equal(t, taken.state_dict()[name]) for name, t in net.state_dict().items())
    whole, count = graft(low, first)
    assert count == len(first.state_dict()) - len(low.state_dict())
    assert torch.equal(Denoiser(whole)(x, s, c), Denoiser(first).eval()(x, s, c))
    with torch.no_grad():
        whole.core.null_token.zero_()
    assert low.core.null_token.any()  # a copy
    _, count = graft(first, second)  # the rung of 32 px gives way
    assert count == len(second.state_dict()) - len(low.state_dict())


def test_models_that_cannot_be_grafted_are_one_line() -> None:
    low, other = shallow().net, shallow().net
    with torch.no_grad():
        other.core.null_token.add_(1)
    wide = UViT(shallow_uvit("tiny", 16, patch=2, core=CORE))
    for below, donor, words in (
        (low, low, "the donor has no rung above its core"),
        (wide, on_top(low, 32, 1), "the models below the rung have different shapes"),
        (other, on_top(low, 32, 1), r"1 of \d+ tensors below the rung differ, core.null_token the first"),
        (on_top(low, 32, 1), on_top(on_top(low, 32, 2), 64, 3), "tensors below the rung differ"),
    ):
        with pytest.raises(UserError, match=words):
            graft(below, donor)
