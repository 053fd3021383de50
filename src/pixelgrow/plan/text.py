"""What a recipe's captions take: room on the disk and time, or work while training, before anything is encoded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from pixelgrow.external import hub
from pixelgrow.models.sizes import core_config
from pixelgrow.plan.shapes import is_here
from pixelgrow.recipe.stages import Recipe, TrainStage
from pixelgrow.text.cache import mean_length, stored_bytes
from pixelgrow.text.encoders import load_tokenizer
from pixelgrow.text.spec import EncoderSpec, describe

# Tensors that take no part in encoding: tables that are looked up, decoders, the towers of images.
_NOT = (
    "embed",
    "shared",
    "decoder.",
    "vision_model.",
    "visual_projection",
    "text_projection",
    "lm_head",
    "logit_scale",
)


# Of the published encoders of T5 v1.1: width, width of the hidden layer, of all heads, layers.
_T5 = {
    "small": (512, 1024, 384, 8),
    "base": (768, 2048, 768, 12),
    "large": (1024, 2816, 1024, 24),
    "xl": (2048, 5120, 2048, 24),
    "xxl": (4096, 10240, 4096, 24),
}


def _published(name: str) -> int | None:
    """The parameters of the matrices of an encoder that is not here, if its shape is known."""
    shape = _T5.get(name.removeprefix("google/t5-v1_1-"))
    if shape is None:
        return None
    width, hidden, heads, layers = shape
    return layers * (4 * width * heads + 3 * width * hidden)


@dataclass(frozen=True)
class TextPlan:
    """Of a recipe's captions. `captions`: at most so many distinct ones, None if the data were not looked at.

    Of one caption, `tokens`: the mean, or the most, which `measured` tells; `size`: its bytes on the disk; `flops`: of
    encoding it, None if unknown. `online`: it is encoded each time, and not stored.
    """

    captions: int | None
    tokens: float
    measured: bool
    size: float
    flops: float | None
    online: bool

    @property
    def resident(self) -> int:
        """Bytes of an encoder in bfloat16 that stays on each device while training; 0 if there is none, or it is not
        known. A parameter takes two FLOPs a token, and two bytes."""
        return int((self.flops or 0) / self.tokens) if self.online else 0

    def seconds(self, rate: float) -> float | None:
        """To encode all of them at `rate` FLOP/s."""
        return None if self.captions is None or self.flops is None else self.captions * self.flops / rate


def plan_text(recipe: Recipe, captions: int | None = None, some: Sequence[str] = ()) -> TextPlan | None:
    """What `captions` captions take, by the lengths of some of them; without any, of as many tokens as are read.

    None for classes. An encoder that is not on this machine has the reference width of the recipe's size.
    """
    text = recipe.text
    if text.classes:
        return None
    if not is_here(text):
        size = next((s.size for s in recipe.stages if isinstance(s, TrainStage) and s.size), None)
        if size is None:
            return None
        core = core_config(size)
        stored = stored_bytes(core.text_dim, core.pooled_dim, text.max_tokens)
        parameters = _published(text.encoder)
        work = None if parameters is None else 2.0 * parameters * text.max_tokens
        return TextPlan(captions, text.max_tokens, False, stored, work, text.online)
    spec = describe(text.encoder, text.max_tokens)
    tokens = mean_length(load_tokenizer(spec), some, spec.max_tokens) if some else spec.max_tokens
    stored, work = stored_bytes(spec.dim, spec.pooled_dim, tokens), 2 * _parameters(spec) * tokens
    return TextPlan(captions, tokens, bool(some), stored, work, text.online)


def _parameters(spec: EncoderSpec) -> int:
    """The parameters of an encoder's matrices, by the headers of its files."""
    assert spec.folder is not None
    total = 0
    for path in hub.weights(f"text encoder {spec.name!r}", Path(spec.folder)):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not any(part in name for part in _NOT):
                    total += math.prod(file.get_slice(name).get_shape())
    return total
