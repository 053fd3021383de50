"""What a stage's training is told: one pydantic model, every schedule counted in images."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pixelgrow.diffusion.denoiser import NoiseConfig, Weighting
from pixelgrow.precision import Precision

MAX_EMA_LENGTH = 12**-0.5  # of a plain average over the whole run (gamma = 0; EDM2, arXiv 2312.02696, section 3.1)

Images = int  # a number of images seen, the unit of every schedule
# Periods that a recipe leaves out: this fraction of the stage's images, or so many steps if these come first.
PERIODS = {
    "log_every": (200, 100),
    "save_every": (20, 10_000),
    "validate_every": (10, 2_000),
    "sample_every": (10, 5_000),
    "snapshot_every": (8, 100_000),
}


class TrainSettings(BaseModel):
    """Settings shared by every stage that trains.

    Lengths are in images seen; those left out are filled in from `images` (warmup 5%; log, save, validate, sample,
    snapshot every 1/200, 1/20, 1/10, 1/10, 1/8 of it), so that what is written to `stage.json` is what was done.
    Validation, samples and snapshots every 0 images mean never.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: Images = Field(ge=1)
    batch: int = Field(64, ge=1, description="images per optimizer step, all micro-batches together")
    accumulate: int = Field(1, ge=1, description="micro-batches per step; divides batch")
    lr: float = Field(1e-3, gt=0)
    warmup: Images | None = Field(None, ge=0, description="linear warm-up; 5% of images if left out")
    decay: Literal["cosine", "constant", "inverse_sqrt"] = "cosine"
    optimizer: Literal["adamw", "muon", "radam"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.01, ge=0, description="on tensors of two and more dimensions only")
    clip: float = Field(1.0, ge=0, description="limit of the gradient's global norm; 0: none")
    ema: tuple[float, ...] = Field((0.05, 0.10), description="relative lengths (sigma_rel of EDM2); the first is kept")
    cond_dropout: float = Field(0.1, ge=0, le=1)
    noise: NoiseConfig = NoiseConfig()
    weighting: Weighting = "edm"
    weighting_bias: float | None = Field(None, description="b of weighting: sigmoid; -3 if left out")
    multiscale: bool = False
    precision: Precision = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    log_every: Images | None = Field(None, ge=1)
    save_every: Images | None = Field(None, ge=1)
    validate_every: Images | None = Field(None, ge=0)
    sample_every: Images | None = Field(None, ge=0)
    snapshot_every: Images | None = Field(None, ge=0, description="averages kept (fp16) to choose other lengths later")
    max_bad_steps: int = Field(
        20, ge=1, description="steps in a row with a non-finite loss or gradient before stopping"
    )
    flip: bool = False
    workers: int = Field(0, ge=0)
    bad_limit: float = Field(0.01, ge=0, le=1, description="share of unreadable images that a run survives")

    @property
    def micro_batch(self) -> int:
        """Images per forward pass: the batch size to ask the loader for."""
        return self.batch // self.accumulate

    @field_validator("betas")
    @classmethod
    def _betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= b < 1 for b in betas):
            raise ValueError(f"betas: got {betas}, expected two numbers in [0, 1)")
        return betas

    @field_validator("ema")
    @classmethod
    def _ema(cls, ema: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(ema)) != len(ema) or not all(0 < s < MAX_EMA_LENGTH for s in ema):
            raise ValueError(f"ema: got {list(ema)}, expected distinct lengths between 0 and {MAX_EMA_LENGTH:.3f}")
        return ema

    @model_validator(mode="after")
    def _of_sigmoid(self) -> Self:
        if self.weighting_bias is not None and self.weighting != "sigmoid":
            raise ValueError(
                f"weighting_bias: got {self.weighting_bias:g} with weighting: {self.weighting}, but it belongs to "
                "weighting: sigmoid; drop it"
            )
        return self

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.batch % self.accumulate:
            raise ValueError(f"batch: got {self.batch}, expected a multiple of accumulate ({self.accumulate})")
        if self.decay == "inverse_sqrt" and self.warmup == 0:  # it falls from the end of the warm-up on
            raise ValueError("warmup: got 0 with decay: inverse_sqrt, expected 1 image or more; 5% of them is usual")
        if self.warmup is None:
            object.__setattr__(self, "warmup", self.images // 20)
        for name, (parts, steps) in PERIODS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, max(self.batch, min(self.images // parts, steps * self.batch)))
        return self
