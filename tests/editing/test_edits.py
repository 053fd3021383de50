"""Edits: what is known stays, prompts decide the rest, latents are found, and every mistake is one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import pixelgrow
from pixelgrow import checkpoint
from pixelgrow.checkpoint import CheckpointConfig
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.generator import Generator, with_guidance
from pixelgrow.diffusion.sampling import initial_noise
from pixelgrow.editing import edits as editing
from pixelgrow.editing.edits import _averaging_to, _inverted
from pixelgrow.errors import UserError
from pixelgrow.growth import grow_network, grown_config
from pixelgrow.model import Model, OneStepModel
from pixelgrow.models.cond import Cond, mixed, slerp
from pixelgrow.models.layers import box_down
from pixelgrow.models.sizes import core_config, shallow_uvit
from pixelgrow.models.uvit import UViT
from pixelgrow.onestep.latents import FitSettings, fit, nearest
from pixelgrow.pictures import to_uint8
from test_growth import cond, shallow

SIDE = 16
MUCH: dict[str, Any] = {"iterations": 60, "tolerance": 0.0}  # of a descent
COLOURS = torch.tensor([[-0.6, 0.1, 0.3], [0.4, -0.2, -0.5], [0.0, 0.5, 0.0]])  # of the three classes


class CliResult(Protocol):
    """What `run_cli` returns; see conftest.py."""

    code: int
    out: str
    err: str


class RunCli(Protocol):
    """The `run_cli` fixture; see conftest.py."""

    def __call__(self, *args: str | Path, cwd: Path | None = None) -> CliResult: ...


class Painter(Denoiser):
    """Sees its class's colour everywhere, whatever the noise: the exact denoiser of three flat images."""

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        assert cond.labels is not None
        labels = cond.labels
        mean = labels @ COLOURS if labels.is_floating_point() else COLOURS[labels]
        return mean[:, :, None, None].expand_as(x)


class Gauss(Denoiser):
    """The exact denoiser of pixels from N(0, 0.5^2)."""

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return 0.25 / (0.25 + sigma[:, None, None, None] ** 2) * x


def network(side: int = SIDE, std: float = 0.1) -> UViT:
    torch.manual_seed(0)
    net = UViT(shallow_uvit("tiny", side, core=core_config("tiny", classes=3)))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=std)
    return net


def multi_step(kind: type[Denoiser] = Denoiser, side: int = SIDE, **sampling: Any) -> Model:
    denoiser = kind(network(side)).eval()
    text = {"encoder": "labels:3", "max_tokens": 1}
    sampling = {"steps": 4} | sampling
    return Model(
        denoiser, CheckpointConfig(network=denoiser.net.config, diffusion=denoiser.config, text=text, sampling=sampling)
    )


def one_step(to: int = SIDE) -> OneStepModel:
    """An untrained generator whose latents are of SIDE px, and whose images are of `to` px, of deviation 0.3."""
    net = network()
    z, c = initial_noise((SIDE, SIDE), 0, range(3)), Cond(None, None, None, torch.zeros(3) > 0, torch.arange(3))
    with torch.no_grad():
        net.exit[str(SIDE)].conv.weight *= 0.3 / Generator(net)(z, c).std()
    if to > SIDE:
        net, _ = grow_network(net, grown_config(net.config, to, "preserve", generator=True), "preserve")
        for name, p in net.named_parameters():
            if f".{to}." in name:
                torch.nn.init.normal_(p, std=0.05)
    made = Generator(net).eval()
    text = {"encoder": "labels:3", "max_tokens": 1}
    config = CheckpointConfig(objective="generate", network=net.config, diffusion=made.config, text=text)
    return OneStepModel(made, config)


def labels(*numbers: int) -> Cond:
    return Cond(None, None, None, torch.zeros(len(numbers), dtype=torch.bool), torch.tensor(numbers))


def pixel_noise(h: int = SIDE, w: int = SIDE, seed: int = 0, low: int = 90, high: int = 160) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (h, w, 3), dtype=np.uint8)


def half(h: int = SIDE, w: int = SIDE) -> np.ndarray:
    mask = np.zeros((h, w), np.uint8)
    mask[:, w // 2 :] = 255
    return mask


def pixels(some: Image.Image | np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(some)).permute(2, 0, 1)[None].float() / 127.5 - 1


# --- arcs and mixtures ------------------------------------------------------------------------------------------------


def test_slerp_keeps_to_the_sphere_and_to_its_ends() -> None:
    a, b = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    a, b = (x / x.flatten(1).norm(dim=1)[:, None, None, None] for x in (a, b))
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    between = slerp(a, b, t)
    torch.testing.assert_close(between.flatten(1).norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert torch.equal(between[0], a[0]) and torch.equal(between[-1], b[-1])
    middle = (a[2] + b[2]) / (a[2] + b[2]).norm()
    torch.testing.assert_close(between[2], middle)


def test_slerp_of_norms_that_differ_and_of_one_direction() -> None:
    a, b = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [3.0, 3.0], [1.0, 0.0]])
    middle = slerp(a, b, torch.full((3,), 0.5))
    torch.testing.assert_close(middle[0], 3 * torch.tensor([0.5, 0.5]).sqrt())
    torch.testing.assert_close(middle[1], torch.tensor([2.0, 2.0]))
    assert middle.isfinite().all()


