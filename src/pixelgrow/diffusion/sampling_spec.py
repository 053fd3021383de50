"""How pictures are drawn where nobody says otherwise: what recipes and checkpoints say of it, validated alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pixelgrow.diffusion.sampling import MAX_STEPS, SAMPLERS
from pixelgrow.errors import UserError


class Spec(BaseModel):
    """Base of a recipe's parts: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)


class SamplingSpec(Spec):
    """How a checkpoint is sampled where nobody says otherwise; what is left out is the library's default."""

    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(None, ge=0)
    sampler: str | None = None
    threshold: float | None = Field(None, gt=0, le=1)
    grid: Literal["karras", "native"] | None = None
    interval: tuple[float, float] | None = Field(None, description="guide from lo to hi alone, in sigma of the picture")

    @field_validator("sampler")
    @classmethod
    def _sampler(cls, sampler: str | None) -> str | None:
        if sampler is not None and sampler not in SAMPLERS:
            raise ValueError(f"got {sampler!r}, expected one of {', '.join(SAMPLERS)}")
        return sampler

    @field_validator("interval")
    @classmethod
    def _interval(cls, interval: tuple[float, float] | None) -> tuple[float, float] | None:
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise ValueError(f"got {list(interval)}, expected [lo, hi] with 0 <= lo < hi")
        return interval

    @property
    def given(self) -> dict[str, Any]:
        """What is not left out."""
        return {k: v for k in SamplingSpec.model_fields if (v := getattr(self, k)) is not None}


def check_one_step(given: Mapping[str, Any], guided: bool) -> None:
    """Raise UserError for a setting that a one-step generator, `guided` or not, does not take."""
    if named := [k for k in given if not (guided and k == "guidance")]:
        raise UserError(
            f"{', '.join(named)}: a one-step generator draws in one network evaluation and takes no such setting; "
            "drop it, or name a multi-step checkpoint"
        )
    weight = given.get("guidance", 1.0)
    if not 0 < weight < math.inf:
        raise UserError(f"guidance={weight:g}: expected a weight above 0, the condition of this one-step generator")
