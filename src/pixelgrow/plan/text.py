"""What a recipe's captions take: room on the disk and time, or work while training, before anything is encoded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from pixelgrow.external import hub
from pixelgrow.plan.shapes import is_here
from pixelgrow.recipe.data import TextSpec
from pixelgrow.text.cache import bytes_of, mean_length
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


@dataclass(frozen=True)
class TextPlan:
    """Of a recipe's captions. `captions`: at most so many distinct ones, None if the data were not looked at; `tokens`:
    of one, the mean; `size`: its bytes on the disk; `flops`: of encoding it; `online`: it is encoded each time."""

    captions: int | None
    tokens: float
    size: float
    flops: float
    online: bool

    def seconds(self, rate: float) -> float:
        """To encode all of them at `rate` FLOP/s."""
        return (self.captions or 0) * self.flops / rate


def plan_text(text: TextSpec, captions: int | None = None, some: Sequence[str] = ()) -> TextPlan | None:
    """What `captions` captions take, by the lengths of some of them; without any, of as many tokens as are read.

    None for classes, and for an encoder that is not on this machine.
    """
    if text.classes or not is_here(text):
        return None
    spec = describe(text.encoder, text.max_tokens)
    tokens = mean_length(load_tokenizer(spec), some, spec.max_tokens) if some else spec.max_tokens
    return TextPlan(captions, tokens, bytes_of(spec, tokens), 2 * _parameters(spec) * tokens, text.online)


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
