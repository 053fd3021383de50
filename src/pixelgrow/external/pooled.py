"""One feature an image, from a vision model of transformers."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pixelgrow.external import hub
from pixelgrow.external.vision import VisionSpec, describe, load_model

Layer = Literal["embedding, of unit length", "pooler_output", "class token", "mean of tokens"]
_CLASSES = {"vit_mae": "ViTModel"}  # its own class hides a random part of each image
_CLASS_TOKENS = ("cls_token", "class_embedding")


class Pooled:
    """A frozen vision model of transformers: its prepared input (B, 3, side, side) -> features (B, width).

    layer: of a CLIP the embedding, of unit length, as CMMD takes it (arXiv 2401.09603); else what transformers calls
    `pooler_output`: of DINOv2 the class token, which FD-DINOv2 takes (arXiv 2306.04675). Without a pooler, or if its
    weights are `missing`: the class token after the last layer, or the mean of all tokens.
    """

    def __init__(self, spec: VisionSpec, model: Any, missing: bool, projection: Any = None) -> None:
        self.spec, self.model = spec, model.eval().requires_grad_(False)
        self.projection = projection and projection.requires_grad_(False)
        with torch.no_grad():
            seen = self.model(pixel_values=torch.zeros(1, 3, spec.side, spec.side, device=model.device))
        self.layer: Layer = "mean of tokens"
        if projection is not None:
            self.layer = "embedding, of unit length"
        elif getattr(seen, "pooler_output", None) is not None and not missing:
            self.layer = "pooler_output"
        elif any(token in name for name, _ in model.named_parameters() for token in _CLASS_TOKENS):
            self.layer = "class token"
        self.width: int = self._pool(seen).shape[1]

    def _pool(self, seen: Any) -> Tensor:
        match self.layer:
            case "embedding, of unit length":
                return F.normalize(self.projection(seen.pooler_output), dim=1)
            case "pooler_output":
                return seen.pooler_output.flatten(1)
            case "class token":
                return seen.last_hidden_state[:, 0]
            case "mean of tokens":
                last = seen.last_hidden_state  # tokens (B, N, C), or a map (B, C, h, w)
                return last.mean((2, 3)) if last.ndim == 4 else last.mean(1)

    def __call__(self, x: Tensor) -> Tensor:
        return self._pool(self.model(pixel_values=x))


def load_pooled(name: str, device: torch.device | str = "cpu") -> Pooled:
    """Load a vision model by `describe`'s names; of CLIP and the like, only the image half. Raises UserError."""
    spec = describe(name)
    model, missing = load_model(spec, _CLASSES.get(spec.model_type, "AutoModel"), unused="pooler")
    half, projection = getattr(model, "vision_model", model), getattr(model, "visual_projection", None)
    with hub.loading(spec.label, spec.folder):  # it is evaluated once, and may not be a vision model
        return Pooled(spec, half.to(device), bool(missing), projection and projection.to(device))
