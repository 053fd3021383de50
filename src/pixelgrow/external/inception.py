"""Inception-v3 as the Fréchet Inception Distance uses it: the network of TensorFlow's file of 2015, weights and all.

Network: Szegedy et al., arXiv 1512.00567. The file (inception-2015-12-05) differs from torchvision's network: 1008
classes, averages that do not count the padding, and a maximum in place of an average in the last block. pytorch-fid and
torch-fidelity publish the same file of its weights under two names; names of parameters here are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelgrow.external import hub

NAME = "inception"
URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
OTHERS = ("pt_inception-2015-12-05-6726825d.pth",)  # as pytorch-fid names it
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE, MEAN, STD = 299, 128.0, 128.0  # px; of 8-bit values, all channels alike
WIDTH, CLASSES = 2048, 1008

_Kernel = int | tuple[int, int]
_Step = tuple[int, _Kernel] | tuple[tuple[int, _Kernel], tuple[int, _Kernel]]  # channels, kernel; or two side by side


class InceptionV3(nn.Module):
    """Normalised images (B, 3, 299, 299) -> pooled features (B, 2048) and logits (B, 1008).

    The logits have no bias, as those that the published Inception Scores are computed from (torch-fidelity calls them
    `logits_unbiased`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, padding=0)
        for name, inputs, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            branches: dict[str, Sequence[_Step]] = {
                "1x1": [(64, 1)], "5x5": [(48, 1), (64, 5)], "3x3dbl": [(64, 1), (96, 3), (96, 3)],
            }  # fmt: skip
            self.add_module(f"Mixed_{name}", _Mixed(inputs, branches, pool))
        self.Mixed_6a = _Mixed(288, {"3x3": [(384, 3)], "3x3dbl": [(64, 1), (96, 3), (96, 3)]}, stride=2)
        for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            branches = {
                "1x1": [(192, 1)],
                "7x7": [(c, 1), (c, (1, 7)), (192, (7, 1))],
                "7x7dbl": [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
            }
            self.add_module(f"Mixed_{name}", _Mixed(768, branches, 192))
        branches = {"3x3": [(192, 1), (320, 3)], "7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]}
        self.Mixed_7a = _Mixed(768, branches, stride=2)
        pair = (384, (1, 3)), (384, (3, 1))
        branches = {"1x1": [(320, 1)], "3x3": [(384, 1), pair], "3x3dbl": [(448, 1), (384, 3), pair]}
        self.Mixed_7b = _Mixed(1280, branches, 192)
        self.Mixed_7c = _Mixed(2048, branches, 192, maximum=True)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for name, part in self.named_children():
            if name == "fc":
                break
            x = part(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, 2)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


class _Mixed(nn.Module):
    """Branches of convolutions side by side, and a branch of pooling.

    branches: steps by the branch's name; at `stride` 2 its last step strides. pool: channels of the convolution after
    pooling; without it, pooling is a maximum at the stride.
    """

    def __init__(
        self, inputs: int, branches: dict[str, Sequence[_Step]], pool: int = 0, stride: int = 1, maximum: bool = False
    ) -> None:
        super().__init__()
        self.stride, self.maximum, self.branches = stride, maximum, list[list[list[str]]]()
        for branch, steps in branches.items():
            width, names = inputs, list[list[str]]()
            for number, step in enumerate(steps, 1):
                name = f"branch{branch}" + (f"_{number}" if len(steps) > 1 else "")
                last = number == len(steps)
                sides = step if isinstance(step[0], tuple) else (step,)
                names.append([name + (letter if len(sides) > 1 else "") for letter in "ab"[: len(sides)]])
                for each, (channels, kernel) in zip(names[-1], sides, strict=True):
                    self.add_module(each, _Conv(width, channels, kernel, stride if last else 1))
                width = sum(channels for channels, _ in sides)
            self.branches.append(names)
        self.branch_pool = _Conv(inputs, pool, 1) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for steps in self.branches:
            h = x
            for names in steps:
                h = torch.cat([self.get_submodule(name)(h) for name in names], 1)
            outputs.append(h)
        if self.stride == 2:
            return torch.cat([*outputs, F.max_pool2d(x, 3, 2)], 1)
        pooled = F.max_pool2d(x, 3, 1, 1) if self.maximum else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        assert self.branch_pool is not None
        return torch.cat([*outputs, self.branch_pool(pooled)], 1)


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU; padded unless it strides or `padding` is 0."""

    def __init__(self, inputs: int, outputs: int, kernel: _Kernel, stride: int = 1, padding: int | None = None) -> None:
        super().__init__()
        h, w = (kernel, kernel) if isinstance(kernel, int) else kernel
        pads = (h // 2, w // 2) if padding is None and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, (h, w), stride, pads, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def resize(images: Tensor, side: int) -> Tensor:
    """Float images (B, C, H, W) -> (B, C, side, side), bilinear as TensorFlow 1 does it, which the published FIDs use.

    Pixel i of the result lies at i * H / side of the image, without the half pixel that centres need, and nothing is
    averaged: a smaller copy of a large image skips pixels.
    """
    for dim in (3, 2):
        size = images.shape[dim]
        at = torch.arange(side, dtype=torch.float32, device=images.device) * torch.tensor(size / side)
        low = at.long()
        part = (at - low).view((-1, 1) if dim == 2 else (1, -1))
        below, above = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp_max(size - 1))
        images = below + (above - below) * part
    return images


def load(path: Path | None = None, device: torch.device | str = "cpu") -> InceptionV3:
    """The frozen network, its weights from `path`, or from torch's folder of downloads, or fetched now.

    Raises UserError if they cannot be had or are not the published ones.
    """
    label = f"extractor {NAME}"
    path = path or hub.published(label, URL, SHA256, OTHERS)
    network = InceptionV3()
    network.load_state_dict(hub.state_dict(label, path, SHA256))
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster; torch's types lack it
    return network.eval().requires_grad_(False)
