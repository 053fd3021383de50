"""A real training step on the CPU and on a GPU: in bfloat16, compiled, resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixelgrow import precision
from pixelgrow.training import monitor
from pixelgrow.training.denoise import DenoiseObjective
from pixelgrow.training.loop import Training, train
from pixelgrow.training.settings import TrainSettings
from training.test_denoise import Labels, awake, stream

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def gradients(device: str, folder: Path, dtype: torch.dtype, compiled: bool = False) -> dict[str, Tensor]:
    """Of one micro-batch, and its loss, as the training loop computes them."""
    denoiser = awake().to(device)
    settings = TrainSettings(images=8, batch=8, compile=compiled)
    training = Training(DenoiseObjective(denoiser, Labels(), settings, seed=0), settings, folder, seed=0)
    training.dtype = dtype
    with precision.tf32():
        training._compile()
        (terms,) = training._gradients([next(stream(8, 8)(0))], "denoiser")
    found = {n: p.grad.cpu() for n, p in denoiser.named_parameters() if p.grad is not None}
    return found | {"loss": terms.loss.detach().cpu()}


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The relative distance of all tensors together."""
    assert a.keys() == b.keys()
    x, y = (torch.cat([t[n].flatten() for n in a]) for t in (a, b))
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_in_bfloat16_is_near_one_in_float32(device: str, tmp_path: Path) -> None:
    full, half = (gradients(device, tmp_path, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert all(t.dtype == torch.float32 for t in half.values())
    assert 1e-4 < far(half, full) < 0.1 and float(half["loss"]) == pytest.approx(float(full["loss"]), rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_step_equals_an_eager_one(dtype: torch.dtype, tmp_path: Path) -> None:
    eager, compiled = (gradients("cuda", tmp_path, dtype, compiled=c) for c in (False, True))
    assert far(compiled, eager) < (0.01 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("device", DEVICES)
def test_a_training_goes_on_where_it_was(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "matmul_rate", lambda *_: 1e11)
    found = []
    for name, stops in (("whole", [None]), ("parts", [16, None])):
        for stop in stops:
            denoiser = awake().to(device)
            settings = TrainSettings(images=32, batch=8, lr=1e-3, save_every=8, snapshot_every=0)
            objective = DenoiseObjective(denoiser, Labels(), settings, seed=1)
            done = train(objective, stream(8, 8), settings, tmp_path / name, seed=1, stop_at=stop)
        averages = done.averages["denoiser"][0].tensors
        assert {t.device.type for t in averages.values()} == {device} and done.images == 32
        found.append({n: t.cpu() for n, t in averages.items()})
    whole, parts = found
    if device == "cpu":
        assert all(t.equal(whole[n]) for n, t in parts.items())
    else:  # sums of a GPU's convolutions may take another order
        assert far(parts, whole) < 1e-3
