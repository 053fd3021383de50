"""The denoising objective on small real denoisers: it learns, resumes to the same bytes, changes no frozen core."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pixelgrow import rng
from pixelgrow.data.loader import Batch
from pixelgrow.diffusion.denoiser import Denoiser, coefficients
from pixelgrow.growth import Init, freeze, grow, grow_network, grown_config
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import CoreConfig
from pixelgrow.models.layers import box_down, up_nearest
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.models.uvit import UViT
from pixelgrow.training import monitor
from pixelgrow.training.denoise import DenoiseObjective, validation_hook
from pixelgrow.training.loop import TrainResult, train
from pixelgrow.training.monitor import Hook
from pixelgrow.training.settings import Checkpointing, TrainSettings


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "matmul_rate", lambda *_: 1e11)


class Labels:
    def cond(self, texts: Sequence[str]) -> Cond:
        labels = torch.tensor([int(t) for t in texts])
        return Cond(None, None, None, torch.zeros(len(texts), dtype=torch.bool), labels)


def core() -> Denoiser:
    torch.manual_seed(0)
    config = CoreConfig(width=32, depth=1, heads=1, text_dim=16, pooled_dim=16, classes=4)
    return Denoiser(UViT(shallow_uvit("tiny", 8, stride=2, core=config)))


def awake() -> Denoiser:
    """A core whose tensors that start at zero are random too: no test passes because something is zero."""
    denoiser = core()
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return denoiser


def images(index: torch.Tensor, side: int) -> torch.Tensor:
    """Plain colours by label with a bright square."""
    x = torch.stack([torch.full((3, side, side), (int(i) % 4) / 2 - 0.75) for i in index])
    x[:, :, : side // 2, : side // 2] += 0.3
    return x


def stream(side: int, batch: int):
    def batches(start: int, step: int = batch) -> Iterator[Batch]:
        while True:
            index = torch.arange(start, start + batch)
            yield Batch(images(index, side), tuple(str(int(i) % 4) for i in index), index)
            start += step

    return batches


def run(denoiser: Denoiser, folder: Path, hooks: Sequence[Hook] = (), **changes) -> TrainResult:
    base = {"images": 64, "batch": 16, "lr": 2e-3, "save_every": 16, "snapshot_every": 0, "validate_every": 64}
    settings = TrainSettings(**(base | changes))
    objective = DenoiseObjective(denoiser, Labels(), settings, seed=1)
    side = denoiser.resolution
    held = torch.arange(8)
    check = validation_hook(
        denoiser, images(held, side), Labels().cond([str(int(i) % 4) for i in held]), settings.validate_every or 0
    )
    return train(objective, stream(side, settings.micro_batch), settings, folder, seed=1, hooks=[check, *hooks])


def same(a: Denoiser, b: Denoiser) -> None:
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


class Stop(Exception):
    pass


def stop(images: int) -> dict[str, float]:
    if images == 32:
        raise Stop
    return {}


def grown() -> Denoiser:
    parent = core()
    index = torch.arange(4)
    child, report = grow(parent, 16, images=images(index, 16), cond=Labels().cond(["0", "1", "2", "3"]))
    freeze(child.net, report.loaded)
    return child


@pytest.mark.parametrize("make", [core, grown])
def test_stopped_and_resumed_is_the_same_bytes(tmp_path: Path, make) -> None:
    whole, cut, rest = make(), make(), make()
    run(whole, tmp_path / "whole")
    with pytest.raises(Stop):
        run(cut, tmp_path / "cut", [Hook("stop", 16, stop)])
    run(rest, tmp_path / "cut")
    same(whole, rest)


def test_it_learns(tmp_path: Path) -> None:
    run(core(), tmp_path, images=1200, validate_every=1200, ema=(0.1,))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    first, last = [r["validation/mean"] for r in records if "validation/mean" in r]
    assert last < 0.8 * first


def test_a_frozen_core_stays_bit_equal_and_averages_share_it(tmp_path: Path) -> None:
    child = grown()
    before = {n: p.clone() for n, p in child.named_parameters() if not p.requires_grad}
    assert before
    result = run(child, tmp_path)
    for name, p in child.named_parameters():
        assert (name in before) == (not p.requires_grad)
        if name in before:
            assert torch.equal(p, before[name])
            assert p.grad is None
    average = result.averages["denoiser"][0]
    assert not average.tensors.keys() & before.keys()
    with average.applied():
        assert all(child.get_parameter(n).data_ptr() == t.data_ptr() for n, t in average.tensors.items())


def test_recomputed_blocks_give_the_same_gradients(tmp_path: Path) -> None:
    grads = []
    ways: tuple[Checkpointing, ...] = (False, True, "selective")
    for recompute in ways:
        denoiser = awake()
        settings = TrainSettings(images=8, batch=8, activation_checkpointing=recompute)
        objective = DenoiseObjective(denoiser, Labels(), settings, seed=0)
        terms = objective.loss(next(stream(8, 8)(0)), "denoiser")
        terms.loss.backward()
        assert {"loss_low", "loss_middle", "loss_high"} >= terms.logs.keys()
        grads.append({n: p.grad for n, p in denoiser.named_parameters() if p.grad is not None and p.grad.any()})
    assert len(grads[0]) > 40
    assert grads[0].keys() == grads[1].keys() == grads[2].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]) and torch.equal(grad, grads[2][name]), name


def test_half_precision_trains_the_real_network() -> None:
    denoiser = awake()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = DenoiseObjective(denoiser, Labels(), TrainSettings(images=8, batch=8), seed=0).loss(
            next(stream(8, 8)(0))
        )
    terms.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in denoiser.parameters() if p.grad is not None)
    full = DenoiseObjective(denoiser, Labels(), TrainSettings(images=8, batch=8), seed=0).loss(next(stream(8, 8)(0)))
    assert terms.loss.item() == pytest.approx(full.loss.item(), rel=0.05)


def test_the_loss_of_a_sample_depends_on_its_index_alone() -> None:
    denoiser = awake()
    objective = DenoiseObjective(denoiser, Labels(), TrainSettings(images=8, batch=8, cond_dropout=0.5), seed=0)
    batch = next(stream(8, 8)(0))
    whole = objective.loss(batch).loss
    halves = [
        objective.loss(Batch(batch.image[rows], batch.text[rows], batch.index[rows])).loss
        for rows in (slice(4, 8), slice(0, 4))
    ]
    assert torch.allclose(whole, sum(halves) / 2, rtol=1e-5)


def test_conditions_that_come_with_a_batch_are_used() -> None:
    objective = DenoiseObjective(awake(), Labels(), TrainSettings(images=8, batch=8), seed=0)
    batch = next(stream(8, 8)(0))
    want, other = objective.loss(batch).loss, objective.loss(replace(batch, text=("3",) * 8)).loss
    objective.text = None  # type: ignore[assignment]
    assert torch.equal(objective.loss(replace(batch, cond=Labels().cond(batch.text))).loss, want) and want != other


def test_images_of_eight_bits_train_as_their_values_do() -> None:
    objective = DenoiseObjective(awake(), Labels(), TrainSettings(images=8, batch=8), seed=0)
    text, index = next(stream(8, 8)(0)).text, torch.arange(8)
    image = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8)
    eight, full = (objective.loss(Batch(x, text, index)) for x in (image, image.float() / 127.5 - 1))
    assert torch.equal(eight.loss, full.loss)
    assert eight.losses is not None
    third = (rng.uniform(0, "sigma", index) * 3).long()
    for number, name in enumerate(("loss_low", "loss_middle", "loss_high")):
        rows = eight.losses[third == number]
        assert torch.equal(eight.logs[name], rows.detach()) if len(rows) else name not in eight.logs


@pytest.mark.parametrize("init", [None, "random", "preserve"])
def test_the_edm_loss_is_the_error_of_the_network_itself(init: Init | None) -> None:
    """|F - target|^2, unweighted, of the first rung; F is 0 before the first step, and so is what `preserve` adds."""
    denoiser = core()
    low = 8
    if init:
        denoiser = Denoiser(UViT(grown_config(denoiser.net.config, 16, init)))
        low = 8 if init == "preserve" else 16
    batch = next(stream(16 if init else 8, 8)(0))
    terms = DenoiseObjective(denoiser, Labels(), TrainSettings(images=8, batch=8), seed=0).loss(batch)
    assert terms.sigma is not None and terms.losses is not None
    k = denoiser.resolution // low
    eps = rng.normal(batch.image.shape[1:], 0, "noise", batch.index)
    x0, x = (box_down(v, k) for v in (batch.image, batch.image + terms.sigma[:, None, None, None] * eps))
    c_skip, c_out, _ = coefficients("edm", terms.sigma / k, 0.5)
    target = (x0 - c_skip[:, None, None, None] * x) / c_out[:, None, None, None]
    want = target.square().mean(dim=(1, 2, 3))
    if init == "preserve":  # the error of the image from below; what is left is that of the details
        c_out_k = c_out[:, None, None, None]
        detail = (batch.image - up_nearest(x0, k)) / c_out_k
        want = want + detail.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(terms.losses, want, rtol=1e-4, atol=1e-6)


def test_a_rung_that_is_trained_alone_is_weighted_by_its_own_preconditioning() -> None:
    """Before the first step it adds nothing, and the error of the image from below over the details' c_out is left."""
    below = core()
    config = grown_config(below.net.config, 16, "preserve", detail_std=0.2, until=math.inf)
    net, report = grow_network(below.net, config, "preserve")
    denoiser = Denoiser(net)
    freeze(net, report.loaded)
    batch = next(stream(16, 8)(0))
    terms = DenoiseObjective(denoiser, Labels(), TrainSettings(images=8, batch=8, cond_dropout=0), seed=0).loss(batch)
    assert terms.sigma is not None and terms.losses is not None
    eps = rng.normal(batch.image.shape[1:], 0, "noise", batch.index)
    x = batch.image + terms.sigma[:, None, None, None] * eps
    low = below(box_down(x, 2), terms.sigma / 2, Labels().cond(batch.text))
    _, c_out, _ = coefficients("edm", terms.sigma, 0.2)
    want = (batch.image - up_nearest(low, 2)).square().mean((1, 2, 3)) / c_out**2
    torch.testing.assert_close(terms.losses, want, rtol=1e-4, atol=1e-6)


