"""Power-function averages: against the integral that defines them, against ema-pytorch, and reconstructed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pixelgrow.errors import UserError
from pixelgrow.training.ema import Ema, gamma_of, reconstruct, solve_weights
from pixelgrow.training.settings import MAX_EMA_LENGTH


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.25])
def test_a_length_is_the_relative_deviation_of_its_profile(length: float) -> None:
    gamma = gamma_of(length)
    assert (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5 == pytest.approx(length, rel=1e-9)  # EDM2's sigma_rel
    tau = (np.arange(200_000) + 0.5) / 200_000
    p = tau**gamma / (tau**gamma).sum()
    mean = (p * tau).sum()
    assert np.sqrt((p * (tau - mean) ** 2).sum()) == pytest.approx(length, rel=1e-4)


def walk(steps: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    w, path = {"weight": torch.randn(3, 4, generator=g), "bias": torch.randn(3, generator=g)}, []
    for _ in range(steps):
        w = {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in w.items()}
        path.append(w)
    return path


def follow(path: list[dict[str, torch.Tensor]], length: float, batch: int = 8, keep: int = 0):
    """The averages at every `keep` steps, and at the end."""
    module = nn.Linear(4, 3)
    ema, kept = Ema(module, length), {}
    for i, w in enumerate(path):
        module.load_state_dict(w)
        ema.update(i * batch, (i + 1) * batch)
        if (keep and (i + 1) % keep == 0) or i + 1 == len(path):
            kept[(i + 1) * batch] = {n: t.clone() for n, t in ema.tensors.items()}
    return kept


def integral(path: list[dict[str, torch.Tensor]], length: float) -> dict[str, torch.Tensor]:
    """The weighted mean by its definition (eq. 1): weights held over (i, i + 1] weigh the integral of tau^gamma."""
    edges = (np.arange(len(path) + 1) / len(path)) ** (gamma_of(length) + 1)
    share = np.diff(edges)
    return {n: sum(s * w[n].double() for s, w in zip(share, path, strict=True)) for n in path[0]}


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_the_recursion_is_the_integral(length: float) -> None:
    path = walk(200)
    (average,) = follow(path, length).values()
    for name, expected in integral(path, length).items():
        torch.testing.assert_close(average[name].double(), expected, rtol=1e-4, atol=1e-5)


def test_it_agrees_with_ema_pytorch() -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch.post_hoc_ema")
    module = nn.Linear(4, 3)
    path = walk(60)
    module.load_state_dict(path[0])
    oracle = ema_pytorch.KarrasEMA(module, sigma_rel=0.1, update_every=1)
    assert oracle.gamma == pytest.approx(gamma_of(0.1))
    for w in path:
        module.load_state_dict(w)
        oracle.update()
    # the oracle counts from the second step on: its step i has beta = (1 - 1 / (i + 1))^(1 + gamma)
    (ours,) = follow([path[0], *path], 0.1).values()
    for name, tensor in oracle.ema_model.named_parameters():
        torch.testing.assert_close(ours[name], tensor.detach(), rtol=1e-4, atol=1e-5)


def test_weights_agree_with_ema_pytorch() -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch.post_hoc_ema")
    images, lengths = [100, 100, 200, 200, 300, 300], [0.05, 0.1] * 3
    ours = solve_weights(images, lengths, 300, 0.07)
    gammas = torch.tensor([gamma_of(s) for s in lengths], dtype=torch.float64)
    theirs = ema_pytorch.solve_weights(
        torch.tensor(images), gammas, torch.tensor([300]), torch.tensor([gamma_of(0.07)], dtype=torch.float64)
    )
    np.testing.assert_allclose(ours.weights, theirs[:, 0].numpy(), rtol=1e-6, atol=1e-9)
    assert ours.error < 0.1


def test_the_weights_are_the_least_squares_of_sampled_profiles() -> None:
    images, lengths, at, length = [120, 120, 240, 240, 400, 400], [0.06, 0.12] * 3, 400, 0.09
    tau = (np.arange(400_000) + 0.5) / 1000

    def profile(t: float, s: float) -> np.ndarray:
        g = gamma_of(s)
        return np.where(tau <= t, (g + 1) * (np.minimum(tau, t) / t) ** g / t, 0.0)

    stored = np.stack([profile(t, s) for t, s in zip(images, lengths, strict=True)], 1)
    wanted = profile(at, length)
    brute, *_ = np.linalg.lstsq(stored, wanted, rcond=None)
    mixture = solve_weights(images, lengths, at, length)
    np.testing.assert_allclose(mixture.weights, brute, atol=2e-3)
    error = np.linalg.norm(stored @ brute - wanted) / np.linalg.norm(wanted)
    assert mixture.error == pytest.approx(error, rel=1e-2)


def test_a_stored_average_is_itself(tmp_path: Path) -> None:
    mixture = solve_weights([100, 100, 200, 200], [0.05, 0.1] * 2, 200, 0.1)
    np.testing.assert_allclose(mixture.weights, [0, 0, 0, 1], atol=1e-6)
    assert mixture.error < 1e-5


def snapshots(folder: Path, path: list[dict[str, torch.Tensor]], keep: int) -> None:
    kept = {s: follow(path, s, keep=keep) for s in (0.05, 0.10)}
    for t in kept[0.05]:
        tensors = {f"{s}/{n}": x.half() for s in kept for n, x in kept[s][t].items()}
        save_file(tensors, folder / f"{t:012d}.safetensors")


@pytest.mark.parametrize("length", [0.05, 0.07, 0.1, 0.15])
def test_other_lengths_are_reconstructed_from_snapshots(tmp_path: Path, length: float) -> None:
    path = walk(400)
    snapshots(tmp_path, path, keep=50)
    found = reconstruct(tmp_path, length)
    (expected,) = follow(path, length).values()
    (other,) = follow(path, 0.05 if length >= 0.1 else 0.2).values()
    for name in expected:
        error = (found[name] - expected[name]).norm()
        assert error < 0.2 * (other[name] - expected[name]).norm()
    earlier = reconstruct(tmp_path, length, images=1600)
    (expected,) = follow(path[:200], length).values()
    assert (earlier["weight"] - expected["weight"]).norm() < 0.1 * expected["weight"].norm()


def test_what_cannot_be_reconstructed_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="no snapshots"):
        reconstruct(tmp_path, 0.1)
    for length in (0.0, MAX_EMA_LENGTH, 0.5):  # the limit: a plain average over the run
        with pytest.raises(UserError, match=f"got {length:g}, expected"):
            reconstruct(tmp_path, length)
    snapshots(tmp_path, walk(80), keep=40)
    reconstruct(tmp_path, 0.01)
    assert "the average of length 0.01 is approximated with an error of" in caplog.text
    path = max(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"{path} is cut off .*: delete it to do without"):
        reconstruct(tmp_path, 0.1)


def test_applied_averages_are_put_back() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    ema = Ema(module, 0.1)
    before = {n: (p.data_ptr(), p.clone()) for n, p in module.named_parameters()}
    ema.tensors["1.weight"].fill_(7)
    with pytest.raises(RuntimeError, match="hook"), ema.applied():
        assert module[1].weight[0, 0] == 7
        raise RuntimeError("hook")
    for n, p in module.named_parameters():
        assert p.data_ptr() == before[n][0]
        assert torch.equal(p, before[n][1])
    assert ema.state_dict()["0.weight"].data_ptr() == module[0].weight.data_ptr()
