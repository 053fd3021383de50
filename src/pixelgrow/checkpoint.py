"""A checkpoint: a folder of `model.safetensors`, `config.json` and a model card, written atomically."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixelgrow.diffusion.denoiser import Denoiser, DiffusionConfig, NoiseConfig
from pixelgrow.diffusion.generator import Generator
from pixelgrow.diffusion.sampling_spec import SamplingSpec
from pixelgrow.errors import UserError
from pixelgrow.models.config import NetConfig
from pixelgrow.models.uvit import UViT
from pixelgrow.writing import fault_of, flush, writing

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_UNCHECKED = '"sha256": ""'
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of stored weights; loading casts them to float32

Objective = Literal["denoise", "generate"]
KINDS: dict[Objective, str] = {"denoise": "a multi-step denoiser", "generate": "a one-step generator"}


class CheckpointConfig(BaseModel):
    """The content of `config.json`.

    objective   what the weights are: a denoiser or a one-step generator
    noise       distribution of sigma in its last training; None if unknown
    text        the text encoder: name, `max_tokens`, fingerprint, or the names of the classes
    latent      the autoencoder whose latents the model generates; empty for pixels
    sampling    default sampling settings, a `SamplingSpec`
    lineage     the stages that made the checkpoint, oldest first
    sha256      hash of the weights; they are not checked if it is empty
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    objective: Objective = "denoise"
    network: NetConfig
    diffusion: DiffusionConfig
    noise: NoiseConfig | None = None
    text: dict[str, Any] = {}
    latent: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    lineage: list[dict[str, Any]] = []
    sha256: str = ""

    @field_validator("sampling")
    @classmethod
    def _sampling(cls, given: dict[str, Any]) -> dict[str, Any]:
        try:
            SamplingSpec.model_validate(given)
        except ValidationError as error:
            raise ValueError(_reason(error)) from None
        return given


