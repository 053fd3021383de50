"""The `graft` verb: the rungs of one checkpoint on the core of another, where both stand on the same weights."""

from __future__ import annotations

from pathlib import Path

from pixelgrow import checkpoint
from pixelgrow.errors import UserError
from pixelgrow.growth import graft
from pixelgrow.model import Model
from pixelgrow.writing import writing


def graft_checkpoint(core: str, rung: str, out: Path) -> str:
    """Write `core` with the top rungs of `rung` on it to `out`; returns a line on it. Raises UserError."""
    checkpoint.check_target(out)
    below, donor = Model.from_pretrained(core), Model.from_pretrained(rung)
    for what in ("objective", "diffusion", "text", "latent"):
        one, other = (getattr(model.config, what) for model in (below, donor))
        if what in ("text", "latent"):
            one, other = checkpoint.identity(one), checkpoint.identity(other)
        if one != other:
            raise UserError(f"graft: {core} and {rung} differ in {what}: expected two models of one core")
    net, count = graft(below.network.net, donor.network.net)
    kept = len(net.state_dict()) - count
    dropped = len(below.network.net.state_dict()) - kept
    entry = {
        "verb": "graft",
        "init": "preserve",
        "tensors": {"loaded": kept, "new": count, "dropped": dropped},
        "parent": below.config.sha256,
        "rung": donor.config.sha256,
    }
    config = donor.config.model_copy(update={"network": net.config, "lineage": [*below.config.lineage, entry]})
    with writing(out):
        checkpoint.save(out, type(donor.network)(net, donor.config.diffusion), config)
    return f"{count} tensors of {rung} on {kept} of {core}, {net.config.resolution} px, written to {out}"
