"""Models from outside by name: a folder or a repository of the hub, its weights, and a fingerprint of both."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixelgrow.errors import UserError
from pixelgrow.writing import fault_of, is_pointer, reading, writing

if TYPE_CHECKING:
    from torch import Tensor

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_WHOLE = 256 << 20  # bytes; larger files are hashed by _BLOCKS samples of _BLOCK bytes
_BLOCK, _BLOCKS = 64 << 10, 1024


def find(kind: str, name: str, builtin: str = "", offline: str = "", weights: str = "") -> Path:
    """The folder of the model `name`: a local folder, or a repository of the hub, with "@revision" after it or not.

    A hub model that is not on this machine is downloaded, unless HF_HUB_OFFLINE is set. `weights`: their file, if it is
    not model.safetensors. Raises UserError if it is not found; for that message: the `kind` of model ("text encoder"),
    names that come with the package (`builtin`), and what to do without a network (`offline`).
    """
    path = Path(expanduser(name))
    with reading(name):
        if path.is_dir():
            return path
        exists = path.exists()
    repo, _, revision = name.partition("@")
    if exists or not _HUB_NAME.fullmatch(repo):
        raise UserError(
            f"{kind} {name!r} is not a folder here; expected {builtin}a folder or a model's name on the hub; check "
            "the path"
        )
    return _from_hub(kind, repo, revision or None, offline, weights)


def is_repository(name: str) -> bool:
    """Whether a name can be `owner/name` on the hub, "@revision" allowed after it, and is not plainly a path."""
    repo = name.partition("@")[0]
    return repo.count("/") == 1 and _HUB_NAME.fullmatch(repo) is not None


def fetch(name: str, wanted: Sequence[str], kind: str = "") -> Path:
    """A folder with the files `wanted` (patterns) of a repository of the hub, with "@revision" after its name or not.

    Raises UserError if they can neither be fetched nor found on this machine; `kind` of model, for the message.
    """
    snapshot_download = _downloading()

    repo, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(wanted)))
    except refusals() as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{f'{kind} ' if kind else ''}{name} is not a folder here and cannot be fetched from the hub ({reason}); "
            "check the name"
        ) from None


def _downloading() -> Any:
    """The hub library's function. It says nothing of its tries: how they end is one line, of ours."""
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()
    return huggingface_hub.snapshot_download


def refusals() -> tuple[type[Exception], ...]:
    """What a download may raise: errors of files, of names, and of the HTTP library below huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, *HfHubHTTPError.__bases__)


def _from_hub(kind: str, repo: str, revision: str | None, offline: str, file: str) -> Path:
    """The folder of a repository's snapshot on this machine if it is complete, else of a download."""
    snapshot_download = _downloading()
    wanted = ["*.json", "*.txt", "*.jinja", "*.model", file or "model*.safetensors"]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, local_files_only=True))
        if all(path.exists() for path in ([folder / file] if file else weights(f"{kind} {repo!r}", folder))):
            return folder
    except (OSError, ValueError):  # absent or incomplete: fetch it; UserError is a ValueError
        pass
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except refusals() as error:
        raise UserError(
            f"{kind} {repo!r} is not on this machine and cannot be fetched ({type(error).__name__}); expected a "
            f"folder or a hub name; check the spelling and the network{offline}"
        ) from error


def weights(label: str, folder: Path) -> list[Path]:
    """The files of a model's weights, in order; `label` names the model in messages.

    Raises UserError if there is no safetensors file.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [folder / shard for shard in sorted(shards)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{label}: {index} is damaged ({type(error).__name__}); expected the index of weights "
                "that transformers' save_pretrained writes; fetch the folder again"
            ) from error
    single = folder / "model.safetensors"
    if not single.exists():
        raise UserError(
            f"{label}: no model.safetensors in {folder} (pickled weights are not read); fetch it again, "
            "or choose a revision that has safetensors ('name@revision')"
        )
    return [single]


def published(label: str, url: str, sha256: str, others: Sequence[str] = ()) -> Path:
    """A published file of weights: one of torch's folder of downloads, under its own name or `others`, or fetched now.

    Raises UserError if it is not there and cannot be fetched; nothing is fetched while HF_HUB_OFFLINE is set.
    """
    import torch
    from huggingface_hub.constants import HF_HUB_OFFLINE

    folder, name = Path(torch.hub.get_dir()) / "checkpoints", url.rpartition("/")[2]
    for known in (name, *others):
        if (folder / known).is_file():
            return folder / known
    try:
        if HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(folder / name), sha256, progress=False)
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: the hash is another
        raise UserError(
            f"{label}: {name} is not on this machine and cannot be fetched ({error}); check the network, or copy it to "
            f"{folder}"
        ) from error
    return folder / name


def state_dict(label: str, path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a file that torch saved, read without running any code in it.

    Raises UserError if it cannot be read or its SHA-256 is another.
    """
    import torch

    with reading(path):
        check_sha256(label, [path], sha256)
        found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return found


