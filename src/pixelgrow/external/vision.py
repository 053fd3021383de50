"""Frozen networks for images: transformers' vision models, EfficientNet-Lite0, CLIP with its text half, LPIPS."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelgrow.errors import UserError
from pixelgrow.external import efficientnet, hub
from pixelgrow.external.efficientnet import EfficientNetLite0
from pixelgrow.external.published import PUBLISHED, Published

DEPTHS = (1 / 3, 2 / 3, 1.0)  # parts of a network's depth after which hidden states are features
LPIPS_SIDE = 224  # px; smaller images are enlarged to it, as VGG halves an image four times. Ours
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # of an image processor, of a processor with one
_FILES = (
    "config.json", *_PROCESSORS,
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip


@dataclass(frozen=True)
class VisionSpec:
    """A vision model, not loaded.

    side: of the square images that it was trained on. mean, std: of RGB in [0, 1], to normalise its input.
    fingerprint: of its weights and settings. weights: their files. sha256: what they must have, "" for any.
    """

    name: str
    folder: Path
    model_type: str
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    weights: tuple[Path, ...]
    sha256: str = ""

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"vision model {self.name!r}"

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> the model's input (B, 3, side, side), antialiased and differentiable."""
        x = images.float()
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return ((x + 1) / 2 - mean) / std


def layers_of(depth: int) -> list[int]:
    """The layers, counted from 1 to `depth`, whose outputs are features."""
    return sorted({max(1, round(part * depth)) for part in DEPTHS})


def describe(name: str) -> VisionSpec:
    """Find the vision model `name` without loading its weights.

    name: `efficientnet-lite0`, a short name (`PUBLISHED`), a folder, or a name on the hub. Raises UserError if it is
    not found, is not in safetensors, or has no settings of an image processor.
    """
    if name == efficientnet.NAME:
        return _describe_efficientnet()
    label, published = f"vision model {name!r}", PUBLISHED.get(name, Published(name))
    folder = hub.find(
        "vision model", published.place, offline=f"; {efficientnet.NAME} needs no network", weights=published.weights
    )
    files = [folder / published.weights] if published.weights else hub.weights(label, folder)
    config = _json(label, folder / "config.json")
    given = next((_json(label, folder / f) for f in _PROCESSORS if (folder / f).exists()), None)
    if given is None:
        raise UserError(
            f"{label}: no {_PROCESSORS[0]} in {folder}; expected the settings of its image processor; save the "
            "processor into the folder"
        )
    given = given.get("image_processor", given)
    try:
        cropped = given.get("do_center_crop", True) and given.get("crop_size")
        side = _side(cropped or given["size"])
        normal = given.get("do_normalize", True)
        mean, std = (given["image_mean"], given["image_std"]) if normal else ((0.0,) * 3, (1.0,) * 3)
        mean, std = tuple(map(float, mean)), tuple(map(float, std))
        model_type = str(config["model_type"])
        if len(mean) != 3 or len(std) != 3 or side < 1 or min(std) <= 0:
            raise ValueError("not for RGB images")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{label}: its settings in {folder} are not an image processor's ({type(error).__name__}: {error}); "
            "expected size, image_mean and image_std for RGB images; choose another model"
        ) from error
    found = hub.fingerprint(label, folder, _FILES, "pixelgrow vision 1", files if published.weights else None)
    return VisionSpec(name, folder, model_type, side, mean, std, found, tuple(files), published.sha256)


def _describe_efficientnet() -> VisionSpec:
    file = efficientnet.weights()
    mean, std = ((value / 255,) * 3 for value in (efficientnet.MEAN, efficientnet.STD))
    found = hub.fingerprint(efficientnet.NAME, file.parent, (), "pixelgrow vision 1", [file])
    return VisionSpec(
        *(efficientnet.NAME, file.parent, efficientnet.NAME, efficientnet.SIDE, mean, std, found, (file,)),
        efficientnet.SHA256,
    )


def _side(size: Any) -> int:
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return int(size)


