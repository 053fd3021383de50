"""Exact growth: for all weights of the rungs, the average of an image is the image of the model below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from pixelgrow.diffusion.denoiser import Denoiser, NoiseConfig, NoiseSchedule, RungImage
from pixelgrow.diffusion.generator import Generator
from pixelgrow.diffusion.guidance import Guided
from pixelgrow.diffusion.progressive import climb, floors_of
from pixelgrow.diffusion.sampling import generate, initial_noise, karras_grid, sample
from pixelgrow.diffusion.solvers import trajectory
from pixelgrow.errors import UserError
from pixelgrow.growth import freeze, grow, grow_network, grown_config
from pixelgrow.models.cond import Cond
from pixelgrow.models.layers import bounded, box_down, details
from pixelgrow.models.uvit import UViT
from test_growth import cond, shallow

SAMPLERS = ["ddim", "ddpm", "heun", "dpm++2m"]
INF = float("inf")
SETTINGS: dict[str, dict[str, Any]] = {
    "alone": {},
    "guided": {"guidance": 4.0},
    "interval": {"guidance": 4.0, "interval": (1.0, 40.0)},
    "threshold": {"guidance": 4.0, "threshold": 0.9},
    "core alone": {"guidance": 4.0, "guide_details": False},
}


M = TypeVar("M", bound=nn.Module)


def randomized(module: M) -> M:
    """A module with all of its weights moved at random."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    return module.eval()


def stacked(net: UViT, gates: tuple[float, float], *, exact: bool = True, generator: bool = False) -> UViT:
    for to, until in zip((16, 32), gates, strict=True):
        config = grown_config(net.config, to, "preserve", exact=exact, until=until, generator=generator)
        net, _ = grow_network(net, config, "preserve")
    return net


def grown(gates: tuple[float, float] = (INF, INF), *, exact: bool = True) -> Denoiser:
    """A float64 model of 8, 16 and 32 px with random weights everywhere. Gains are of size 1: larger ones would let
    details grow from step to step, and their rounding with them."""
    low = shallow(8).double()
    model = randomized(Denoiser(stacked(low.net, gates, exact=exact), low.config))
    for rung in model.rung_configs[1:]:
        conv = model.net.get_submodule(f"exit.{rung.resolution}.conv")
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        with torch.no_grad():
            conv.weight[-(rung.patch**2) :] *= 0.1
    return model


def conditions(n: int = 2) -> Cond:
    return cond(n).to(dtype=torch.float64)


NOISES = [initial_noise((32, 32), 7, [n, n + 10]).double() for n in range(9)]


def noise(step: int) -> Tensor:
    return NOISES[step]


def end_of(denoiser: Denoiser, x: Tensor, grid: Tensor, sampler: str, k: int = 1, **settings: Any) -> Tensor:
    """The end of sampling or inversion at full resolution, of a model `k` times smaller than the noise."""
    solver = Guided(denoiser, conditions(), **settings)
    *_, end = trajectory(solver, x, grid, sampler, lambda step: k * box_down(noise(step), k))
    return end


def smaller(settings: dict[str, Any], k: int) -> dict[str, Any]:
    """Settings for a model `k` times smaller."""
    return settings | ({"interval": tuple(v / k for v in settings["interval"])} if "interval" in settings else {})


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@torch.no_grad()
def test_a_sample_averages_down_to_the_cores(sampler: str, settings: dict[str, Any]) -> None:
    high = grown()
    grid = karras_grid(5, high.sigma_min, high.sigma_max)
    x = high.sigma_max * NOISES[-1]
    whole = end_of(high, x, grid, sampler, **settings)
    for height, k in ((1, 4), (2, 2)):
        low = end_of(high.lower(height), box_down(x, k), grid / k, sampler, k, **smaller(settings, k))
        assert (box_down(whole, k) - low).abs().max() < 1e-10 * low.abs().max()
    assert details(whole, 2).abs().mean() > 1e-2  # and has details of its own


@torch.no_grad()
def test_plain_preserve_does_not() -> None:
    high = grown(exact=False)
    grid = karras_grid(5, high.sigma_min, high.sigma_max)
    x = high.sigma_max * NOISES[-1]
    low = end_of(high.lower(1), box_down(x, 4), grid / 4, "ddim", 4)
    assert (box_down(end_of(high, x, grid, "ddim"), 4) - low).abs().max() > 1e-2