def sha256_of(files: Sequence[Path]) -> str:
    """SHA-256 of a file, in hex; of several, in order: SHA-256 over theirs. Not computed twice for a file."""
    hashes = [_sha256(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


@lru_cache(maxsize=256)
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(label: str, files: Sequence[Path], expected: str) -> None:
    """Raise UserError if the `sha256_of` files is not the expected one."""
    if (found := sha256_of(files)) != expected:
        raise UserError(
            f"{label}: {files[0]} has SHA-256 {found}, expected {expected}; it is another file or damaged: fetch it "
            "again"
        )


def fingerprint(label: str, folder: Path, files: Iterable[str], salt: str, heavy: Sequence[Path] | None = None) -> str:
    """A hash of a model's weights, of those of the smaller `files` that exist, and of `salt`; not of the path.

    `heavy`: the files of its weights, if they are not its safetensors.
    """
    digest = hashlib.blake2b(salt.encode(), digest_size=16)
    if heavy is None:
        heavy = weights(label, folder)
        for file in heavy:
            check_weights(label, file)
    for file in (*(folder / small for small in files), *heavy):
        if file.exists():
            if is_pointer(file):
                raise UserError(f"{label}: {file} is a Git LFS pointer, not the file itself: run git lfs pull")
            stat = file.stat()
            digest.update(f"\0{file.name}\0".encode() + _digest(file, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


def check_weights(label: str, file: Path) -> None:
    """Raise UserError if a file of weights is missing, cut off, a Git LFS pointer or no safetensors."""
    if fault := fault_of(file, "fetch it again"):
        raise UserError(f"{label}: {file} {fault}")


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


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and without reports on weights that are not used."""
    from transformers.utils import logging as hf

    verbosity, bar = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    try:
        yield
    finally:
        hf.set_verbosity(verbosity)
        if bar:
            hf.enable_progress_bar()


@contextmanager
def loading(label: str, folder: Path) -> Iterator[None]:
    """Turn what transformers raises over a folder that it cannot load into one line, and keep it `quiet`."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        with quiet():
            yield
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError),
        *(SafetensorError, StrictDataclassError),
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{label}: {folder} cannot be loaded ({reason}); expected a model that transformers' save_pretrained "
            "wrote, with its tokenizer if it reads text; fetch or save it again"
        ) from error


def pretrained(
    label: str, folder: Path, model_class: Any, unused: str = "", dtype: str = "float32", **extra: Any
) -> Any:
    """A model of transformers from its folder, in float32 or another `dtype`; "auto" is the precision of the file.

    Raises UserError if the weights do not fit, or if some are missing; missing names that contain the word `unused` are
    allowed.
    """
    return loaded(label, folder, model_class, unused, dtype=dtype, **extra)[0]


def loaded(
    label: str,
    folder: Path,
    model_class: Any,
    unused: str = "",
    safetensors: bool = True,
    dtype: str = "float32",
    **extra: Any,
) -> tuple[Any, list[str]]:
    """`pretrained`, and the names that were missing: what they name is random.

    `safetensors=False`: from pytorch_model.bin, read without running any code in it.
    """
    extra |= {"local_files_only": True, "use_safetensors": safetensors, "dtype": dtype}
    with loading(label, folder):
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **extra)
    missing = sorted(info["missing_keys"])
    lacking = [n for n in missing if not (unused and unused in n)]
    if lacking:
        raise UserError(
            f"{label}: the weights in {folder} lack {lacking[0]!r} and {len(lacking) - 1} more; expected all of the "
            "model's; fetch or save it again"
        )
    return model, missing
