"""Feature extractors: 8-bit images to the features that distances compare, by name.

What happens to an image before the network is part of an extractor: its size, filter, antialiasing, range and rounding
change a Frechet distance as much as a model does (arXiv 2104.11222). `describe` says it all; `identity` is its hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.external import efficientnet, hub, inception
from pixelgrow.external.pooled import load_pooled
from pixelgrow.external.published import PUBLISHED
from pixelgrow.writing import reading

NAMES = (efficientnet.NAME, inception.NAME, *PUBLISHED)
TOGETHER = 64  # images in a forward pass on a GPU; 1 on a CPU


class Features(NamedTuple):
    """features (B, width) float32; logits (B, classes) float32, of classifiers only. On the CPU."""

    features: Tensor
    logits: Tensor | None


class Extractor(Protocol):
    """A feature extractor: a call takes uint8 images (B, 3, h, w) of any size.

    A feature depends on its image alone, bit for bit: not on other images, nor on how many come in a call. identity:
    SHA-256 of all that decides it: network, weights, layer, and what is done to an image before.
    """

    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def identity(self) -> str: ...
    def describe(self) -> dict[str, Any]: ...
    def __call__(self, images: Tensor, /) -> Features: ...


@dataclass(frozen=True)
class Preparation:
    """What is done to an 8-bit image: it is resized, whole, to side x side in float32, and (x - mean) / std.

    resize: `bicubic` as Pillow does it (a = -0.5), clipped to 0..255; `bilinear of TensorFlow 1`, see
    `external.inception.resize`. antialias: a smaller copy averages over more pixels. Nothing is rounded. mean, std: of
    8-bit values.
    """

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Literal["bicubic", "bilinear of TensorFlow 1"] = "bicubic"
    antialias: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        x = images.float()
        if x.shape[-2:] != (self.side, self.side):
            if self.resize == "bicubic":
                x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=self.antialias).clamp(0, 255)
            else:
                x = inception.resize(x, self.side)
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return (x - mean) / std


@dataclass(frozen=True)
class NetworkExtractor:
    """A frozen network as an `Extractor`.

    run: prepared images -> features (B, width) and logits (B, classes), or None. network, layer, weights: what `run`
    is, in words, and the SHA-256 of its weights. classes: 0 for no classifier. together: images in a forward pass.
    """

    name: str
    network: str
    weights: str
    layer: str
    width: int
    classes: int
    preparation: Preparation
    run: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    device: torch.device
    together: int

    def describe(self) -> dict[str, Any]:
        """All that decides a feature, for JSON: {"name", "network", "weights", "layer", "width", "side", ...}."""
        of_network = {key: getattr(self, key) for key in ("name", "network", "weights", "layer", "width", "classes")}
        prepared = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.preparation).items()}
        return of_network | prepared | {"range": [0, 255], "rounding": "none", "precision": "float32"}

    @property
    def identity(self) -> str:
        """SHA-256 of what `describe` says but the name: a model is the same in a folder and on the hub."""
        said = {key: value for key, value in self.describe().items() if key != "name"}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def __call__(self, images: Tensor) -> Features:
        """uint8 images (B, 3, h, w) -> their features and logits."""
        assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
        with _float32():
            if self.together > 1:
                passes = [self._pass(some) for some in images.split(self.together)]
            else:  # an image a thread, not all threads on an image: none waits, and sums are the same for any number
                with ThreadPoolExecutor(torch.get_num_threads(), "", torch.set_num_threads, (1,)) as pool:
                    passes = list(pool.map(self._pass, images.split(1)))
        features, logits = zip(*passes, strict=True)
        return Features(torch.cat(features), torch.cat(logits) if self.classes else None)

    @torch.no_grad()
    def _pass(self, some: Tensor) -> tuple[Tensor, Tensor]:
        """A forward pass, of as many images every time: kernels for another number may round in another way."""
        filled = torch.cat([some, some.new_zeros(self.together - len(some), *some.shape[1:])])
        features, logits = self.run(self.preparation(filled.to(self.device)))
        if logits is None:
            logits = features[:, :0]
        return features[: len(some)].float().cpu(), logits[: len(some)].float().cpu()


@contextmanager
def _float32() -> Iterator[None]:
    """Convolutions of a GPU in float32, not TF32, and the same ones every time."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def load_extractor(name: str, device: torch.device | str = "cpu") -> Extractor:
    """Load the extractor `name`.

    `efficientnet-lite0`   needs no hub: weights come in the extra `vision`; features before the classifier, and logits
    `inception`            Inception-v3 of the FID; or the path of its published weights (.pth), copied by hand
    `dinov2` (ViT-L/14), `clip` (L/14), `clip-336` (L/14@336), `siglip`, `convnext`: `external.published`
    any other              a folder of a vision model of transformers, or its name on the hub (`owner/name@revision`)

    Weights of a short name have the published SHA-256 where it is known. Raises UserError if it cannot be had.
    """
    device = torch.device(device)
    place = device, 1 if device.type == "cpu" else TOGETHER
    if name == efficientnet.NAME:
        lite = efficientnet.load(device)
        return NetworkExtractor(
            *(name, "EfficientNet-Lite0", efficientnet.SHA256, "pooled, before the classifier"),
            *(efficientnet.WIDTH, efficientnet.CLASSES),
            Preparation(efficientnet.SIDE, (efficientnet.MEAN,) * 3, (efficientnet.STD,) * 3),
            lite,
            *place,
        )
    if name == inception.NAME or name.endswith(".pth"):
        network = inception.load(None if name == inception.NAME else Path(name).expanduser(), device)
        return NetworkExtractor(
            *(inception.NAME, "Inception-v3 of 2015", inception.SHA256, "pool3, 2048; logits without bias"),
            *(inception.WIDTH, inception.CLASSES),
            Preparation(
                *(inception.SIDE, (inception.MEAN,) * 3, (inception.STD,) * 3),
                *("bilinear of TensorFlow 1", False),
            ),
            network,
            *place,
        )
    with reading(name):
        known = name in PUBLISHED or hub.is_repository(name) or (name and Path(name).expanduser().is_dir())
    if not known:
        raise UserError(
            f"extractor {name!r} is unknown: expected {', '.join(NAMES)}, a folder of a vision model of transformers, "
            "or its name on the hub (owner/name)"
        )
    pooled = load_pooled(name, device)
    spec = pooled.spec
    return NetworkExtractor(
        *(name, type(pooled.model).__name__, hub.sha256_of(spec.weights), pooled.layer, pooled.width, 0),
        Preparation(spec.side, tuple(255 * v for v in spec.mean), tuple(255 * v for v in spec.std)),
        lambda x: (pooled(x), None),
        *place,
    )
