"""Any diffusers pipeline as a maker of images: from prompts, from class labels, or from noise alone."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pixelgrow.errors import UserError
from pixelgrow.external import hub
from pixelgrow.rng import generator
from pixelgrow.writing import reading

INDEX = "model_index.json"
_HEADS = ("unet", "transformer", "prior", "decoder")  # the network that is evaluated at every step, by its usual names
_SETTINGS = {"steps": "num_inference_steps", "guidance": "guidance_scale"}


class Pipeline:
    """A diffusers `DiffusionPipeline`, by its folder or its name on the hub (`owner/name@revision`).

    conditions: what it makes images of: "text", "classes" or "nothing". parameters: of the network that is evaluated at
    every step, and of all. sha256: of its configurations and weights, not of its place.

    Raises UserError if it is not found, is no pipeline, or needs more than a prompt (an image, a mask).
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        self.name, self.label = name, f"pipeline {name}"
        with self._loading():
            from diffusers import DiffusionPipeline

            folder = _find(name, self.label)
            self.class_name = _class_of(folder, self.label)
            self.sha256 = _hash(folder)
            self.model: Any = DiffusionPipeline.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=find_spec("accelerate") is not None,
            ).to(device)
        self.model.set_progress_bar_config(disable=True)
        accepted = inspect.signature(self.model.__call__).parameters
        self.accepted = set(accepted)
        self.conditions: Literal["text", "classes", "nothing"] = (
            "text" if "prompt" in accepted else "classes" if "class_labels" in accepted else "nothing"
        )
        needed = [
            p for p, v in accepted.items() if v.default is v.empty and p not in ("class_labels", "kwargs", "args")
        ]
        if others := [p for p in needed if p != "prompt"]:
            raise UserError(
                f"{self.label} needs {others[0]} beside a prompt: expected one that makes images of prompts, of class "
                "labels or of nothing; name another"
            )
        modules = {n: m for n, m in self.model.components.items() if isinstance(m, nn.Module)}
        self.head = next((modules[n] for n in _HEADS if n in modules), None)
        sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in modules.items()}
        head = [n for n in _HEADS if n in modules][:1]
        self.parameters = {"network": sum(sizes[n] for n in head), "all": sum(sizes.values())}

    def check(self, given: dict[str, Any]) -> None:
        """Raise UserError for a sampling setting that the pipeline does not take."""
        for key in given:
            if _SETTINGS.get(key) not in self.accepted:
                raise UserError(
                    f"{self.label} takes no {key}: expected "
                    f"{' or '.join(k for k, v in _SETTINGS.items() if v in self.accepted) or 'no setting'}; drop it"
                )

    def __call__(
        self, prompts: Sequence[str], numbers: Sequence[int], seed: int, given: dict[str, Any]
    ) -> tuple[Tensor, int | None]:
        """Images (B, 3, h, w) in [0, 1] on the CPU, one of each prompt, and network evaluations spent on each.

        Image i is a function of (seed, its number, its prompt, the settings), as far as the pipeline takes a generator
        for each image. Evaluations are rows that the network saw; None if it is under no usual name.
        """
        arguments: dict[str, Any] = {_SETTINGS[k]: v for k, v in given.items()}
        if self.conditions == "text":
            arguments["prompt"] = list(prompts)
        elif self.conditions == "classes":
            arguments["class_labels"] = [int(p) for p in prompts]
        else:
            arguments["batch_size"] = len(numbers)
        if "generator" in self.accepted:
            arguments["generator"] = [generator(seed, "sample", i) for i in numbers]
        rows = 0

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal rows
            rows += next(len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1)

        hook = None if self.head is None else self.head.register_forward_pre_hook(count, with_kwargs=True)
        try:
            with torch.no_grad():
                made = self.model(**arguments, output_type="np").images
        except (ValueError, TypeError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{self.label} cannot make images: {reason}; try it by itself") from error
        finally:
            if hook is not None:
                hook.remove()
        images = torch.from_numpy(made).permute(0, 3, 1, 2)
        return images.expand(-1, 3, -1, -1), rows // len(numbers) or None

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Turn what diffusers raises over what it cannot load into one line."""
        try:
            with hub.quiet(), _quiet():
                yield
        except UserError:
            raise
        except ImportError as error:
            raise UserError(f"{self.label} needs diffusers ({error}): pip install 'pixelgrow[diffusers]'") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{self.label} cannot be loaded ({reason}); expected what diffusers' save_pretrained writes, with "
                "safetensors; fetch it again"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers without progress bars and advice."""
    from diffusers.utils import logging as diffusers

    verbosity, bar = diffusers.get_verbosity(), diffusers.is_progress_bar_enabled()
    diffusers.set_verbosity_error()
    diffusers.disable_progress_bar()
    try:
        yield
    finally:
        diffusers.set_verbosity(verbosity)
        if bar:
            diffusers.enable_progress_bar()


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is a pipeline's."""
    return (folder / INDEX).is_file()


def _find(name: str, label: str) -> Path:
    """The folder of a pipeline; fetched from the hub if it is not here."""
    from diffusers import DiffusionPipeline

    with reading(name):
        folder = Path(name).expanduser()
        if folder.exists() or not hub.is_repository(name):
            if not is_pipeline(folder):
                raise UserError(f"{label} is not there: expected a folder with {INDEX}, or owner/name on the hub")
            return folder
    repo, _, revision = name.partition("@")
    try:
        return Path(DiffusionPipeline.download(repo, revision=revision or None, use_safetensors=True))
    except hub.refusals() as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{label} is no folder here and cannot be fetched from the hub ({reason}); check the name and the network"
        ) from error


def _class_of(folder: Path, label: str) -> str:
    try:
        return str(json.loads((folder / INDEX).read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{label}: {folder / INDEX} cannot be read ({type(error).__name__}); fetch it again") from error


def _hash(folder: Path) -> str:
    """SHA-256 over the configurations and safetensors of a pipeline."""
    digest = hashlib.sha256()
    for file in sorted(p for end in ("json", "safetensors") for p in folder.rglob(f"*.{end}")):
        with file.open("rb") as stream:
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
