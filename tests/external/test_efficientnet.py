"""EfficientNet-Lite0 against the network code of its own package, and the ways its weights can be wrong."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet

from pixelgrow.errors import UserError
from pixelgrow.external import efficientnet
from pixelgrow.external.vision import describe, load_vision


def test_it_is_the_network_of_the_weights_own_package() -> None:
    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(efficientnet.weights(), weights_only=True))
    ours, x = efficientnet.load(), torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    for block in theirs._blocks:
        block.register_forward_hook(lambda *found: seen.append(found[2]))
    with torch.no_grad():
        features, logits = ours(x)
        torch.testing.assert_close(logits, theirs(x), rtol=0, atol=1e-4)
        torch.testing.assert_close(features, theirs.extract_features(x).mean((2, 3)), rtol=0, atol=1e-4)
        last = [a for a, b in itertools.pairwise([*seen[:16], x[..., :1, :1]]) if b.shape[-1] < a.shape[-1]]
        for got, want in zip(ours.maps(x), last[1:], strict=True):  # without the one at half the side
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize(("side", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (9, 5, 2), (10, 5, 2), (9, 3, 1)])
def test_padding_is_tensorflows(side: int, kernel: int, stride: int) -> None:
    """SAME: ceil(side / stride) outputs, the padding halved, its odd pixel at the end."""
    conv = efficientnet._Conv(1, 1, kernel, stride)
    with torch.no_grad():
        conv.weight.fill_(1)
    x, outputs = torch.rand(1, 1, side, side), -(-side // stride)
    pad = max((outputs - 1) * stride + kernel - side, 0) // 2
    got = conv(x)
    assert got.shape[2:] == (outputs, outputs)
    for i in range(outputs):
        for j in range(outputs):
            top, left = i * stride - pad, j * stride - pad
            want = x[0, 0, max(top, 0) : top + kernel, max(left, 0) : left + kernel].sum()
            torch.testing.assert_close(got[0, 0, i, j], want)


def test_as_a_vision_model_it_gives_four_maps_as_tokens() -> None:
    ours = load_vision(efficientnet.NAME)
    assert ours.widths == [24, 40, 112, 320] and ours.spec == describe(efficientnet.NAME)
    images = (torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1).requires_grad_()
    tokens = ours(images)
    assert [t.shape[1] for t in tokens] == [56**2, 28**2, 14**2, 7**2]
    x = torch.nn.functional.interpolate(images, (224, 224), mode="bicubic", antialias=True)
    maps = ours.model.maps((127.5 * (x + 1) - 127) / 128)
    torch.testing.assert_close(tokens[2][:, 17], maps[2][:, :, 1, 3], rtol=0, atol=1e-4)
    torch.testing.assert_close(maps[-1], ours.model.maps(ours.spec.prepare(images))[-1], rtol=0, atol=1e-4)
    sum(t.square().mean() for t in tokens).backward()
    assert images.grad is not None and images.grad.abs().amin() > 0


def test_without_the_extra_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    for use in (describe, load_vision):
        with pytest.raises(UserError, match=r"needs the package .*: pip install 'pixelgrow\[vision\]'") as error:
            use(efficientnet.NAME)
        assert "\n" not in str(error.value)


def test_damaged_weights_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lite0.pth"
    shutil.copyfile(efficientnet.weights(), file)
    fingerprint = describe(efficientnet.NAME).fingerprint
    with file.open("r+b") as stream:
        stream.seek(-1000, 2)
        stream.write(b"x")
    monkeypatch.setattr(efficientnet, "weights", lambda: file)
    with pytest.raises(UserError, match=f"lite0.pth has SHA-256 .*, expected {efficientnet.SHA256}; it is another"):
        load_vision(efficientnet.NAME)
    assert describe(efficientnet.NAME).fingerprint != fingerprint
