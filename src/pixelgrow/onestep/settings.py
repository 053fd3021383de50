"""What a one-step generator's training is told beyond the settings of all training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


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
    against it by the gradients in the last layer: `norms` squared as in the paper, plain as in the released code, times
    `scale` (0.2 in both; 1 is ours); where a generator is grown the paper's weight is 1, `balance: fixed`. Without a
    preset, a growth has features 0.2, pixels 4 and scale 0.2 unless told (`GROWN`, ours): details are learnt from
    pixels, the teacher's features hardly show them, and a discriminator on those holds them back.

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
    scale: float = Field(1.0, gt=0, description="of the adaptive weight; the weight itself where it is fixed")
    discriminator_rate: float = Field(5.0, gt=0, description="learning rate of the discriminator over the generator's")
    augment: tuple[Literal["colour", "translation", "cutout"], ...] = ("translation",)
    mismatched: bool = Field(True, description="ours: real pictures under another's caption count as drawn too")
    similarity: SimilaritySettings | None = None

    @model_validator(mode="after")
    def _some_term(self) -> LossSettings:
        if not self.features and not self.pixels and (not self.adversarial or self.balance == "adaptive"):
            raise ValueError(
                "features: 0 and pixels: 0 leave no reconstruction to weigh against: write adversarial: true and "
                "balance: fixed, or keep one of the two"
            )
        return self

    @field_validator("discriminator")
    @classmethod
    def _no_distance(cls, discriminator: str) -> str:
        if discriminator == "lpips":
            raise ValueError("lpips is a distance; expected teacher, or a vision model's folder or name on the hub")
        return discriminator


Preset = Literal["paper", "released-code"]
_BOTH = {"optimizer": "radam", "lr": 8e-6}  # what is known of the training is the same in both
_PAPERS_LOSSES = {"discriminator_rate": 250.0, "mismatched": False}  # 2e-3 over the generator's rate; no trick of ours
# What is known of the two, and no more. The paper weighs by squared norms and, where it grows, trains the base's last
# blocks too (how many of ours that are is our choice); the released code weighs by plain ones, and what it freezes is
# not known. LPIPS and projected features, their distances, are networks from outside: named in a recipe, not here.
PRESETS: dict[Preset, dict[Literal["distill", "grow"], dict[str, Any]]] = {
    "paper": {
        "distill": _BOTH | {"losses": _PAPERS_LOSSES | {"norms": "squared", "scale": 0.2}},
        "grow": _BOTH | {"base_blocks": 1, "losses": _PAPERS_LOSSES | {"balance": "fixed", "scale": 1.0}},
    },
    "released-code": {
        "distill": _BOTH | {"losses": _PAPERS_LOSSES | {"norms": "plain", "scale": 0.2}},
        "grow": _BOTH | {"losses": _PAPERS_LOSSES | {"balance": "fixed", "scale": 1.0}},
    },
}
GROWN: dict[str, Any] = {"features": 0.2, "pixels": 4.0, "scale": 0.2}  # without a preset; see `LossSettings`
EMA_STEPS = 1000  # deviation of an average of decay 0.999, both presets'


def with_preset(given: Mapping[str, Any], verb: Literal["distill", "grow"]) -> dict[str, Any]:
    """A stage as given, with what it leaves out of its losses, optimizer and average from its `preset`.

    Without one, a growth's losses begin at `GROWN`; `balance: fixed` has the weight 1 unless told. An average of decay
    0.999 becomes the power-law one of the same deviation at the end of the run (EDM2).
    """
    filled, name = dict(given), given.get("preset")
    losses = filled.get("losses") or {}
    if name is None and verb == "grow" and isinstance(losses, Mapping):
        weighed = {k: v for k, v in GROWN.items() if k != "scale" or losses.get("balance") != "fixed"}
        filled["losses"] = weighed | dict(losses)
    if not isinstance(name, str) or name not in PRESETS:
        return filled
    settings = PRESETS[name][verb]
    if filled.get("core") == "finetune" or filled.get("init") == "scratch":  # the whole base trains
        settings = {k: v for k, v in settings.items() if k != "base_blocks"}
    if isinstance(losses, Mapping):
        filled["losses"] = settings["losses"] | losses
    batch, images = (filled.get(k, default) for k, default in (("batch", 64), ("images", None)))
    if type(batch) is int and type(images) is int and images > 0:
        filled.setdefault("ema", [min(0.25, EMA_STEPS * batch / images)])
    return settings | filled
