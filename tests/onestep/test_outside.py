"""A teacher from outside: diffusers UNets made here, as denoiser, generator and features."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixelgrow.diffusion.guidance import Guided
from pixelgrow.diffusion.sampling import generate, sample
from pixelgrow.diffusion.solvers import solve
from pixelgrow.errors import UserError
from pixelgrow.models.cond import Cond, cond_of
from pixelgrow.onestep.distill import DistillBatch, DistillObjective
from pixelgrow.onestep.outside import OutsideDenoiser, OutsideFeatures, OutsideGenerator
from pixelgrow.onestep.pairs import Ode, psnr, read_shard, write_shard
from pixelgrow.onestep.settings import LossSettings
from pixelgrow.text.encoders import labels_of
from pixelgrow.text.spec import describe
from pixelgrow.training import loop
from pixelgrow.training.settings import TrainSettings
from test_growth import cond

diffusers = pytest.importorskip("diffusers")


def scheduler(**changes: Any) -> Any:
    return diffusers.DDPMScheduler(**changes)


def labels(*numbers: int) -> Cond:
    return cond_of({"labels": torch.from_numpy(labels_of([str(n) for n in numbers], describe("labels:4")))})


# --- the adapter ------------------------------------------------------------------------------------------------------


class Ideal(nn.Module):
    """The best network for data of N(0, 0.5^2), of a prediction type; it finds sigma from t in its own way."""

    def __init__(self, alphas_cumprod: Tensor, prediction: str) -> None:
        super().__init__()
        self.alphas, self.prediction = alphas_cumprod, prediction
        self.config = SimpleNamespace(sample_size=8, get=lambda key, default=None: default)

    def forward(self, x_t: Tensor, t: Tensor) -> Any:
        abar = self.alphas[t.long()][:, None, None, None]
        x0 = 0.25 * abar.sqrt() / (0.25 * abar + 1 - abar) * x_t
        eps = (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()
        v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
        out = {"epsilon": eps, "v_prediction": v, "sample": x0}[self.prediction]
        return SimpleNamespace(sample=torch.cat([out, torch.full_like(out, 7.0)], 1))  # a learned variance too


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta", ["linear", "squaredcos_cap_v2"])
def test_the_adapter_is_the_closed_form_for_every_prediction(prediction: str, beta: str) -> None:
    known = scheduler(prediction_type=prediction, beta_schedule=beta)
    denoiser = OutsideDenoiser(Ideal(known.alphas_cumprod, prediction), known)
    x = torch.randn(5, 3, 8, 8)
    t = torch.tensor([0, 10, 300, 700, 900])
    abar = known.alphas_cumprod[t]
    sigma = ((1 - abar) / abar).sqrt()
    torch.testing.assert_close(denoiser.time(sigma), t.float(), atol=2e-3, rtol=0)
    whole = Ideal.forward

    def rounded(self: Ideal, x_t: Tensor, at: Tensor) -> Any:
        return whole(self, x_t, at.round())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ideal, "forward", rounded)
        got = denoiser(x, sigma, cond(5))
    want = 0.25 / (0.25 + sigma**2)[:, None, None, None] * x
    torch.testing.assert_close(got, want, atol=2e-3 if prediction == "epsilon" else 1e-4, rtol=1e-3)
    assert denoiser.sigma_max == pytest.approx(80) and 0 < denoiser.sigma_min < 0.02


def test_time_is_linear_in_log_sigma_between_steps_and_stops_at_the_ends() -> None:
    known = scheduler()
    denoiser = OutsideDenoiser(Ideal(known.alphas_cumprod, "epsilon"), known, sigma_max=1e9)
    levels = ((1 - known.alphas_cumprod) / known.alphas_cumprod).sqrt().double()
    between = (0.25 * levels[500].log() + 0.75 * levels[501].log()).exp()
    found = denoiser.time(torch.stack([between, levels[0] / 9, levels[-1] * 9]))
    torch.testing.assert_close(found, torch.tensor([500.75, 0.0, 999.0]), atol=1e-3, rtol=0)
    assert denoiser.sigma_max == pytest.approx(float(levels[-1]))
    assert not denoiser.state_dict()  # the schedule is no weight


def unet(**changes: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 24),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        **changes,
    ).eval()


def test_ddim_through_the_adapter_is_diffusers_own() -> None:
    net, known = unet(), scheduler()
    denoiser = OutsideDenoiser(net, known)
    theirs = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    theirs.set_timesteps(10)
    times = theirs.timesteps[2:]  # the first levels are above sigma_max
    abar = known.alphas_cumprod[times]
    sigmas = ((1 - abar) / abar).sqrt()
    x = torch.randn(2, 3, 8, 8)
    state = x * sigmas[0]
    theirs_state = state * abar[0].sqrt()
    with torch.no_grad():
        denoise = Guided(denoiser, cond(2))
        ours = solve(denoise, state, sigmas, "ddim")
        for t in times[:-1]:
            theirs_state = theirs.step(net(theirs_state, t).sample, t, theirs_state).prev_sample
    torch.testing.assert_close(ours * abar[-1].sqrt(), theirs_state, atol=2e-3, rtol=1e-3)


def test_conditions_reach_the_network_and_dropped_ones_are_its_null() -> None:
    net = unet(num_class_embeds=5)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 3.0])
    bare = OutsideDenoiser(net, scheduler(prediction_type="v_prediction"))
    one, other = bare(x, sigma, labels(0, 1)), bare(x, sigma, labels(0, 2))
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    dropped = labels(0, 1).dropped(torch.tensor([False, True]))
    with pytest.raises(UserError, match="give null=, or no guidance"):
        bare(x, sigma, dropped)
    with pytest.raises(UserError, match="this network reads class labels, the conditions are text"):
        bare(x, sigma, cond(2))
    null = Cond(None, None, None, torch.zeros(1, dtype=torch.bool), torch.tensor([4]))
    guided = OutsideDenoiser(net, scheduler(prediction_type="v_prediction"), null)
    four = Cond(None, None, None, torch.zeros(2, dtype=torch.bool), torch.tensor([0, 4]))
    assert torch.equal(guided(x, sigma, dropped), guided(x, sigma, four))
    torch.testing.assert_close(bare.vec(labels(3, 1)), net.class_embedding.weight[[3, 1]])
    images = sample(guided, labels(0, 1, 2), size=(8, 8), steps=3, guidance=2.0).images
    assert images.shape == (3, 3, 8, 8)


def text_unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 24),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=8,
        attention_head_dim=8,
    ).eval()


def test_text_reaches_the_network_without_its_padding() -> None:
    whole = cond(3)
    null = Cond(torch.randn(1, 9, 8), torch.ones(1, 9, dtype=torch.bool), None, torch.zeros(1, dtype=torch.bool))
    denoiser = OutsideDenoiser(text_unet(), scheduler(), null)
    x, sigma = torch.randn(3, 3, 8, 8), torch.full((3,), 2.0)
    assert whole.tokens is not None and whole.mask is not None
    noisy = torch.where(whole.mask[..., None], whole.tokens, 50.0)
    changed = Cond(noisy, whole.mask, whole.pooled, whole.null)
    torch.testing.assert_close(denoiser(x, sigma, whole), denoiser(x, sigma, changed))
    torch.testing.assert_close(denoiser.vec(whole)[0], whole.tokens[0][whole.mask[0]].mean(0))
    torch.testing.assert_close(
        denoiser.vec(whole)[2], (null.tokens if null.tokens is not None else whole.tokens)[0].mean(0)
    )
    assert denoiser.vec_width == 8
    with pytest.raises(UserError, match="this network reads text, the conditions are class labels"):
        denoiser(x, sigma, labels(0, 1, 2))


@pytest.mark.parametrize(
    ("network", "known", "words"),
    [
        (SimpleNamespace(config=SimpleNamespace(sample_size=8)), "FlowMatchEulerDiscreteScheduler", "alphas_cumprod"),
        (unet, {"prediction_type": "flow"}, "prediction type 'flow'"),
        (lambda: diffusers.UNet2DModel(block_out_channels=(32, 32, 32, 32)), {}, "has no sample_size"),
    ],
)
def test_a_process_that_is_not_known_is_one_line(network: Any, known: Any, words: str) -> None:
    if isinstance(known, str):
        known = getattr(diffusers, known)()
    else:
        known = SimpleNamespace(config=known, alphas_cumprod=scheduler().alphas_cumprod)
    with pytest.raises(UserError, match=words) as error:
        OutsideDenoiser(network() if callable(network) else network, known)
    assert "\n" not in str(error.value)


# --- distilling it ----------------------------------------------------------------------------------------------------


class Labels:
    def cond(self, texts: Sequence[str]) -> Cond:
        return cond_of({"labels": torch.from_numpy(labels_of(texts, describe("labels:4")))})


class Captions:
    """Two tokens of 8 for each of four captions."""

    table = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(6))

    def cond(self, texts: Sequence[str]) -> Cond:
        tokens = self.table[[int(t) for t in texts]]
        return Cond(
            tokens, torch.ones(len(texts), 2, dtype=torch.bool), None, torch.zeros(len(texts), dtype=torch.bool)
        )


N = 8


def taught(teacher: OutsideDenoiser, conditions: Any, texts: tuple[str, ...], steps: int) -> Tensor:
    """Images (N, 3, 8, 8) of four plain colours, which the teacher learns in a few steps."""
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]]) * 0.8
    images = colours[[int(t) for t in texts]][:, :, None, None].expand(-1, 3, 8, 8).contiguous()
    optimizer = torch.optim.Adam(teacher.parameters(), 2e-3)
    for _ in range(steps):
        sigma = torch.exp(torch.randn(N) * 1.5 - 0.5).clamp(teacher.sigma_min, teacher.sigma_max)
        s = sigma[:, None, None, None]
        error = teacher(images + s * torch.randn_like(images), sigma, conditions.cond(texts)) - images
        optimizer.zero_grad()
        (error.square() * (1 + 1 / s**2).clamp(max=100)).mean().backward()
        optimizer.step()
    return images


@pytest.mark.parametrize("kind", ["classes", "text"])
def test_a_teacher_from_outside_is_inverted_and_distilled(tmp_path: Path, kind: str) -> None:
    network, conditions = (unet(num_class_embeds=4), Labels()) if kind == "classes" else (text_unet(), Captions())
    teacher = OutsideDenoiser(network, scheduler(prediction_type="v_prediction"), sigma_max=20.0)
    texts = tuple(str(i % 4) for i in range(N))
    images = taught(teacher, conditions, texts, 50)
    features = OutsideFeatures(teacher)
    ode = Ode("heun", 12, teacher.sigma_min, teacher.sigma_max)
    denoise = Guided(teacher, conditions.cond(texts))
    with torch.no_grad():
        latents = ode.to_latent(denoise, images)
        assert psnr(ode.to_image(denoise, latents), images) > 20
    origin = torch.stack([torch.zeros(N), torch.arange(N), torch.zeros(N)], 1).long()
    write_shard(tmp_path / "00000.safetensors", {"latent": latents.half(), "origin": origin})
    shard = read_shard(tmp_path / "00000.safetensors")
    assert shard is not None
    z, made = shard["latent"].float(), OutsideGenerator(teacher)
    assert torch.equal(made(z, conditions.cond(texts)), teacher(20 * z, torch.full((N,), 20.0), conditions.cond(texts)))
    kept = {n: t.clone() for n, t in teacher.state_dict().items()}

    def batches(start: int, step: int) -> Iterator[DistillBatch]:
        while True:
            yield DistillBatch(images, texts, torch.arange(start, start + N), z, images, texts)
            start += step

    objective = DistillObjective(made, features, conditions, LossSettings(), seed=0)
    settings = TrainSettings(images=16 * N, batch=N, lr=5e-4, warmup=0, decay="constant", log_every=N)
    loop.train(objective, batches, settings, tmp_path / "run", seed=0)
    rec = [json.loads(line)["generator/rec"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rec[-1] < 0.6 * rec[0]
    assert all(torch.equal(t, kept[n]) for n, t in teacher.state_dict().items())
    assert not [m for m in network.modules() if m._forward_hooks]
    samples = generate(made, conditions.cond(texts), size=(8, 8), seed=1)
    assert samples.nfe == 1 and samples.images.shape == (N, 3, 8, 8)
    with pytest.raises(UserError, match="expected multiples of 2"):
        made.latent_size((7, 8))


def test_a_generator_from_outside_starts_as_its_teacher_at_the_highest_noise() -> None:
    teacher = OutsideDenoiser(unet(), scheduler(), sigma_max=20.0)
    made, z = OutsideGenerator(teacher), torch.randn(2, 3, 8, 8)
    assert torch.equal(made(z, cond(2)), teacher(20 * z, torch.full((2,), 20.0), cond(2)))
    assert (made.resolution, made.latent_resolution, made.guided) == (8, 8, False)
    with torch.no_grad():
        made.last_layer.zero_()  # a copy, which trains
    assert teacher.unet.conv_out.weight.any() and made.last_layer.requires_grad


def test_the_output_layer_of_a_generator_from_outside_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    made = OutsideGenerator(OutsideDenoiser(unet(), scheduler()))
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compiled.append(module))
    made.compile(dynamic=False)
    inside = {p for module in compiled for p in module.parameters()}
    assert made.last_layer not in inside and len(compiled) == 5 and len(inside) > 50  # two blocks down, two up


def test_features_of_a_teacher_from_outside_are_its_maps_on_the_way_down() -> None:
    teacher = OutsideDenoiser(unet(num_class_embeds=4), scheduler())
    features = OutsideFeatures(teacher)
    images = torch.rand(2, 3, 8, 8).requires_grad_()
    seen = features(images, labels(0, 3), torch.zeros(2, 2))
    assert [t.shape for t in seen.tokens] == [(2, 16, 16), (2, 16, 24), (2, 16, 24)]
    assert features.widths(8) == [16, 24, 24] and seen.vec.shape == (2, features.vec_width)
    torch.stack([t.square().mean() for t in seen.tokens]).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
