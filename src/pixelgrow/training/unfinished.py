"""The model of a stage that is not finished: the latest average in its state, and what network it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelgrow import checkpoint
from pixelgrow.checkpoint import CheckpointConfig, Objective
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.diffusion.generator import Generator
from pixelgrow.errors import UserError
from pixelgrow.models.uvit import UViT
from pixelgrow.training import state
from pixelgrow.writing import write_json

START = "start"  # in the folder of a growth: the model before its first step, which has the frozen tensors
FROZEN = "frozen"  # in the folder of a growth with `unfreeze_after`: its first phase
PARTS: dict[Objective, str] = {"denoise": "denoiser", "generate": "generator"}  # of the objective, in a state


@dataclass(frozen=True)
class Unfinished:
    """The average of a stage's weights after `images` of `total`, in evaluation mode; `config` has no hash."""

    model: Denoiser | Generator
    config: CheckpointConfig
    images: int
    total: int


def describe(folder: Path, model: Denoiser | Generator, config: CheckpointConfig) -> None:
    """Write `state/config.json` into the folder of a training, so that its states can be loaded without a recipe."""
    write_json(folder / "state" / checkpoint.CONFIG, checkpoint.described(config, model).model_dump(mode="json"))


def latest(stage: Path, settings: Mapping[str, Any], device: torch.device | str = "cpu") -> Unfinished | None:
    """The latest saved average of an unfinished stage, None if nothing was saved.

    It is the average that the finished stage's checkpoint would hold, the first of `settings["ema"]`. Nothing is
    changed on the disk, so the stage may be running. Raises UserError if the state is damaged.
    """
    folder = saved_in(stage)
    return None if folder is None else _load(stage, folder, settings, device)


def saved_in(stage: Path) -> Path | None:
    """The folder of the states of a stage, of its last phase that has any; None if none was saved."""
    folders = (phase / "state" for phase in (stage, stage / FROZEN))
    return next((f for f in folders if state.newest(f) and (f / checkpoint.CONFIG).is_file()), None)


def _load(stage: Path, folder: Path, settings: Mapping[str, Any], device: torch.device | str) -> Unfinished:
    config = checkpoint.read_config(folder)
    part = PARTS[config.objective]
    of = f"ema/{settings['ema'][0]}" if settings["ema"] else "weights"
    prefixes = tuple(f"{kind}/{part}/" for kind in (of, "buffers"))
    found = state.find(folder)
    assert found is not None
    tensors = {name.split(f"/{part}/", 1)[1]: tensor for name, tensor in found.read(*prefixes).items()}
    model, frozen = _start(stage, config)
    own = model.state_dict().keys()
    if odd := sorted((tensors.keys() - own) | (own - tensors.keys() - frozen.keys())):
        raise UserError(
            f"{folder} does not fit its {checkpoint.CONFIG}: {odd[0]} and {len(odd) - 1} more tensors are missing or "
            "unknown; run the recipe again, and sample when it has saved its next state"
        )
    model.load_state_dict(frozen | tensors, strict=True)
    images = int(found.counters["images"])
    lineage = [*config.lineage[:-1], config.lineage[-1] | {"stopped_after": images}]
    config = config.model_copy(update={"lineage": lineage})
    return Unfinished(model.to(device).eval(), config, images, int(settings["images"]))


def _start(stage: Path, config: CheckpointConfig) -> tuple[Denoiser | Generator, dict[str, Tensor]]:
    """A network for the tensors of a state, and those that the state may lack, as they do not train: of a growth."""
    generates = config.objective == "generate"
    if (stage / START).is_dir():
        model = (checkpoint.load_generator if generates else checkpoint.load)(stage / START)[0]
        return model, model.state_dict()
    net = UViT(config.network)
    return Generator(net, config.diffusion) if generates else Denoiser(net, config.diffusion), {}
