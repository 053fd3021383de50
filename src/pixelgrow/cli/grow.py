"""The `grow` verb: from a checkpoint to one of higher resolution, without training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast, get_args

from pixelgrow import checkpoint
from pixelgrow.data.loader import take
from pixelgrow.data.sources.latents import Latents
from pixelgrow.data.sources.opening import open_mixture
from pixelgrow.diffusion.sampling_spec import SamplingSpec
from pixelgrow.errors import UserError
from pixelgrow.growth import Init, grow, grown_config
from pixelgrow.model import Model
from pixelgrow.stages.grow import REPORT, describe, sample_both
from pixelgrow.text.encoders import check_classes
from pixelgrow.writing import write_json, writing

logger = logging.getLogger(__name__)
WATCHED = 64  # images that both models are measured on


def grow_checkpoint(name: str, to: int, out: Path, *, source: str, init: str, kind: str = "auto", seed: int = 0) -> str:
    """Grow a checkpoint to `to` pixels and write it to `out`; returns the report as text. Raises UserError."""
    if init not in get_args(Init):
        raise UserError(f"--init {init!r}: expected one of {', '.join(get_args(Init))}")
    with writing(out):
        exists = (out / checkpoint.CONFIG).exists()
    if exists:
        raise UserError(f"{out} holds a checkpoint already: name another folder, or delete it")
    checkpoint.check_target(out)
    model = Model.from_pretrained(name)
    if model.config.objective == "generate":
        raise UserError(
            f"{name} is a one-step generator: it grows by a recipe's grow stage, with pairs: of its teacher"
        )
    grown_config(model.denoiser.net.config, to, cast("Init", init))  # before data are read
    spec = {"source": source} | ({"split": "heldout"} if source == "scenes" else {"kind": kind})
    (opened,), _ = open_mixture(spec)
    check_classes(model.config.text, getattr(opened, "classes", ()), f"--data {opened.name}")
    if model.autoencoder is not None:
        opened = Latents(
            opened, model.autoencoder, model.denoiser.space.channels, out
        )  # encoded for this call, not kept
    batch = take(opened, WATCHED, (to, to))
    logger.info("growing to %d px; measuring and sampling both models on %d images of %s", to, len(batch.text), source)
    cond = model.encode(batch.text)
    child, report = grow(
        model.denoiser, to, cast("Init", init), images=batch.image.to(model.device), cond=cond, seed=seed
    )
    counts = {k: len(getattr(report, k)) for k in ("loaded", "new", "dropped")}
    entry = {"verb": "grow", "init": init, "from": model.resolution, "to": to, "tensors": counts}
    entry |= {"parent": model.config.sha256, "of": str(model.origin)}
    sampling = SamplingSpec.model_validate(model.config.sampling).grown(to / model.resolution).given
    config = model.config.model_copy(update={"lineage": [*model.config.lineage, entry], "sampling": sampling})
    beside = out.with_name(f"{out.name}-growth")
    with writing(out):
        sample_both(beside, model.denoiser, child, cond, seed, decode=model.decode)
        write_json(beside / REPORT, report.to_dict())
        checkpoint.save(out, child, config)
    return describe(report.to_dict()) + f"\nwritten to {out}; the report and samples of both to {beside}"