def identity(named: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the `text` or `latent` of two checkpoints the same: no name or path where there is a fingerprint."""
    by_name = "fingerprint" not in named
    return {k: v for k, v in named.items() if by_name or k not in ("encoder", "autoencoder")}


def _reason(error: ValidationError) -> str:
    """The first mistake in a configuration, as one line that names the field."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}".removeprefix(": ").replace("Value error, ", "")


def check_target(folder: Path) -> None:
    """Raise UserError unless a checkpoint may be written to `folder`: other files in it would be deleted."""
    remedy = "name a new or empty folder, or one that holds only a checkpoint"
    if folder.name in ("", ".."):
        raise UserError(f"a checkpoint cannot be written to {str(folder)!r}: expected a folder with a name; {remedy}")
    with writing(folder):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise UserError(
                f"a checkpoint cannot be written to {folder}: it is a file or a link, not a folder; {remedy}"
            )
        entries = list(folder.iterdir()) if folder.exists() else []
        others = sorted(p.name for p in entries if p.name not in (WEIGHTS, CONFIG, CARD) or p.is_dir())
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise UserError(f"{folder} holds {others[0]}{more}, which a checkpoint there would replace; {remedy}")


@contextmanager
def _temporary(folder: Path, wait: bool = False) -> Iterator[Path]:
    """An empty folder `.NAME.part` beside a checkpoint's, locked by this process; removed at the end if still there.

    The lock ends with the process: files in an unlocked folder are left over from a killed save. If another process
    holds the lock, raises UserError, or waits with `wait`.
    """
    part = folder.with_name(f".{folder.name}.part")
    while True:
        part.mkdir(exist_ok=True)
        try:
            held = os.open(part, os.O_RDONLY)
        except FileNotFoundError:  # another process has just renamed it
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(held)
            raise UserError(f"{folder} is being written by another process: wait, or name another folder") from None
        except OSError:  # a file system without locks
            pass
        if _is(held, part):
            break
        os.close(held)
    try:
        for left in part.iterdir():
            left.unlink()
        yield part
    finally:
        if _is(held, part):
            shutil.rmtree(part, ignore_errors=True)
        os.close(held)


def _is(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that replaces it when the block succeeds, and is removed when it fails.

    After a kill or a full disk at any moment the previous folder is usable. Raises UserError if that holds anything but
    a checkpoint, or if another process is writing it.
    """
    check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(folder) as temporary:
        yield temporary
        for file in (*temporary.iterdir(), temporary):
            flush(file)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            temporary.rename(folder)
            flush(folder.parent)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
            flush(folder.parent)


def recover(folder: Path) -> None:
    """Put the previous folder back if a kill fell between the two renames of `replacing`."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        with writing(folder), _temporary(folder, wait=True):  # a save in progress finishes its renames first
            if old.exists() and not folder.exists():
                old.rename(folder)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def save(
    folder: Path,
    model: Denoiser | Generator,
    config: CheckpointConfig,
    card: str = "",
    *,
    dtype: torch.dtype | None = None,
) -> str:
    """Write a checkpoint folder; returns the SHA-256 of its weights. `config.json` gets the objective, the network and
    the diffusion of `model`.

    dtype   float16 or bfloat16 halves the file; parameters are rounded, buffers (statistics of the text tokens) are
            not, and the lineage says so. None: as they are.

    Raises UserError for another dtype, and for weights that are too large for it.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.net.state_dict().items()}
    lineage = list(config.lineage)
    if dtype is not None and any(p.dtype != dtype for p in model.net.parameters()):
        tensors |= _cast({name: tensors[name] for name, _ in model.net.named_parameters()}, dtype)
        parent = {"parent": config.sha256} if config.sha256 else {}
        lineage.append({"verb": "cast", "dtype": _name(dtype)} | parent)
    with replacing(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        digest = file_hash(temporary / WEIGHTS)
        full = described(config, model).model_copy(update={"lineage": lineage, "sha256": digest})
        (temporary / CONFIG).write_text(full.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (temporary / CARD).write_text(card or model_card(full), encoding="utf-8")
        (temporary / WEIGHTS).chmod((temporary / CONFIG).stat().st_mode & 0o777)  # safetensors lets nobody else read
    return digest


def described(config: CheckpointConfig, model: Denoiser | Generator) -> CheckpointConfig:
    """A configuration with the objective, the network and the diffusion of `model`."""
    kind = "generate" if isinstance(model, Generator) else "denoise"
    return config.model_copy(update={"objective": kind, "network": model.net.config, "diffusion": model.config})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in a dtype that weights may have. Raises UserError for another, and where a value exceeds its range."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {_name(dtype)}: expected one of {', '.join(map(_name, DTYPES))}")
    cast = {name: t.to(dtype) for name, t in tensors.items()}
    for name, t in cast.items():
        if not bool((t.isfinite() | ~tensors[name].isfinite()).all()):
            raise UserError(f"{name} exceeds the range of {_name(dtype)}; save in bfloat16 or float32")
    return cast


def read_config(folder: Path) -> CheckpointConfig:
    """The validated `config.json` of a checkpoint folder. Raises UserError if it is missing or invalid."""
    recover(folder)
    path = folder / CONFIG
    try:
        return CheckpointConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a checkpoint: it has no {CONFIG}; give a folder that a run wrote") from None
    except (ValueError, RecursionError) as e:
        reason = _reason(e) if isinstance(e, ValidationError) else str(e).splitlines()[0]
        raise UserError(f"{path} is damaged or of another version ({reason}); copy the checkpoint again") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): expected a file you may read; correct it") from None


def read_tensors(folder: Path, digest: str = "") -> dict[str, Tensor]:
    """The weights of a checkpoint folder. Raises UserError if they are missing, damaged, or differ from `digest`."""
    path = folder / WEIGHTS
    if fault := fault_of(path, "copy the checkpoint again"):
        raise UserError(f"{path} {fault}")
    try:
        if digest and file_hash(path) != digest:
            types = ", ".join(sorted({_name(t.dtype) for t in load_file(path).values()}))
            raise UserError(
                f"{path} ({types}) is damaged or was converted: its bytes are not those that were saved; copy the "
                f"checkpoint again, or write {_UNCHECKED} into {CONFIG} to load a conversion"
            )
        return load_file(path)
    except safetensors.SafetensorError as e:
        raise UserError(f"{path} is damaged ({e}); copy the checkpoint again") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): expected a file you may read; correct it") from None


def load(folder: Path | str, device: torch.device | str = "cpu") -> tuple[Denoiser, CheckpointConfig]:
    """The denoiser in a checkpoint folder, in evaluation mode, and its configuration. Loads are strict."""
    net, config = _load(Path(folder), "denoise")
    return Denoiser(net, config.diffusion).to(device).eval(), config


def load_generator(folder: Path | str, device: torch.device | str = "cpu") -> tuple[Generator, CheckpointConfig]:
    """The one-step generator in a checkpoint folder, in evaluation mode, and its configuration."""
    net, config = _load(Path(folder), "generate")
    return Generator(net, config.diffusion).to(device).eval(), config


def check_objective(folder: Path, config: CheckpointConfig, wanted: Objective) -> None:
    """Raise UserError unless a checkpoint is of the wanted kind."""
    if config.objective != wanted:
        raise UserError(f"{folder} is {KINDS[config.objective]}, expected {KINDS[wanted]}: name another checkpoint")


def _load(folder: Path, objective: Objective) -> tuple[UViT, CheckpointConfig]:
    config = read_config(folder)
    check_objective(folder, config, objective)
    tensors = read_tensors(folder, config.sha256)
    with torch.device("meta"):
        net = UViT(config.network)
    wanted = {n: tuple(t.shape) for n, t in net.state_dict().items()}
    got = {n: tuple(t.shape) for n, t in tensors.items()}
    if wanted != got:
        missing, unknown = wanted.keys() - got.keys(), got.keys() - wanted.keys()
        first = min(n for n in wanted.keys() | got.keys() if wanted.get(n) != got.get(n))
        raise UserError(
            f"{folder / WEIGHTS} does not fit its {CONFIG}: {len(missing)} tensors missing, {len(unknown)} unknown; "
            f"the first to differ is {first}, got {got.get(first, 'none')}, expected {wanted.get(first, 'none')}; "
            "copy the checkpoint again"
        )
    if odd := [n for n, t in tensors.items() if t.dtype not in DTYPES]:
        raise UserError(
            f"{folder / WEIGHTS}: {odd[0]} and {len(odd) - 1} more are stored as {_name(tensors[odd[0]].dtype)}, "
            f"expected one of {', '.join(map(_name, DTYPES))}; convert or copy the checkpoint again"
        )
    net.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=True, assign=True)
    return net, config


def model_card(config: CheckpointConfig) -> str:
    """A model card in the hub's format: the model and its lineage. It states no licence; that is up to the author."""
    rungs = ", ".join(f"{r.resolution} px ({r.kind})" for r in config.network.rungs)
    lines = [
        "---", "library_name: pixelgrow", "pipeline_tag: text-to-image", "---", "",
        f"# A pixelgrow {config.network.size} model at {config.network.resolution} px", "",
        f"Core trained at {config.network.core_resolution} px; rungs: {rungs}. "
        f"Text: {config.text.get('encoder', 'none')}.", "",
        "```python", "import pixelgrow", "", 'pixelgrow.load("this/folder").sample(["a red circle"])', "```", "",
        "## Lineage", "",
    ]  # fmt: skip
    lines += [f"{i}. " + ", ".join(f"{k}: {v}" for k, v in e.items()) for i, e in enumerate(config.lineage, 1)]
    return "\n".join(lines) + "\n"
