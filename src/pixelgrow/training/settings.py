"""Training settings of a recipe's stage: one pydantic model. Schedules and periods are counted in images seen."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pixelgrow.diffusion.denoiser import NoiseConfig
from pixelgrow.diffusion.loss import Weighting
from pixelgrow.precision import Precision

MAX_EMA_LENGTH = 12**-0.5  # of a plain average over the whole run (gamma = 0; EDM2, arXiv 2312.02696, section 3.1)

Checkpointing = bool | Literal["selective"]  # of activations
Images = int  # a number of images seen
# Periods that a recipe leaves out: 1/n of the stage's images, but at most so many steps.
PERIODS = {
    "log_every": (200, 100),
    "save_every": (20, 10_000),
    "validate_every": (10, 2_000),
    "sample_every": (10, 5_000),
    "snapshot_every": (8, 100_000),
}


class TrainSettings(BaseModel):
    """The settings that every stage that trains shares. The numbers in brackets are the defaults.

    Length and batch
        images            length of the training
        batch             images per optimizer step [64]
        accumulate        micro-batches per step, each with its own forward and backward pass; divides `batch`. More of
                          them take less memory; the result is the same up to rounding [1]
    Optimizer
        optimizer         adamw; radam (with decoupled weight decay); muon for the matrices of linear layers, with
                          AdamW for the rest [adamw]
        lr                peak learning rate [1e-3]
        warmup            images over which the rate rises from 0, linearly [5% of images]
        decay             of the rate after the warm-up: cosine, to 0 at the end; inverse_sqrt; constant [cosine]
        betas             decay rates of the gradient's averages, of AdamW and RAdam [0.9, 0.99]
        weight_decay      of tensors of two or more dimensions; biases and gains are never decayed [0.01]
        clip              limit of the gradient's global norm; 0 for none [1]
    Averages of the weights (EDM2, arXiv 2312.02696)
        ema               their lengths: the width (sigma_rel) of the averaging profile as a share of the training so
                          far. The checkpoint holds the first [0.05, 0.10]
    Objective, of a denoiser
        cond_dropout      probability that an image's condition is replaced by the null condition, which classifier-free
                          guidance needs [0.1]
        noise             distribution of the noise level; see `NoiseConfig` [lognormal, mean -1.2, std 1.2]
        weighting         weight of the squared error by noise level: edm, v, eps, sigmoid; see `loss.weight` [edm]
        weighting_bias    bias of `weighting: sigmoid` [-3]
        multiscale        average in the error of the image at 1/2, 1/4, ... of the resolution, down to 32 px (simple
                          diffusion, arXiv 2301.11093, section 3.4; weights ours) [false]
    Computation
        precision         of forward passes: bf16, fp32, or auto, which is bf16 on a GPU that has it [auto]
        compile           use `torch.compile` [false]
        activation_checkpointing
                          true: keep only the input of each block, and compute the rest again in the backward pass:
                          less memory, a third more time, the same result; selective: keep products and attention too,
                          and compute again what is cheap [false]
    Periods, in images. One that is left out is a share of `images`, but at most so many steps.
        log_every         of a line in `log.jsonl`; one is also written after 5 minutes [1/200, 100 steps]
        save_every        of a state to resume from; one is also saved every 15 minutes [1/20, 10,000 steps]
        validate_every    of the held-out error; 0: never [1/10, 2,000 steps]
        sample_every      of a grid of samples; 0: never [1/10, 5,000 steps]
        snapshot_every    of a copy of the averages in half precision; `pixelgrow average` makes averages of other
                          lengths from them; 0: never [1/8, 100,000 steps]
    Data
        flip              mirror half of the images; sources whose captions would become untrue are left as they are
                          [false]
        workers           processes that decode images; 0: the training's own process does [0]
    Faults
        max_bad_steps     a step whose loss or gradient is not finite is skipped; so many in a row stop the run [20]
        bad_limit         files that cannot be read are skipped and listed; a larger share of a source's files stops the
                          run [0.01]
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: Images = Field(ge=1)
    batch: int = Field(64, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(1e-3, gt=0)
    warmup: Images | None = Field(None, ge=0)
    decay: Literal["cosine", "constant", "inverse_sqrt"] = "cosine"
    optimizer: Literal["adamw", "muon", "radam"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, ge=0)
    ema: tuple[float, ...] = (0.05, 0.10)
    cond_dropout: float = Field(0.1, ge=0, le=1)
    noise: NoiseConfig = NoiseConfig()
    weighting: Weighting = "edm"
    weighting_bias: float | None = None
    multiscale: bool = False
    precision: Precision = "auto"
    compile: bool = False
    activation_checkpointing: Checkpointing = False
    log_every: Images | None = Field(None, ge=1)
    save_every: Images | None = Field(None, ge=1)
    validate_every: Images | None = Field(None, ge=0)
    sample_every: Images | None = Field(None, ge=0)
    snapshot_every: Images | None = Field(None, ge=0)
    max_bad_steps: int = Field(20, ge=1)
    flip: bool = False
    workers: int = Field(0, ge=0)
    bad_limit: float = Field(0.01, ge=0, le=1)

    @property
    def micro_batch(self) -> int:
        """Images per forward pass, which is the loader's batch size."""
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
        if self.decay == "inverse_sqrt" and self.warmup == 0:  # its decay begins where the warm-up ends
            raise ValueError("warmup: got 0 with decay: inverse_sqrt, expected 1 or more; 5% of images is usual")
        if self.warmup is None:
            object.__setattr__(self, "warmup", max(self.images // 20, self.decay == "inverse_sqrt"))
        for name, (parts, steps) in PERIODS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, max(self.batch, min(self.images // parts, steps * self.batch)))
        return self
