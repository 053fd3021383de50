"""What a one-step generator's training is told beyond the settings of all training."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class LossSettings(BaseModel):
    """The losses of distillation (PaGoDA, arXiv 2405.14822), each switchable.

    Reconstruction (`rec` of pairs that were inverted, `dstl` of pairs that were drawn) is `features` times the distance
    of the teacher's features plus `pixels` times the squared error (ours: the paper has LPIPS). The adversarial term is
    weighed against it by the gradients in the last layer: `norms` squared as in the paper, plain as in the released
    code; where a generator is grown the paper's weight is 1, `balance: fixed`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: float = Field(1.0, ge=0)
    pixels: float = Field(1.0, ge=0)
    adversarial: bool = True
    balance: Literal["adaptive", "fixed"] = "adaptive"
    norms: Literal["squared", "plain"] = "plain"
    scale: float = Field(0.2, gt=0, description="of the adaptive weight; the weight itself where it is fixed")
    discriminator_rate: float = Field(5.0, gt=0, description="learning rate of the discriminator over the generator's")
    augment: tuple[Literal["colour", "translation", "cutout"], ...] = ("translation", "cutout")