def test_a_mixture_of_captions_has_them_at_its_ends_whatever_their_lengths() -> None:
    denoiser, x = shallow(), torch.randn(3, 3, 16, 16)
    sigma = torch.full((3,), 1.0)
    a, b = cond(3), cond(3)
    assert b.tokens is not None and b.mask is not None and b.pooled is not None
    b = Cond(b.tokens.flip(0)[:, :4], b.mask.flip(0)[:, :4], b.pooled.flip(0), torch.zeros(3, dtype=torch.bool))

    def denoised(c: Cond) -> Tensor:
        return denoiser(x, sigma, c)

    half = mixed(a, b, torch.full((3,), 0.5))
    assert half.mask is not None and half.mask.dtype == torch.bool and half.mask.shape == (3, 10)
    assert half.token_weights is not None and torch.equal(half[1:].token_weights, torch.full((2, 10), 0.5))
    torch.testing.assert_close(denoised(mixed(a, b, torch.zeros(3))), denoised(a), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(denoised(mixed(a, b, torch.ones(3))), denoised(b), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(denoised(mixed(b, b, torch.full((3,), 0.3))), denoised(b), rtol=1e-4, atol=1e-5)
    near = denoised(mixed(a, b, torch.full((3,), 1e-6)))
    torch.testing.assert_close(near, denoised(a), rtol=1e-2, atol=1e-3)
    assert (denoised(half) - denoised(a)).abs().max() > 0.01


def test_a_mixture_of_classes_is_one_of_their_embeddings() -> None:
    core = network().core
    ctx = core.embed(torch.zeros(3), mixed(labels(0, 0, 0), labels(2, 2, 2), torch.tensor([0.0, 0.25, 1.0]), 3))
    table = core.class_token.weight
    torch.testing.assert_close(ctx.text[:, 0], torch.stack([table[0], 0.75 * table[0] + 0.25 * table[2], table[2]]))
    assert not ctx.bias.any()


# --- a multi-step model -----------------------------------------------------------------------------------------------


def test_inpainting_keeps_what_is_known_and_fills_the_rest_by_the_prompt() -> None:
    model = multi_step(Painter, guidance=3.0)
    x, mask = pixel_noise(), half()
    seen: list[tuple[int, int]] = []
    for label in (0, 1):
        (made,) = pixelgrow.edit.inpaint(model, x, mask, str(label), progress=lambda *at: seen.append(at))
        got = np.asarray(made)
        assert np.array_equal(got[mask == 0], x[mask == 0])
        torch.testing.assert_close(pixels(made)[0, :, :, SIDE // 2 :].mean((1, 2)), COLOURS[label], atol=0.01, rtol=0)
    assert seen == [(i, 6) for i in range(1, 7)] * 2  # four steps, and two of the second pass


@pytest.mark.parametrize("sampler", ["dpm++2m", "heun", "ddpm"])
def test_what_is_known_passes_through_the_noise_levels_as_noisy_pixels(sampler: str) -> None:
    """The network sees x + sigma eps with eps of unit variance where the image is known."""
    spread: list[float] = []
    x, mask = pixel_noise(64, 64), half(64, 64)

    class Watcher(Painter):
        def forward(self, noisy: Tensor, sigma: Tensor, c: Cond) -> Tensor:
            eps = (noisy - pixels(x))[..., :32] / sigma[:, None, None, None]
            spread.append(float(eps.std()))
            return super().forward(noisy, sigma, c)

    pixelgrow.edit.inpaint(multi_step(Watcher, side=64), x, mask, "1", sampler=sampler, steps=6, guidance=1.0)
    assert len(spread) >= 6 and spread == pytest.approx([1.0] * len(spread), abs=0.05)


def test_an_image_is_edited_as_it_would_be_alone() -> None:
    model = multi_step()
    both = pixelgrow.edit.transfer(model, [pixel_noise(seed=1), pixel_noise(seed=2)], "0", ["1", "2"])
    alone = pixelgrow.edit.transfer(model, pixel_noise(seed=1), "0", "1")[0]
    assert np.abs(np.asarray(both[0], int) - np.asarray(alone, int)).max() <= 1


@pytest.mark.parametrize(("h", "w", "k"), [(8, 8, 2), (4, 6, 4), (12, 8, 2)])
def test_an_enlarged_image_averages_down_to_the_one_given(h: int, w: int, k: int) -> None:
    low = pixel_noise(h, w, low=0, high=256)
    low[0], low[1, :2] = 0, 255
    (made,) = pixelgrow.edit.upscale(multi_step(Painter), low, "1")
    assert made.size == (k * w, k * h)
    torch.testing.assert_close(box_down(pixels(made), k), pixels(low), atol=0.005, rtol=0)


def test_averages_are_set_within_the_range_and_flat_errors_leave_details_alone() -> None:
    image, y = 1.5 * torch.randn(2, 3, 16, 16), torch.rand(2, 3, 4, 4) * 2 - 1
    y[0, :, 0], y[0, :, 1] = -1, 1
    made = _averaging_to(image, y, 4)
    torch.testing.assert_close(box_down(made, 4), y, atol=1e-5, rtol=0)
    assert made.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(_averaging_to(made, y, 4), made, atol=1e-4, rtol=0)


def test_where_many_large_images_differ() -> None:
    change = torch.zeros(1025, 1, 128, 128)  # more numbers than torch.quantile takes
    change[:, :, 32:64, 32:64] = torch.rand(1025)[:, None, None, None] + 0.1
    change[7] = 0
    where = editing._differing([change])
    assert where[:7, 0, 34:62, 34:62].all() and not where[:, :, 70:].any() and not where[7].any()


@pytest.mark.parametrize("edit", ["transfer", "interpolate"])
def test_a_model_that_samples_with_fresh_noise_inverts_without_it(edit: str) -> None:
    stochastic, other = multi_step(sampler="ddpm"), multi_step(sampler="dpm++2m")

    def edited(model: Model, **settings: Any) -> list[np.ndarray]:
        if edit == "transfer":
            made = pixelgrow.edit.transfer(model, pixel_noise(), "1", "2", **settings)
        else:
            made = pixelgrow.edit.interpolate(
                model, ["1", "2"], images=[pixel_noise(), pixel_noise()], frames=2, **settings
            )
        return [np.asarray(image) for image in made]

    for one, two in zip(edited(stochastic), edited(other), strict=True):
        assert (one == two).all()
    mistake("noise cannot be undone", edited, stochastic, sampler="ddpm")


def test_transfer_between_equal_prompts_gives_the_image_back() -> None:
    model, x = multi_step(guidance=2.0, steps=6), pixel_noise()
    assert np.array_equal(np.asarray(pixelgrow.edit.transfer(model, x, "1", "1")[0]), x)
    assert not np.array_equal(np.asarray(pixelgrow.edit.transfer(model, x, "1", "2")[0]), x)


class LeftPainter(Painter):
    """Its classes differ on the left half alone."""

    def forward(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        painted = super().forward(x, sigma, cond)
        return torch.cat([painted[..., : SIDE // 2], torch.zeros_like(painted[..., SIDE // 2 :])], -1)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_transfer_changes_what_the_prompts_differ_in_and_keeps_the_rest(strength: float) -> None:
    x, half_way = pixel_noise(), SIDE // 2
    seen: list[tuple[int, int]] = []
    (made,) = pixelgrow.edit.transfer(
        multi_step(LeftPainter), x, "0", "1", strength=strength, steps=9, progress=lambda *at: seen.append(at)
    )
    got = np.asarray(made)
    assert np.array_equal(got[:, half_way + 2 :], x[:, half_way + 2 :])
    want = COLOURS[1][:, None, None].expand(3, SIDE, half_way)
    torch.testing.assert_close(pixels(made)[0, :, :, :half_way], want, atol=0.01, rtol=0)
    total = seen[0][1]
    assert seen == [(i, total) for i in range(1, total + 1)]


def test_interpolation_begins_and_ends_with_the_samples_of_its_seeds_and_prompts() -> None:
    model = multi_step()
    frames = pixelgrow.edit.interpolate(model, ["0", "2"], seeds=[5, 6], frames=4)
    assert len(frames) == 4
    for frame, (prompt, seed) in ((frames[0], ("0", 5)), (frames[-1], ("2", 6))):
        drawn = np.asarray(model.sample(prompt, seed=seed)[0], int)
        assert np.abs(np.asarray(frame, int) - drawn).max() <= 1
    steps = [np.abs(np.asarray(a, int) - np.asarray(b, int)).mean() for a, b in pairwise(frames)]
    assert min(steps) > 0


def test_frames_are_generated_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    for model, total in ((multi_step(), 3 * 4), (one_step(), 0)):
        whole = pixelgrow.edit.interpolate(model, ["0", "2"], frames=5)
        with monkeypatch.context() as patch:
            patch.setattr(editing, "BATCH", 2)
            some = pixelgrow.edit.interpolate(model, ["0", "2"], frames=5, progress=lambda *at: seen.append(at))
        assert seen == [(i, total) for i in range(1, total + 1)] and len(some) == 5
        assert all(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1 for a, b in zip(whole, some, strict=True))
        seen.clear()


def test_a_photograph_is_turned_as_its_exif_says() -> None:
    x, file, exif = pixel_noise(24, 16), BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(np.rot90(x)).save(file, "PNG", exif=exif)
    (made,) = pixelgrow.edit.transfer(multi_step(), Image.open(file), "1", "1")
    assert np.array_equal(np.asarray(made), x)


def test_interpolation_between_images_begins_and_ends_with_them() -> None:
    ends = [pixel_noise(16, 24, seed=1), pixel_noise(16, 24, seed=2)]
    frames = pixelgrow.edit.interpolate(multi_step(Gauss, steps=20), "1", images=ends, frames=3)
    for frame, end in ((frames[0], ends[0]), (frames[-1], ends[1])):
        assert np.abs(np.asarray(frame, int) - end).max() <= 2


# --- a one-step generator ---------------------------------------------------------------------------------------------


def target(model: OneStepModel, c: Cond, seed: int = 9) -> Tensor:
    with torch.no_grad():
        return model.generator(initial_noise((SIDE, SIDE), seed, range(len(c))), c)


def test_a_latent_is_found_whose_image_is_the_one_given() -> None:
    model, c = one_step(), labels(0, 2)
    x = target(model, c)

    def generate(z: Tensor) -> Tensor:
        return model.generator(z, c[: len(z)])

    def misfit(image: Tensor) -> Tensor:
        return (image - x).square().mean((1, 2, 3))

    size = (2, SIDE, SIDE)
    first = nearest(generate, misfit, size, seed=3, starts=1, device=model.device)
    assert torch.equal(first, initial_noise((SIDE, SIDE), 3, range(2)))
    begin = nearest(generate, misfit, size, seed=3, starts=6, device=model.device)
    with torch.no_grad():
        assert (misfit(generate(begin)) <= misfit(generate(first))).all()
        before = misfit(generate(begin)).sqrt()
    calls: list[tuple[int, int]] = []
    found = fit(generate, misfit, begin, FitSettings(60, tolerance=0.0), lambda *at: calls.append(at))
    assert (found.error < 0.3 * before).all() and calls[-1] == (60, 60) and len(calls) == 61
    with torch.no_grad():
        torch.testing.assert_close(misfit(generate(found.latent)).sqrt(), found.error)
    calls.clear()
    enough = FitSettings(60, tolerance=float(0.6 * before.max()))
    near = fit(generate, misfit, begin, enough, lambda *at: calls.append(at))
    assert len(calls) < 40 and calls[-1] == (60, 60) and (near.error <= enough.tolerance).all()
    alone = fit(generate, lambda d: (d - x[:1]).square().mean((1, 2, 3)), begin[:1], enough)
    torch.testing.assert_close(alone.latent, near.latent[:1], rtol=1e-3, atol=1e-3)
    assert all(p.grad is None for p in model.generator.parameters())


def test_the_prior_keeps_latents_as_long_as_they_were() -> None:
    model, c = one_step(), labels(0)
    x = 3 * target(model, c)  # which no likely latent draws

    def generate(z: Tensor) -> Tensor:
        return model.generator(z, c)

    def misfit(image: Tensor) -> Tensor:
        return (image - x).square().mean((1, 2, 3))

    begin = initial_noise((SIDE, SIDE), 0, [0])
    length = [
        float(fit(generate, misfit, begin, FitSettings(40, prior=p, tolerance=0)).latent.square().mean())
        for p in (0.0, 10.0)
    ]
    assert abs(length[1] - 1) < 0.3 * abs(length[0] - 1)


def generated(model: OneStepModel, c: Cond, seed: int = 9) -> list[np.ndarray]:
    """A generator's images of the latents that an edit with this seed tries first."""
    size = model.generator.latent_size((model.resolution, model.resolution))
    with torch.no_grad():
        return list(to_uint8(model.generator(initial_noise(size, seed, range(len(c))), c)))


def apart(a: Image.Image, b: np.ndarray) -> float:
    return float(np.abs(np.asarray(a, int) - b).mean())


def logged_errors(caplog: pytest.LogCaptureFixture) -> list[float]:
    """The error of the known pixels that each edit logged."""
    return [
        float(str(r.args[0] if isinstance(r.args, tuple) else r.args))
        for r in caplog.records
        if "known pixels" in r.msg
    ]


def test_one_step_inpainting_keeps_what_is_known_and_matches_it_by_a_latent(caplog: pytest.LogCaptureFixture) -> None:
    model, mask = one_step(), half()
    (x,) = generated(model, labels(1))
    (made,) = pixelgrow.edit.inpaint(model, x, mask, "1", seed=9, iterations=0)
    assert np.abs(np.asarray(made, int) - x).max() <= 1  # of the starts, its own latent fits best
    caplog.clear()
    with caplog.at_level("INFO", "pixelgrow.editing.edits"):
        far, near = (
            pixelgrow.edit.inpaint(model, x, mask, "1", seed=3, **much)[0] for much in ({"iterations": 0}, MUCH)
        )
    before, after = logged_errors(caplog)
    assert after < 0.3 * before
    for some in (far, near):
        assert np.array_equal(np.asarray(some)[mask == 0], x[mask == 0])
    other = pixelgrow.edit.inpaint(model, x, mask, "2", seed=9, iterations=0)[0]
    assert not np.array_equal(np.asarray(made), np.asarray(other))


def test_one_step_transfer_draws_what_the_prompts_differ_in() -> None:
    model = one_step()
    (back,) = pixelgrow.edit.transfer(model, pixel_noise(), "1", "1", iterations=1)
    assert np.array_equal(np.asarray(back), pixel_noise())
    (made,) = pixelgrow.edit.transfer(model, pixel_noise(), "1", "2", iterations=1, starts=1)
    assert not np.array_equal(np.asarray(made), pixel_noise())


def test_a_grown_generator_enlarges_by_a_latent(caplog: pytest.LogCaptureFixture) -> None:
    model = one_step(2 * SIDE)
    (x,) = generated(model, labels(1))
    (low,) = to_uint8(box_down(pixels(x), 2))
    made = pixelgrow.edit.upscale(model, low, "1", seed=9, iterations=0)[0]
    assert made.size == (32, 32) and np.abs(np.asarray(made, int) - x).max() <= 2
    caplog.clear()
    with caplog.at_level("INFO", "pixelgrow.editing.edits"):
        for much in ({"iterations": 0}, MUCH):
            (other,) = pixelgrow.edit.upscale(model, low, "1", seed=3, **much)
            torch.testing.assert_close(box_down(pixels(other), 2), pixels(low), atol=0.005, rtol=0)
    before, after = logged_errors(caplog)
    assert after < 0.3 * before


def test_a_grown_generator_enlarges_by_its_teachers_latent_and_some_steps(caplog: pytest.LogCaptureFixture) -> None:
    model, teacher, low = one_step(2 * SIDE), multi_step(Gauss), pixel_noise()
    with caplog.at_level("INFO", "pixelgrow.editing.edits"):
        for given in ({}, {"iterations": 0}):
            (made,) = pixelgrow.edit.upscale(model, low, "1", teacher=teacher, **given)
    closer, as_found = logged_errors(caplog)
    assert closer < as_found - 0.01
    y = pixels(low)
    with torch.no_grad():
        drawn = model.generator(_inverted(model, teacher, y, ["1"]), labels(1))
    assert np.abs(np.asarray(made, int) - to_uint8(_averaging_to(drawn, y, 2))[0]).max() <= 1


def test_another_teacher_than_the_generators_own_is_refused() -> None:
    def changed(model: Any, **facts: Any) -> Any:
        return type(model)(getattr(model, "generator", None) or model.denoiser, model.config.model_copy(update=facts))

    model = changed(one_step(), lineage=[{"verb": "train"}, {"verb": "distill", "parent": "c0ffee"}])
    own, other = changed(multi_step(), sha256="c0ffee"), changed(multi_step(), sha256="decade")
    grown = {"verb": "grow", "init": "preserve", "parent": "c0ffee", "tensors": {"loaded": 2, "frozen": 2}}
    since = changed(multi_step(), sha256="facade", lineage=[{"verb": "train"}, grown])
    for teacher in (own, since):
        assert pixelgrow.edit.transfer(model, pixel_noise(), "1", "2", teacher=teacher, iterations=0)
    words = "the teacher is decade, and the generator was distilled from c0ffee: name the checkpoint"
    mistake(words, pixelgrow.edit.transfer, model, pixel_noise(), "1", "2", teacher=other)


def test_a_teacher_that_was_grown_since_inverts_as_before() -> None:
    small = multi_step()
    net, _ = grow_network(small.denoiser.net, grown_config(small.denoiser.net.config, 2 * SIDE, "preserve"), "preserve")
    for name, p in net.named_parameters():
        if f".{2 * SIDE}." in name:
            torch.nn.init.normal_(p, std=0.1)
    denoiser = Denoiser(net).eval()
    grown = Model(denoiser, small.config.model_copy(update={"network": net.config}))
    x = pixels(pixel_noise())
    assert torch.equal(_inverted(one_step(), grown, x, ["1"]), _inverted(one_step(), small, x, ["1"]))


def test_a_teachers_latents_of_gaussian_images_are_white() -> None:
    x = 0.5 * torch.randn(2, 3, SIDE, SIDE)
    z = _inverted(one_step(), multi_step(Gauss), x, ["0", "1"])
    torch.testing.assert_close(z, 2 * x, rtol=0.05, atol=1e-3)


def test_edits_pass_a_guided_generator_its_guidance() -> None:
    plain = one_step()
    net = with_guidance(plain.generator.net, 0)
    torch.nn.init.normal_(net.guidance.out.weight, std=0.5)
    config = plain.config.model_copy(update={"network": net.config})
    model = OneStepModel(Generator(net, plain.generator.config).eval(), config)
    made = [
        np.asarray(pixelgrow.edit.inpaint(model, pixel_noise(), half(), "1", iterations=1, starts=1, guidance=w)[0])
        for w in (1.0, 8.0)
    ]
    assert not np.array_equal(*made)
    assert len(pixelgrow.edit.interpolate(model, "1", seeds=[1, 2], frames=2, guidance=3.0)) == 2


def test_one_step_interpolation() -> None:
    model = one_step()
    frames = pixelgrow.edit.interpolate(model, "1", seeds=[1, 2], frames=3)
    assert np.array_equal(np.asarray(frames[0]), np.asarray(model.sample("1", seed=1)[0]))
    ends = generated(model, labels(0, 1))
    frames = pixelgrow.edit.interpolate(model, ["0", "1"], images=ends, frames=3, seeds=[9], iterations=0)
    assert len(frames) == 3 and apart(frames[0], ends[0]) < 1 and apart(frames[2], ends[1]) < 1
    assert apart(frames[1], ends[0]) > 1
    far, near = (
        pixelgrow.edit.interpolate(model, ["0", "1"], images=ends, frames=2, seeds=[3], **much)
        for much in ({"iterations": 0}, MUCH)
    )
    assert all(apart(b, end) < 0.5 * apart(a, end) for a, b, end in zip(far, near, ends, strict=True))


# --- mistakes ---------------------------------------------------------------------------------------------------------


def mistake(words: str, call: Any, *args: Any, **keywords: Any) -> None:
    with pytest.raises(UserError) as error:
        call(*args, **keywords)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_messages_about_images_say_what_would_fit() -> None:
    e, model = pixelgrow.edit, multi_step()
    mistake("20x16 (height x width), its image 16x16", e.inpaint, model, pixel_noise(), half(20, 16), "1")
    mistake("the mask covers nothing", e.inpaint, model, pixel_noise(), 0 * half(), "1")
    mistake("the mask covers all", e.inpaint, model, pixel_noise(), 0 * half() + 1, "1")
    mistake("2 masks for 1 images", e.inpaint, model, pixel_noise(), [half(), half()], "1")
    mistake("such as 16x24; resize it", e.transfer, model, pixel_noise(16, 23), "1", "2")
    mistake("such as 32x16; resize it", e.transfer, model, pixel_noise(64, 32), "1", "2")
    mistake("expected a shorter side of 8, 4, 2, 1 pixels", e.upscale, model, pixel_noise(5, 5), "1")
    mistake("cannot be enlarged to 16 px", e.upscale, model, pixel_noise(), "1")
    mistake("images of sizes 16x16, 16x20", e.transfer, model, [pixel_noise(), pixel_noise(16, 20)], "1", "2")
    mistake("expected a PIL image, or uint8", e.transfer, model, pixel_noise().astype(float), "1", "2")
    mistake("an image given as str: expected a PIL image", e.transfer, model, "a.png", "1", "2")
    mistake("an image given as PosixPath: expected", e.inpaint, model, pixel_noise(), Path("mask.png"), "1")
    mistake("a mask of shape (16,)", e.inpaint, model, pixel_noise(), half()[0], "1")


def test_prompts_settings_and_models_that_do_not_fit_are_one_line() -> None:
    e, many, one = pixelgrow.edit, multi_step(), one_step()
    mistake("class 'a red circle' is unknown", e.transfer, many, pixel_noise(), "a red circle", "1")
    mistake("class '3' is unknown: expected a number from 0 to 2", e.inpaint, one, pixel_noise(), half(), "3")
    mistake("2 prompts for 1 images", e.inpaint, many, pixel_noise(), half(), ["1", "2"])
    mistake("iterations: a multi-step model edits while", e.inpaint, many, pixel_noise(), half(), "1", iterations=3)
    mistake("steps: a one-step generator samples in one", e.inpaint, one, pixel_noise(), half(), "1", steps=3)
    mistake("strength: a one-step generator", e.transfer, one, pixel_noise(), "1", "2", strength=0.5)
    mistake("strength=0: expected more than 0", e.transfer, many, pixel_noise(), "1", "2", strength=0)
    mistake("and only a one-step generator takes a teacher", e.transfer, many, pixel_noise(), "1", "2", teacher=many)
    mistake(
        "teacher is a one-step generator, expected a multi-step", e.transfer, one, pixel_noise(), "1", "2", teacher=one
    )
    mistake(
        "teacher is a 32 px model, expected 16", e.transfer, one, pixel_noise(), "1", "2", teacher=multi_step(side=32)
    )
    mistake("noise cannot be undone", e.transfer, many, pixel_noise(), "1", "2", sampler="ddpm")
    mistake("both ends are the same", e.interpolate, many, "1")
    mistake("3 prompts, 1 seeds and 0 images", e.interpolate, many, ["0", "1", "2"])
    mistake("and 1 images: expected", e.interpolate, many, "0", images=[pixel_noise()])
    mistake("frames=1: expected 2 to", e.interpolate, many, "0", seeds=[1, 2], frames=1)
    mistake("iterations: nothing is inverted without images", e.interpolate, one, "0", seeds=[1, 2], iterations=3)
    mistake("guidence: no such setting; expected steps", e.inpaint, many, pixel_noise(), half(), "1", guidence=3)
    mistake("guidence: a one-step generator", e.inpaint, one, pixel_noise(), half(), "1", guidence=3)
    mistake("steps=1: an inversion takes 2", e.transfer, many, pixel_noise(), "1", "2", steps=1)
    ends = {"images": [pixel_noise(), pixel_noise(seed=1)]}
    mistake("seeds 1 beside images: the images are the ends; drop", e.interpolate, many, "0", **ends, seeds=[1])
    mistake("begins at one seed; drop one", e.interpolate, one, "0", **ends, seeds=[1, 2])
    mistake("drop seeds", e.interpolate, one, "0", **ends, seeds=[1], teacher=many)
    mistake("starts: the search begins at", e.transfer, one, pixel_noise(), "1", "2", teacher=many, starts=3)
    mistake(
        "prior: there are no iterations",
        e.transfer,
        one,
        pixel_noise(),
        "1",
        "2",
        teacher=many,
        prior=0.1,
        iterations=0,
    )
    mistake(
        "rate, tolerance: there are no", e.inpaint, one, pixel_noise(), half(), "1", iterations=0, rate=1, tolerance=0.1
    )
    for given, words in (
        ({"iterations": 2.5}, "iterations=2.5: expected a whole number, 0 or more"),
        ({"starts": 0}, "starts=0: expected a whole number, 1 or more"),
        ({"starts": True}, "starts=True: expected a whole number"),
        ({"rate": "fast"}, "rate=fast: expected a number, 0 or more"),
        ({"rate": 0}, "rate=0: expected a number above 0"),
        ({"prior": float("nan")}, "prior=nan: expected a number, 0 or more"),
    ):
        mistake(words, e.inpaint, one, pixel_noise(), half(), "1", **given)
    mistake("tolerance=-1: expected a number, 0 or more", e.inpaint, one, pixel_noise(), half(), "1", tolerance=-1)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a multi-step and a one-step checkpoint, images and masks."""
    root = tmp_path_factory.mktemp("edit")
    for name, model in (("many", multi_step()), ("one", one_step()), ("grown", one_step(2 * SIDE))):
        checkpoint.save(root / name, model.network, model.config)
    for name, array in (
        ("a.png", pixel_noise()), ("b.png", pixel_noise(seed=1)), ("low.png", pixel_noise(8, 8)),
        ("wide.png", pixel_noise(40, 64)),
        ("mask.png", half()), ("mask-wide.png", half(40, 64)), ("mask-small.png", half(8, 8)),
    ):  # fmt: skip
        Image.fromarray(array).save(root / name)
    (root / "broken.png").write_bytes(b"no image")
    return root


def edited(run_cli: RunCli, files: Path, words: str, out: Path) -> dict[str, Any]:
    result = run_cli("edit", *words.split(), "-o", str(out), cwd=files)
    assert result.code == 0, result.err
    assert result.out.strip() == str(out)
    with Image.open(out) as made:
        raw = made.info["comment"] if out.suffix == ".gif" else made.info["pixelgrow"]
        facts: dict[str, Any] = json.loads(raw)
    return facts


def test_edits_are_files_with_their_settings(run_cli: RunCli, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.png"
    facts = edited(run_cli, files, "inpaint many a.png --mask mask.png --prompt 1 --steps 3 --seed 7", out)
    assert (facts["edit"], facts["prompts"], facts["steps"], facts["seed"]) == ("inpaint", ["1"], 3, 7)
    assert facts["sha256"] == checkpoint.read_config(files / "many").sha256
    with Image.open(out) as made:
        assert np.array_equal(np.asarray(made)[half() == 0], pixel_noise()[half() == 0])
    facts = edited(run_cli, files, "transfer one a.png --from 0 --to 2 --iterations 2 --teacher many", out)
    assert (facts["teacher"], facts["prompts"], facts["iterations"]) == ("many", ["0", "2"], 2)
    assert edited(run_cli, files, "upscale grown a.png --prompt 1 --iterations 1", out)["images"] == ["a.png"]
    with Image.open(out) as made:
        assert made.size == (32, 32)
    assert edited(run_cli, files, "inpaint many wide.png --mask mask-wide.png --prompt 1 --fit", out)["fit"]
    with Image.open(out) as made:
        assert made.size == (16, 16)


def test_interpolations_are_strips_and_gifs(run_cli: RunCli, files: Path, tmp_path: Path) -> None:
    words = "interpolate many --prompt 0 --prompt 1 --seed 1 --seed 2 --frames 5"
    assert edited(run_cli, files, words, tmp_path / "out.gif")["frames"] == 5
    with Image.open(tmp_path / "out.gif") as made:
        assert (made.n_frames, made.size) == (5, (16, 16))  # type: ignore[attr-defined]
    assert edited(run_cli, files, words, tmp_path / "out.png")["seeds"] == [1, 2]
    with Image.open(tmp_path / "out.png") as made:
        assert made.size == (5 * 16 + 4 * 2, 16)
    facts = edited(run_cli, files, "interpolate many --prompt 0 --image a.png --image b.png", tmp_path / "out.gif")
    assert facts["images"] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("inpaint many a.png --prompt 1", "edit inpaint: --mask is missing (Mask of"),
        ("inpaint many a.png --mask mask.png", "edit inpaint: --prompt is missing"),
        ("inpaint many", "edit inpaint: IMAGE is missing"),
        ("inpaint many none.png --mask mask.png --prompt 1", "cannot read none.png: No such file"),
        ("inpaint many a.png --mask none.png --prompt 1", "cannot read none.png: No such file"),
        ("inpaint many . --mask mask.png --prompt 1", "cannot read .: Is a directory"),
        ("inpaint many broken.png --mask mask.png --prompt 1", "broken.png cannot be used (not a JPEG, PNG or WebP"),
        ("inpaint many a.png --mask mask-small.png --prompt 1", "--mask mask-small.png is 8x8 (height x width), its"),
        ("inpaint many a.png --mask mask.png --prompt red", "class 'red' is unknown: expected a number from 0 to 2"),
        ("inpaint many wide.png --mask mask-wide.png --prompt 1", "such as 16x24; resize it, or crop it"),
        ("inpaint many a.png --mask mask.png --prompt 1 --iterations 9", "iterations: a multi-step model edits while"),
        ("inpaint one a.png --mask mask.png --prompt 1 --guidance 2", "guidance: a one-step generator samples in one"),
        ("inpaint nowhere a.png --mask mask.png --prompt 1", "nowhere is not a checkpoint"),
        ("inpaint many a.png --mask mask.png --prompt 1 -o x.jpg", "--out x.jpg: expected a name that ends in .png"),
        ("transfer many a.png --from 1 --to 9", "class '9' is unknown"),
        ("transfer many a.png --from 1 --to 2 --teacher many", "is a multi-step denoiser, and only a one-step"),
        ("transfer one a.png --from 1 --to 2 --teacher one", "is a one-step generator, expected a multi-step"),
        ("transfer many a.png --from 1 --to 2 --strength 2", "strength=2.0: expected more than 0 and at most 1"),
        ("upscale many a.png --prompt 1", "cannot be enlarged to 16 px: expected a shorter side of 8, 4, 2, 1"),
        ("interpolate many --prompt 1", "both ends are the same"),
        ("interpolate many --prompt 1 --seed 1 --seed 2 --fit", "--fit: there is no image to scale and crop"),
        ("interpolate many --prompt 1 --image a.png", "and 1 images: expected one or two prompts"),
        ("interpolate many --prompt 1 --seed 1 --seed 2 -o x.webp", "ends in .png (a strip) or .gif"),
        ("unpaint", "edit: there is no verb 'unpaint'; did you mean inpaint?"),
    ],
)
def test_a_mistake_is_one_line(words: str, expected: str, run_cli: RunCli, files: Path) -> None:
    before = set(files.iterdir())
    result = run_cli("edit", *words.split(), cwd=files)
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1), result.err
    assert result.err.startswith("pixelgrow: ") and expected in result.err, result.err
    assert set(files.iterdir()) == before


def test_out_of_memory_says_what_an_edit_can_do(run_cli: RunCli, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def inpaint(*_: object, **__: object) -> None:
        raise MemoryError("much")

    monkeypatch.setattr(editing, "inpaint", inpaint)
    result = run_cli("edit", *["inpaint", "many", "a.png", "--mask", "mask.png", "--prompt", "1"], cwd=files)
    assert result.code == 2 and "out of memory (much): crop the image" in result.err and "--batch" not in result.err


def test_a_prompt_of_words_needs_a_model_of_words(run_cli: RunCli, files: Path) -> None:
    words: Sequence[str] = ["inpaint", "one", "a.png", "--mask", "mask.png", "--prompt", "a red circle"]
    result = run_cli("edit", *words, cwd=files)
    assert result.code == 2 and "class 'a red circle' is unknown" in result.err
