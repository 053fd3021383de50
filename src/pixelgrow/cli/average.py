"""The `average` verb: from a stage's snapshots to a checkpoint with another average of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pixelgrow import checkpoint
from pixelgrow.errors import UserError
from pixelgrow.onestep.distill import GENERATOR
from pixelgrow.training.ema import reconstruct
from pixelgrow.training.loop import CHECKPOINT
from pixelgrow.writing import reading, writing


def average_checkpoint(stage: Path, length: float, out: Path, images: int | None = None) -> str:
    """Write the average of `length` (sigma_rel) at `images` seen to `out`; returns a line on it. Raises UserError.

    stage: a stage's folder, with `checkpoint/` and `snapshots/`. Tensors without a snapshot are the checkpoint's.
    """
    with reading(stage):
        trained = (stage / CHECKPOINT / checkpoint.CONFIG).is_file()
    if not trained:
        raise UserError(f"{stage} is no stage that was trained: expected a folder such as runs/photos/core")
    checkpoint.check_target(out)
    if out.resolve() == (stage / CHECKPOINT).resolve():
        raise UserError(f"{out} is the stage's own checkpoint: name another folder")
    one_step = checkpoint.read_config(stage / CHECKPOINT).objective == "generate"
    load: Any = checkpoint.load_generator if one_step else checkpoint.load
    model, config = load(stage / CHECKPOINT)
    tensors = reconstruct(stage / "snapshots" / (GENERATOR if one_step else "denoiser"), length, images)
    state = model.state_dict()
    model.load_state_dict(state | {n: t.to(state[n].dtype) for n, t in tensors.items()}, strict=True)
    entry = {"verb": "average", "length": length, "parent": config.sha256} | ({"images": images} if images else {})
    with writing(out):
        checkpoint.save(out, model, config.model_copy(update={"lineage": [*config.lineage, entry]}))
    return f"the average of length {length:g} of {stage}, {len(tensors)} tensors, written to {out}"
