"""What a one-step generator's training is told beyond the settings of all training."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class SimilaritySettings(BaseModel):
    """CLIP's 1 - cosine of prior samples and their captions, as a regulariser (PaGoDA, arXiv 2405.14822).

    `model`: a CLIP of transformers, a folder or one of the hub. The paper does not state its `weight`; 0.1 is ours.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    weight: float = Field(0.1, ge=0)


class LossSettings(BaseModel):
    """The losses of distillation (PaGoDA, arXiv 2405.14822), each switchable.

    Reconstruction (`rec` of pairs that were inverted, `dstl` of pairs that were drawn) is `features` times the distance
    of features plus `pixels` times the squared error (ours: the paper has LPIPS). The adversarial term is weighed
    against it by the gradients in the last layer: `norms` squared as in the paper, plain as in the released code; where
    a generator is grown the paper's weight is 1, `balance: fixed`.

    `distance`: whose features, the teacher's own (`teacher`), `lpips`, or those of a vision model of transformers, by
    its folder or its name on the hub ("facebook/dinov2-small@REVISION"). `discriminator`: whose features it looks at,
    likewise; the paper has DINO's for text and other networks' for classes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: float = Field(1.0, ge=0)
    pixels: float = Field(1.0, ge=0)
    distance: str = "teacher"
    adversarial: bool = True
    discriminator: str = "teacher"
    balance: Literal["adaptive", "fixed"] = "adaptive"
    norms: Literal["squared", "plain"] = "plain"
    scale: float = Field(0.2, gt=0, description="of the adaptive weight; the weight itself where it is fixed")
    discriminator_rate: float = Field(5.0, gt=0, description="learning rate of the discriminator over the generator's")
    augment: tuple[Literal["colour", "translation", "cutout"], ...] = ("translation", "cutout")
    similarity: SimilaritySettings | None = None

    @field_validator("discriminator")
    @classmethod
    def _no_distance(cls, discriminator: str) -> str:
        if discriminator == "lpips":
            raise ValueError("lpips is a distance; expected teacher, or a vision model's folder or name on the hub")
        return discriminator