@torch.no_grad()
def test_guided_by_its_own_base_it_averages_down_to_the_base_unguided() -> None:
    high = grown()
    grid = karras_grid(5, high.sigma_min, high.sigma_max)
    x = high.sigma_max * NOISES[-1]
    whole = end_of(high, x, grid, "heun", guidance=4.0, guide=high.base)
    mid = end_of(high.lower(2), box_down(x, 2), grid / 2, "heun", 2)
    assert (box_down(whole, 2) - mid).abs().max() < 1e-10


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm++2m"])
@torch.no_grad()
def test_so_does_a_latent(sampler: str) -> None:
    high = grown()
    grid = karras_grid(6, high.sigma_min, high.sigma_max).flip(0)
    x = NOISES[0].clamp(-1, 1)
    whole = end_of(high, x, grid, sampler)
    for height, k in ((1, 4), (2, 2)):
        low = end_of(high.lower(height), box_down(x, k), grid / k, sampler)
        assert (box_down(whole, k) - low).abs().max() < 1e-10 * low.abs().max()


@torch.no_grad()
def test_so_does_a_generators_image() -> None:
    low = randomized(shallow(8).double())
    base = Generator(low.net, low.config)
    high = randomized(Generator(stacked(low.net, (INF, INF), generator=True).double(), low.config))
    base.net.load_state_dict({n: high.net.state_dict()[n] for n in base.net.state_dict()})
    z = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = high(z, conditions())
    assert high.exact_factors == [2, 2] and details(made, 2).abs().mean() > 1e-2
    assert (box_down(made, 4) - base(z, conditions())).abs().max() < 1e-10


