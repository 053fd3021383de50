"""Frozen text encoders: captions -> tokens and a pooled vector.

For T5 and BERT sentence encoders the pooled vector is the mean of the tokens, for CLIP its own (the state at the
end-of-text token).
"""

from __future__ import annotations

import logging
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pixelgrow.errors import UserError
from pixelgrow.external import hub
from pixelgrow.models.cond import Cond, cond_of, to_device
from pixelgrow.precision import has_bf16
from pixelgrow.text.cut import Cut, clean, cut_in
from pixelgrow.text.spec import EncoderSpec, describe

_CPU_TOKENS = 512  # tokens per pass; more would not fit into the CPU's caches and be slower
_GPU_TOKENS = 16384
_ROUND = 8  # the length of a batch's token axis is a multiple of this, so few shapes occur
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenBatch:
    """Captions of equal length in tokens: `rows` are their positions in the list of `plan`, `ids` (B, L) int64."""

    rows: list[int]
    ids: Tensor


@dataclass(frozen=True)
class Encoding:
    """`tokens` (B, L, dim) and `pooled` (B, pooled_dim), float32 on the CPU."""

    tokens: Tensor
    pooled: Tensor


class TextEncoder:
    """A frozen encoder in memory; in bfloat16 on a GPU that has it.

    Captions are encoded in batches of equal length, without padding and masks. So, beyond rounding, an encoding does
    not depend on the other captions of the batch.
    """

    def __init__(self, spec: EncoderSpec, model: nn.Module, tokenizer: Any, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        self._tokenizer = tokenizer
        self._device = torch.device(device)
        half = torch.bfloat16 if self._device.type == "cuda" and has_bf16() else None
        self.model = model.eval().requires_grad_(False).to(self._device, half)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def dim(self) -> int:
        return self.spec.dim

    @property
    def pooled_dim(self) -> int:
        return self.spec.pooled_dim

    @property
    def max_tokens(self) -> int:
        return self.spec.max_tokens

    @property
    def fingerprint(self) -> str:
        return self.spec.fingerprint

    def plan(self, texts: Sequence[str]) -> list[TokenBatch]:
        """Divide `texts` into batches of equal length, shortest first; a function of `texts` alone."""
        ids = self._ids(texts)
        by_length: dict[int, list[int]] = defaultdict(list)
        for row, one in enumerate(ids):
            by_length[len(one)].append(row)
        batches, budget = [], _CPU_TOKENS if self._device.type == "cpu" else _GPU_TOKENS
        for length in sorted(by_length):
            rows, size = by_length[length], max(1, budget // length)
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                batches.append(TokenBatch(part, torch.tensor([ids[row] for row in part])))
        return batches

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, at least one and at most `max_tokens`."""
        if not texts:
            return []
        cleaned = [clean(text) for text in texts]
        ids: list[list[int]] = self._tokenizer(cleaned, truncation=True, max_length=self.max_tokens, padding=False)[
            "input_ids"
        ]
        if [] in ids:
            raise UserError(
                f"text encoder {self.name!r} makes no token of {texts[ids.index([])]!r}, expected at least one: use a "
                "tokenizer that adds an end-of-text token, or drop that caption"
            )
        return ids

    def cut(self, texts: Sequence[str]) -> Cut:
        """Count those of some distinct `texts` that are longer than `max_tokens`."""
        return cut_in(self._tokenizer, texts, self.max_tokens)

    @torch.inference_mode()
    def run(self, batch: TokenBatch) -> Encoding:
        """Encode one batch of `plan`."""
        ids = batch.ids.to(self._device)
        tokens, pooled = self._encode(ids, torch.ones_like(ids))
        return Encoding(tokens.cpu(), pooled.cpu())

    def together(self, texts: Sequence[str], width: int | None = None) -> Cond:
        """The conditions of `texts` in one pass, padded and masked, on the encoder's device, in float32.

        Beyond rounding they are those of `encode`. width: of the token axis; by default the longest's, rounded up to 8.
        """
        rows = self._ids(texts)
        longest = max(map(len, rows), default=0)
        padding = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
        ids = to_device(padding.view(len(rows), longest), self._device)
        lengths = to_device(torch.tensor([len(row) for row in rows]), self._device)
        mask = torch.arange(longest, device=self._device) < lengths[:, None]
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):  # whatever training computes in
            tokens, pooled = self._encode(ids, mask.long())
        # Afterwards: an encoder may have no positions up to that width.
        tokens = F.pad(tokens * mask[..., None], (0, 0, 0, width_of(longest, width) - longest))
        return cond_of({"tokens": tokens, "lengths": lengths, "pooled": pooled})

    def _encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, D) and pooled (B, P) of ids (B, L), float32; mask (B, L) is 0 at padding."""
        out = self.model(input_ids=ids, attention_mask=mask)
        tokens = out.last_hidden_state.float()
        if self.spec.model_type == "clip_text_model":
            return tokens, out.pooler_output.float()
        real = mask[..., None].float()
        return tokens, (tokens * real).sum(1) / real.sum(1)

    def encode(self, texts: Sequence[str]) -> Cond:
        """The conditions of `texts`, float32 on the CPU; tokens (B, L, dim), L the longest's, rounded up to 8."""
        found: list[tuple[NDArray[Any], NDArray[Any]]] = [(np.empty(0), np.empty(0))] * len(texts)
        for batch in self.plan(texts):
            out = self.run(batch)
            for row, tokens, pooled in zip(batch.rows, out.tokens.numpy(), out.pooled.numpy(), strict=True):
                found[row] = (tokens, pooled)
        arrays = padded(found, self.dim, self.pooled_dim)
        return cond_of({name: torch.from_numpy(array) for name, array in arrays.items()})


class LabelEncoder:
    """Class labels instead of captions: nothing is loaded, the network learns a token per class."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self.name, self.dim, self.pooled_dim = spec.name, spec.dim, spec.pooled_dim
        self.max_tokens, self.fingerprint = spec.max_tokens, spec.fingerprint

    def encode(self, texts: Sequence[str]) -> Cond:
        """`Cond.labels` (B,) from decimal labels; UserError for other texts, and for numbers out of range."""
        return cond_of({"labels": torch.from_numpy(labels_of(texts, self.spec))})

    def cut(self, texts: Sequence[str]) -> Cut:
        """Labels are never cut."""
        return Cut(total=len(texts))


def load_encoder(
    name: str = "minilm", max_tokens: int = 32, device: torch.device | str = "cpu"
) -> TextEncoder | LabelEncoder:
    """Load the frozen encoder `name` (see `text.spec.describe`); it reads `max_tokens` of a caption.

    Raises UserError if it cannot be found or loaded, or if its weights do not fit its configuration.
    """
    spec = describe(name, max_tokens)
    return LabelEncoder(spec) if spec.classes is not None else load_spec(spec, device)


def load_spec(spec: EncoderSpec, device: torch.device | str = "cpu") -> TextEncoder:
    """Load the encoder that `spec` describes."""
    import transformers

    assert spec.folder is not None
    classes: dict[str, Any] = {
        "t5": transformers.T5EncoderModel,
        "mt5": transformers.MT5EncoderModel,
        "umt5": transformers.UMT5EncoderModel,
        "clip_text_model": transformers.CLIPTextModel,
        "bert": transformers.BertModel,
    }
    extra: dict[str, Any] = {"add_pooling_layer": False} if spec.model_type == "bert" else {}
    label = f"text encoder {spec.name!r}"
    tokenizer = load_tokenizer(spec)
    model = hub.pretrained(label, spec.folder, classes[spec.model_type], **extra)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"text encoder {spec.name!r}: the tokenizer in {spec.folder} has {len(tokenizer)} tokens, the model "
            f"{model.config.vocab_size}; expected no more than the model's; use the model's own tokenizer"
        )
    _log.debug("text encoder %s: %d parameters", spec.name, sum(p.numel() for p in model.parameters()))
    return TextEncoder(spec, model, tokenizer, device)


def load_tokenizer(spec: EncoderSpec) -> Any:
    """Load the tokenizer of the encoder that `spec` describes. Raises UserError."""
    import transformers

    assert spec.folder is not None
    with hub.loading(f"text encoder {spec.name!r}", spec.folder):
        return transformers.AutoTokenizer.from_pretrained(spec.folder, local_files_only=True)


def width_of(longest: int, width: int | None = None) -> int:
    """The length of a token axis that holds `longest` tokens: `width`, or the next multiple of 8."""
    return width or max(_ROUND, -(-longest // _ROUND) * _ROUND)


def padded(
    items: Sequence[tuple[NDArray[Any], NDArray[Any]]], dim: int, pooled_dim: int, width: int | None = None
) -> dict[str, NDArray[Any]]:
    """Arrays for `cond_of` from rows of tokens (l, dim) and pooled (pooled_dim,), in their precision; padding is zero.

    width: of the token axis; by default the longest's, rounded up to 8.
    """
    lengths = np.array([len(tokens) for tokens, _ in items], np.int64)
    dtype = items[0][0].dtype if items else np.float32  # torch widens float16 faster than numpy does
    tokens = np.zeros((len(items), width_of(int(lengths.max(initial=0)), width), dim), dtype)
    pooled = np.zeros((len(items), pooled_dim), dtype)
    for row, (one, whole) in enumerate(items):
        tokens[row, : len(one)] = one
        pooled[row] = whole
    return {"tokens": tokens, "lengths": lengths, "pooled": pooled}


def labels_of(texts: Sequence[str], spec: EncoderSpec) -> NDArray[np.int64]:
    """Class labels (B,) from decimal numbers; UserError for texts that are not numbers in [0, classes)."""
    assert spec.classes is not None
    for text in texts:
        if not (text.isascii() and text.isdecimal() and int(text) < spec.classes):
            raise UserError(
                f"class {text!r} is unknown; expected a whole number from 0 to {spec.classes - 1}: give data in class "
                "folders, or a model that reads captions"
            )
    return np.array([int(text) for text in texts], np.int64)


def as_labels(prompts: Sequence[str], names: Sequence[str], classes: int) -> list[str]:
    """Class names, or numbers below `classes`, as decimal labels; a prompt that is both is taken as a name.

    Raises UserError for a prompt that is neither.
    """
    labels = []
    for prompt in prompts:
        name = unicodedata.normalize("NFC", prompt)  # as class folders are named, whatever the keyboard sends
        if name in names:
            labels.append(str(names.index(name)))
        elif prompt.isascii() and prompt.isdecimal() and int(prompt) < classes:
            labels.append(str(int(prompt)))
        else:
            known = f"one of {', '.join(names)}, or " if names else ""
            raise UserError(f"class {prompt!r} is unknown: expected {known}a number from 0 to {classes - 1}")
    return labels


def check_classes(text: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """UserError unless the class folders `names` of data are those of a model with `text`, or neither has classes.

    where: the data, in the message.
    """
    head, _, count = str(text.get("encoder")).partition(":")
    if bool(names) != (head == "labels"):
        has, knows = ("classes", "captions") if names else ("captions", "classes")
        raise UserError(f"{where} has {has}, and the model was trained on {knows}: name images with {knows}")
    known = list(text.get("classes", ()))
    if len(names) > int(count or 0) or (known and known != list(names)):
        expected = f"those of the model ({', '.join(known)})" if known else f"at most {count}"
        raise UserError(f"{where} has the classes {', '.join(names)}; expected {expected}, in one folder each")