def _json(label: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        reason = "not a mapping"
    except (OSError, ValueError, RecursionError) as error:
        reason = type(error).__name__
    raise UserError(
        f"{label}: {path} cannot be read ({reason}); expected a folder that transformers' save_pretrained wrote; fetch "
        "it again"
    )


class Vision:
    """A frozen vision model: images -> the hidden states of some of its layers, as tokens.

    widths: channels of each. Class and register tokens are kept; maps (B, C, h, w) of convolutional networks are
    flattened to tokens. The layers of EfficientNet-Lite0 are the last ones at 1/4, 1/8, 1/16 and 1/32 of the side.
    """

    def __init__(self, spec: VisionSpec, model: Any) -> None:
        self.spec, self.model = spec, model.eval().requires_grad_(False)
        with torch.no_grad():
            device = next(self.model.parameters()).device
            self.widths = [t.shape[-1] for t in self(torch.zeros(1, 3, spec.side, spec.side, device=device))]

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> (B, N, C) for each layer, differentiable in the images."""
        x = self.spec.prepare(images)
        if isinstance(self.model, EfficientNetLite0):
            chosen = self.model.maps(x)
        else:
            states = self.model(pixel_values=x, output_hidden_states=True).hidden_states
            chosen = [states[n] for n in layers_of(len(states) - 1)]
        return [h.flatten(2).transpose(1, 2) if h.ndim == 4 else h for h in chosen]


class Clip:
    """A frozen CLIP: images and captions -> embeddings in one space."""

    def __init__(self, spec: VisionSpec, model: Any, tokenizer: Any) -> None:
        self.spec, self.model, self.tokenizer = spec, model.eval().requires_grad_(False), tokenizer
        self.longest = model.config.text_config.max_position_embeddings

    def images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, C), differentiable in the images."""
        return self.model.visual_projection(self.model.vision_model(self.spec.prepare(images)).pooler_output)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Captions -> (B, C); captions longer than CLIP reads are truncated."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        ).to(self.model.device)
        out = self.model.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return self.model.text_projection(out.pooler_output)


def load_vision(name: str, device: torch.device | str = "cpu") -> Vision:
    """Load a vision model; of CLIP and the like, only the image half. Raises UserError."""
    spec = describe(name)
    if name == efficientnet.NAME:
        return Vision(spec, efficientnet.load(device))
    model, _ = load_model(spec, "AutoModel", unused="pooler")
    half = getattr(model, "vision_model", model).to(device)
    with hub.loading(spec.label, spec.folder):  # it is evaluated once, and may not be a vision model
        return Vision(spec, half)


def load_model(spec: VisionSpec, model_class: str, unused: str = "") -> tuple[Any, list[str]]:
    """A model of transformers and what its weights lack, after the check of its hash."""
    import transformers

    if spec.sha256:
        hub.check_sha256(spec.label, spec.weights, spec.sha256)
    pickled = spec.weights[0].suffix != ".safetensors"
    return hub.loaded(spec.label, spec.folder, getattr(transformers, model_class), unused, safetensors=not pickled)


def load_clip(name: str, device: torch.device | str = "cpu") -> Clip:
    """Load a CLIP with both halves. Raises UserError if it is another model."""
    import transformers

    spec = describe_clip(name)
    model, _ = load_model(spec, "CLIPModel")
    with hub.loading(spec.label, spec.folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(spec.folder, local_files_only=True)
    return Clip(spec, model.to(device), tokenizer)


def describe_clip(name: str) -> VisionSpec:
    """`describe`, for a CLIP with both halves; UserError if it is another model."""
    spec = describe(name)
    if spec.model_type != "clip":
        raise UserError(f"{spec.label} is of type {spec.model_type!r}, expected 'clip', with both halves; name a CLIP")
    return spec


# --- LPIPS, an extra --------------------------------------------------------------------------------------------------


class Lpips:
    """LPIPS (Zhang et al., arXiv 1801.03924) with VGG-16, from the package `lpips`."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        package = _lpips()
        try:
            model = package.LPIPS(net="vgg", verbose=False)
        except OSError as error:
            raise UserError(
                f"distance: lpips: its VGG-16 cannot be fetched ({error}); check the network, or copy it to torch's "
                "hub folder, where torchvision looks for it"
            ) from error
        self.model = model.eval().requires_grad_(False).to(device)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance (B,) of images (B, 3, H, W) in [-1, 1]."""
        a, b = (
            x if x.shape[-1] >= LPIPS_SIDE else F.interpolate(x, (LPIPS_SIDE, LPIPS_SIDE), mode="bilinear")
            for x in (a, b)
        )
        return self.model(a, b).flatten(1)[:, 0]


def describe_lpips() -> str:
    """The version of LPIPS, for records. Raises UserError if it is not installed."""
    _lpips()
    return f"lpips {version('lpips')}"


def _lpips() -> Any:
    try:
        import lpips
    except ImportError as error:
        raise UserError(
            f"distance: lpips needs the packages lpips and torchvision ({error}): install pixelgrow[lpips], or write "
            "distance: teacher"
        ) from error
    return lpips