def test_sigmoid_divides_by_the_density_of_the_training_noise() -> None:
    denoiser, batch, losses = awake(), next(stream(8, 8)(0)), {}
    noise = {"kind": "cosine"}
    for name, more in (("eps", {}), ("sigmoid", {}), ("biased", {"weighting_bias": 1.0})):
        weighting = "sigmoid" if name == "biased" else name
        settings = TrainSettings(images=8, batch=8, noise=noise, weighting=weighting, **more)
        terms = DenoiseObjective(denoiser, Labels(), settings, seed=0).loss(batch)
        assert terms.sigma is not None and terms.losses is not None
        losses[name] = terms.losses
    log_snr = -2 * terms.sigma.log()
    density = 1 / (2 * math.pi * torch.cosh(log_snr / 2))  # of log-SNR = -2 log tan(pi t / 2), t uniform
    for name, bias in (("sigmoid", -3.0), ("biased", 1.0)):
        want = losses["eps"] * torch.sigmoid(bias - log_snr) / density
        torch.testing.assert_close(losses[name], want, rtol=1e-4, atol=1e-6)


def test_dropping_and_noise_have_their_own_streams() -> None:
    index = torch.arange(1000)
    a, b = (rng.uniform(0, stream, index) for stream in ("sigma", "dropout"))
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.1


