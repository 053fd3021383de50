"""The default sampling settings of a checkpoint, as recipes and `config.json` hold them: one model validates both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from pixelgrow.diffusion.sampling import MAX_STEPS
from pixelgrow.diffusion.solvers import SAMPLERS
from pixelgrow.errors import UserError


class Spec(BaseModel):
    """Base of a recipe's parts: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)


def _ordered(interval: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= interval[0] < interval[1] < math.inf:
        raise ValueError(f"got {list(interval)}, expected [lo, hi] with 0 <= lo < hi, both finite")
    return interval


Interval = Annotated[tuple[float, float], AfterValidator(_ordered)]


class SamplingSpec(Spec):
    """Default sampling settings of a checkpoint; the library's own where one is left out."""

    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(None, ge=0)
    sampler: str | None = None
    threshold: float | None = Field(None, gt=0, le=1)
    grid: Literal["karras", "native"] | None = None
    interval: Interval | None = Field(None, description="guide from lo to hi only, in sigma of the image")

    guide_details: bool | None = Field(
        None, description="false: guide only the core; the rungs above are evaluated once"
    )

    @field_validator("sampler")
    @classmethod
    def _sampler(cls, sampler: str | None) -> str | None:
        if sampler is not None and sampler not in SAMPLERS:
            raise ValueError(f"got {sampler!r}, expected one of {', '.join(SAMPLERS)}")
        return sampler

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are not left out."""
        return {k: v for k in SamplingSpec.model_fields if (v := getattr(self, k)) is not None}

    def grown(self, k: float) -> SamplingSpec:
        """The same settings for a model of k times the resolution: sigma of the image is k times as large there."""
        if self.interval is None:
            return self
        return self.model_copy(update={"interval": (k * self.interval[0], k * self.interval[1])})


def check_one_step(given: Mapping[str, Any], guided: bool) -> None:
    """Raise UserError for settings that a one-step generator does not take; a `guided` one takes `guidance`."""
    if named := [k for k in given if not (guided and k == "guidance")]:
        raise UserError(
            f"{', '.join(named)}: a one-step generator samples in one network evaluation and takes no such setting; "
            "drop it, or name a multi-step checkpoint"
        )
    weight = given.get("guidance", 1.0)
    if not 0 < weight < math.inf:
        raise UserError(f"guidance={weight:g}: expected a weight above 0, the condition of this one-step generator")
