"""Inception-v3 of the FID against torch-fidelity's, its resizing against a brute force, where weights are found."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch

from pixelgrow.errors import UserError
from pixelgrow.external import hub, inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that a formula gives, so that another program can have the same: see `FEATURES`."""
    network = inception.InceptionV3()
    for number, (name, tensor) in enumerate(network.state_dict().items()):
        if tensor.is_floating_point():
            at = torch.arange(tensor.numel(), dtype=torch.float64) + number
            noise = ((torch.sin(at) * 43758.5453) % 1 * 2 - 1).view(tensor.shape)  # in [-1, 1), hardly correlated
            if tensor.ndim == 4:
                tensor.copy_(noise * (6 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(1 + noise / 2 if name.endswith(("running_var", "bn.weight")) else noise / 10)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def known(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(inception, "SHA256", hub.sha256_of([weights]))
    return weights


# FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"]) of torch-fidelity 0.4.0: `weights`, the image below
FEATURES = [0.0, 1.92011762, 0.47775114, 0.18895994, 2.49398851, 0.96371931, 0.07333332, 0.38802463]  # every 256th
LOGITS = [-7.42871046, -2.33742261, -3.54165363, 1.53192449, 5.58155441, 4.72494411]  # every 168th


def test_it_is_torch_fidelitys_network(known: Path) -> None:
    network = inception.load(known)
    image = (torch.arange(3 * 40 * 60) * 37 % 256).view(1, 3, 40, 60).float()
    with torch.no_grad():
        features, logits = network((inception.resize(image, 299) - 128) / 128)
    assert features.shape == (1, 2048) and logits.shape == (1, 1008) and len(network.state_dict()) == 566
    torch.testing.assert_close(features[0, ::256], torch.tensor(FEATURES), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[0, ::168], torch.tensor(LOGITS), rtol=1e-4, atol=1e-4)
    assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("size", [(5, 9), (20, 11), (7, 7)])
def test_images_are_resized_as_tensorflow_1_does(size: tuple[int, int]) -> None:
    """Pixel (i, j) lies at (i h / side, j w / side); beyond the last row and column lie copies of them."""
    (h, w), side = size, 7
    images = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(3)) * 255
    got = inception.resize(images, side)
    for i in range(side):
        for j in range(side):
            y, x = i * h / side, j * w / side
            top, left = math.floor(y), math.floor(x)
            down, right = min(top + 1, h - 1), min(left + 1, w - 1)
            b, a = y - top, x - left
            want = (1 - b) * ((1 - a) * images[..., top, left] + a * images[..., top, right])
            want += b * ((1 - a) * images[..., down, left] + a * images[..., down, right])
            torch.testing.assert_close(got[..., i, j], want, rtol=0, atol=1e-3)


def test_weights_are_found_where_other_programs_keep_them(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(known.parent))
    folder = known.parent / "checkpoints"
    folder.mkdir()
    (folder / inception.OTHERS[0]).symlink_to(known)
    assert torch.equal(inception.load().fc.bias, inception.load(known).fc.bias)


def test_other_weights_are_one_line(weights: Path) -> None:
    with pytest.raises(UserError, match=f"has SHA-256 .*, expected {inception.SHA256}; it is another file") as error:
        inception.load(weights)
    assert "\n" not in str(error.value) and str(weights) in str(error.value)
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.pth: No such file"):
        inception.load(weights.with_name("nowhere.pth"))


# --- published files of weights ---------------------------------------------------------------------------------------


def test_a_published_file_is_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    source, target = tmp_path / "w.pth", tmp_path / "torch" / "checkpoints" / "w.pth"
    source.write_bytes(b"weights")
    url, sha256 = source.as_uri(), hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(
        UserError, match=r"x: w.pth is not on this machine and cannot be fetched \(HF_HUB_OFFLINE is set\)"
    ):
        hub.published("x", url, sha256)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"cannot be fetched \(invalid hash value") as error:
        hub.published("x", url, "0" * 64)
    assert "\n" not in str(error.value) and not list(target.parent.iterdir())
    assert hub.published("x", url, sha256) == target and target.read_bytes() == b"weights"
    source.unlink()
    assert hub.published("x", url, sha256) == target
    target.unlink()
    with pytest.raises(
        UserError, match=r"w\.pth is not on this machine and cannot be fetched .*; check the network, or copy"
    ):
        hub.published("x", url, sha256)