@torch.no_grad()
def test_in_bfloat16_it_is_exact_to_float32s_rounding() -> None:
    high, x, sigma = grown().float(), NOISES[0].float(), torch.tensor([0.1, 2.0])
    low = randomized(shallow(8))
    net = stacked(low.net, (INF, INF), generator=True)
    one_step, z = randomized(Generator(net, low.config)), box_down(x, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, core = high(x, sigma, cond(2)), high.lower(1)(box_down(x, 4), sigma / 4, cond(2))
        made, base = one_step(z, cond(2)), one_step.preview(z, cond(2))
    assert details(whole, 2).abs().mean() > 1e-3 and details(made, 2).abs().mean() > 1e-3
    assert (box_down(whole, 4) - core).abs().max() < 1e-5
    assert (box_down(made, 4) - base).abs().max() < 1e-5


@torch.no_grad()
def test_guiding_only_the_core_refines_the_mixed_image_with_the_features_of_the_condition() -> None:
    high, x, sigma = grown(), 3 * NOISES[0], torch.full((2,), 2.0, dtype=torch.float64)
    first, weak = (next(high.rungs(x, sigma, c)) for c in (conditions(), conditions().dropped()))
    assert not torch.allclose(first.features, weak.features)
    mixed = RungImage(weak.image + 3.0 * (first.image - weak.image), first.features, first.ctx)
    *_, last = high._rest(x, sigma, mixed)
    made = Guided(high, conditions(), guidance=3.0, guide_details=False)(x, 2.0)
    assert (made - last.image).abs().max() < 1e-10


@torch.no_grad()
def test_guiding_only_the_core_leaves_details_to_the_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The average is the guided core's; the rungs are evaluated only on the rows of the condition."""
    high, x, rows = grown(), 3 * NOISES[0], dict[int, int]()
    real = UViT.rung
    monkeypatch.setattr(UViT, "rung", lambda net, r, v, *a: rows.update({r.resolution: len(v)}) or real(net, r, v, *a))
    guided = Guided(high, conditions(), guidance=3.0, guide_details=False)
    made = guided(x, 2.0)
    assert rows == {8: 4, 16: 2, 32: 2} and guided.nfe == 2
    guided(x, 1.0)
    assert guided.nfe == 4
    core = Guided(high.lower(1), conditions(), guidance=3.0)(box_down(x, 4), 0.5)
    assert (box_down(made, 4) - core).abs().max() < 1e-12
    weak, whole = (
        high(x, torch.full((2,), 2.0, dtype=torch.float64), c) for c in (conditions().dropped(), conditions())
    )
    assert (details(made, 2) - details(weak + 3.0 * (whole - weak), 2)).abs().max() > 1e-3
    with pytest.raises(UserError, match="guide_details=False guides the core"):
        Guided(high, conditions(), guidance=3.0, guide=high.base, guide_details=False)


# --- gates and progressive sampling -------------------------------------------------------------------------------

GATED = (1.5, 0.4)
PATHS: dict[str, Callable[[Denoiser], dict[str, Any]]] = {
    name: (lambda _, given=given: given) for name, given in SETTINGS.items()
} | {"base": lambda high: {"guidance": 3.0, "guide": high.base}}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@torch.no_grad()
def test_progressive_sampling_is_sampling_at_full_resolution(
    sampler: str, path: Callable[[Denoiser], dict[str, Any]]
) -> None:
    high = grown(GATED)
    settings, grid = path(high), karras_grid(7, high.sigma_min, high.sigma_max)
    floors = floors_of(Guided(high, conditions(), **settings))
    assert [floor.scale for floor in floors] == [4, 2, 1]
    x = high.sigma_max * NOISES[-1]
    sides = [made.shape[-1] for made in climb(floors, x, grid, sampler, noise)]
    assert set(sides) == {8, 16, 32} and sides == sorted(sides)
    *_, end = climb(floors, x, grid, sampler, noise)
    assert (end - end_of(high, x, grid, sampler, **settings)).abs().max() < 1e-10 * end.abs().max()


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm++2m"])
@torch.no_grad()
def test_progressive_inversion_too(sampler: str) -> None:
    high = grown(GATED)
    grid = karras_grid(7, high.sigma_min, high.sigma_max).flip(0)
    x = NOISES[0].clamp(-1, 1)
    steps = list(climb(floors_of(Guided(high, conditions())), x, grid, sampler))
    full = end_of(high, x, grid, sampler)
    assert {s.shape[-1] for s in steps} == {8, 16, 32}
    assert (steps[-1] - full).abs().max() < 1e-10 * full.abs().max()


@torch.no_grad()
def test_above_its_gate_a_rung_adds_nothing_and_is_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    high = grown(GATED)
    sides: list[int] = []
    real = UViT.rung
    monkeypatch.setattr(UViT, "rung", lambda net, rung, *a: (sides.append(rung.resolution), real(net, rung, *a))[1])
    x = 8 * NOISES[0]
    for sigma, expected in ((1.59, [8, 16, 32]), (1.61, [8, 16]), (5.99, [8, 16]), (6.01, [8])):
        sides.clear()
        made = high(x, torch.full((2,), sigma, dtype=torch.float64), conditions())
        assert sides == expected
        k = 32 // expected[-1]
        assert (details(made, k).abs().max() < 1e-12) or k == 1
    both = high(x, torch.tensor([1.0, 7.0], dtype=torch.float64), conditions())  # each row by its own sigma
    assert details(both[:1], 2).abs().max() > 1e-3 and details(both[1:], 4).abs().max() < 1e-12


@torch.no_grad()
def test_a_generator_of_a_gated_teacher_has_all_of_its_rungs() -> None:
    """It is evaluated at one noise level, the highest, above every gate."""
    teacher = grown(GATED)
    generator = Generator(teacher.net, teacher.config)
    z = NOISES[0]
    made = generator(z, conditions())
    assert made.shape == z.shape and details(made, 2).abs().mean() > 1e-2
    assert generator.exact_factors == [2, 2]
    sigma = torch.full((2,), teacher.sigma_max, dtype=torch.float64)
    assert details(teacher(teacher.sigma_max * z, sigma, conditions()), 4).abs().max() < 1e-12


def test_training_noise_is_cut_to_what_a_rung_will_be_evaluated_at() -> None:
    high = grown(GATED)
    freeze(high.net, [n for n, _ in high.net.named_parameters()])
    assert high.trained_until == INF  # nothing trains
    for name, p in high.net.named_parameters():
        p.requires_grad_(name.split(".")[1] == "32")
    assert high.trained_until == 0.4
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for config in (NoiseConfig(mean=0.0, std=1.5), NoiseConfig(kind="cosine")):
        cut, whole = NoiseSchedule(config, high, 0.4), NoiseSchedule(config, high)
        assert cut.sigma(u).max() <= 0.4 * 4 * (1 + 1e-6)
        # The distribution below the gate: quantiles of the full one, conditioned on being below.
        below = whole.sigma(torch.linspace(0, 1, 200_001, dtype=torch.float64))
        below = below[below <= 1.6]
        for q in (0.1, 0.5, 0.9):
            assert cut.sigma(torch.tensor([q])).item() == pytest.approx(below.quantile(q).item(), rel=1e-3)
    with pytest.raises(UserError, match=r"until: 0\.003 is below 99\.9% of the training noise"):
        NoiseSchedule(NoiseConfig(mean=2.0, std=0.5), high, 0.003)


@pytest.mark.parametrize("until", [0.001, 81.0])
def test_a_gate_outside_of_the_noise_levels_is_one_line(until: float) -> None:
    images = torch.zeros(2, 3, 16, 16)
    with pytest.raises(UserError, match=rf"until: got {until:g}, expected a sigma between .* 0\.002 and .* 80"):
        grow(shallow(8), 16, images=images, cond=cond(2), until=until)


def test_gates_do_not_open_above_those_below() -> None:
    low = grown_config(shallow(8).net.config, 16, "preserve", until=0.5)
    for until in (0.6, INF):
        with pytest.raises(UserError, match=rf"until: got {until:g}, expected at most 0\.5, the gate of the"):
            grown_config(low, 32, "preserve", until=until)
    with pytest.raises(UserError, match=r"exact: got false, but the rung below has a gate \(until 0\.5\)"):
        grown_config(low, 32, "preserve", exact=False)
    high = grown_config(low, 32, "preserve", until=0.5)
    wrong = {"rungs": (*high.rungs[:-1], high.rungs[-1].model_copy(update={"until": 0.6}))}
    with pytest.raises(ValueError, match=r"until 0\.6 of the rung at 32 px exceeds 0\.5"):
        high.model_copy(update=wrong).checked()


def test_a_default_gate_is_at_most_the_gate_below() -> None:
    for until, expected in ((0.7, 0.5), (0.3, 0.3)):  # 2.0 at 32 px is 0.5 at the core
        low = grown_config(shallow(8).net.config, 16, "preserve", until=until)
        assert grown_config(low, 32, "preserve").rungs[-1].until == expected


# --- within [-1, 1], and previews ---------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [(2,), (4,), (2, 2), (2, 4)])
def test_bounding_keeps_the_bounded_averages(factors: tuple[int, ...]) -> None:
    x = 1.5 * NOISES[0]
    made = bounded(x, factors)
    assert made.abs().max() <= 1
    k = torch.tensor(factors).prod().item()
    assert (box_down(made, int(k)) - box_down(x, int(k)).clamp(-1, 1)).abs().max() < 1e-12
    mild = 0.1 * NOISES[0]
    assert (bounded(mild, factors) - mild).abs().max() < 1e-12  # what fits is left alone
    assert torch.equal(bounded(x), x.clamp(-1, 1))


def test_bounding_shrinks_the_details_of_a_block_by_one_factor() -> None:
    block = torch.tensor([[0.9, 1.3], [0.5, 0.5]], dtype=torch.float64)[None, None]
    mean = 0.8
    assert torch.allclose(bounded(block, (2,)), mean + (block - mean) * (0.2 / 0.5))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_preview_is_what_the_image_averages_down_to(sampler: str) -> None:
    high, c = grown(GATED).float(), cond(3)
    settings: dict[str, Any] = {"size": (32, 32), "seed": 3, "steps": 6, "sampler": sampler, "guidance": 3.0}
    whole = sample(high, c, **settings)
    small = sample(high, c, preview=True, **settings)
    assert small.images.shape == (3, 3, 8, 8)
    assert (box_down(whole.images, 4) - small.images).abs().max() < 1e-4
    one = sample(high, c[1:2], index=[1], preview=True, **settings).images
    assert (one[0] - small.images[1]).abs().max() < 1e-4
    full = sample(high, c, progressive=False, **settings)
    assert (full.images - whole.images).abs().max() < 1e-4


def test_of_a_generator_too() -> None:
    low = shallow(8)
    high = randomized(Generator(stacked(low.net, (INF, INF), generator=True), low.config))
    whole = generate(high, cond(3), size=(32, 32), seed=3).images
    small = generate(high, cond(3), size=(32, 32), seed=3, preview=True).images
    assert small.shape[-1] == 8
    assert (box_down(whole, 4) - small).abs().max() < 1e-5


def test_no_preview_of_a_model_that_is_not_exact() -> None:
    for model in (shallow(8), grown(exact=False).float()):
        with pytest.raises(UserError, match="no preview: "):
            sample(model, cond(1), size=(model.resolution, model.resolution), preview=True)
    with pytest.raises(UserError, match="no preview: "):
        generate(Generator(shallow(8).net), cond(1), size=(8, 8), preview=True)