@pytest.mark.parametrize(("side", "scales"), [(16, 1), (32, 1), (64, 2), (128, 3)])
def test_the_multiscale_loss_goes_down_to_32_px(side: int, scales: int) -> None:
    """simple diffusion, arXiv 2301.11093, section 3.4. All scales weigh alike. A checkerboard of single pixels is an
    error at the first scale alone, a constant error at all of them."""

    class Black(Denoiser):
        def forward(self, x: torch.Tensor, sigma: torch.Tensor, cond: Cond) -> torch.Tensor:
            return 0 * x

    black = Black(UViT(shallow_uvit("tiny", side, core=CoreConfig(width=32, depth=1, heads=1, classes=4))))
    checker = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(side // 2, side // 2).expand(2, 3, -1, -1)
    batch = Batch(checker, ("0", "1"), torch.arange(2))
    found = []
    for multiscale in (False, True):
        settings = TrainSettings(images=8, batch=8, multiscale=multiscale)
        objective = DenoiseObjective(black, Labels(), settings, seed=0)
        found.append([objective.loss(Batch(x, batch.text, batch.index)).loss.item() for x in (checker, checker.abs())])
    (plain, even), (multi, multi_even) = found
    assert multi == pytest.approx(plain / scales)
    assert multi_even == pytest.approx(even)
