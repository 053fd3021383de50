"""Settings of a one-step generator's training, beyond those of all training: losses and presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class SimilaritySettings(BaseModel):
    """1 - cosine of prior samples and their captions by a CLIP, as a regulariser (PaGoDA, arXiv 2405.14822).

    `model`: a CLIP of transformers, a folder or a name on the hub. The paper does not state the `weight`; 0.1 is ours.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    weight: float = Field(0.1, ge=0)


class LossSettings(BaseModel):
    """The losses of distillation (PaGoDA, arXiv 2405.14822); each can be switched off.

    Reconstruction (`rec` for inverted pairs, `dstl` for sampled ones) is `features` times the distance of features plus
    `pixels` times the squared error (ours; the paper uses LPIPS). `balance: adaptive` weighs the adversarial loss
    against it by the norms of their gradients in the last layer, times `scale` (0.2 in paper and released code; 1 is
    ours). `norms`: squared in the paper, plain in the released code. `balance: fixed` makes `scale` the weight itself;
    the paper does so, with 1, where a generator is grown.

    Without a preset, the defaults of a growth are features 0.2, pixels 4 and scale 0.2 (`GROWN`, ours). Details are
    learnt from pixels: the teacher's features hardly depend on them, and a discriminator on those features holds
    details back.

    `distance`: whose features it compares: the teacher's (`teacher`), `lpips`, those of EfficientNet-Lite0, which needs
    no network (`efficientnet-lite0`), or those of a vision model of transformers, a folder or a name on the hub
    ("facebook/dinov2-small@REVISION"). `discriminator`: whose features it sees, likewise. The paper uses DINO's for
    text; for classes, those of DeiT and EfficientNet-Lite0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: float = Field(1.0, ge=0)
    pixels: float = Field(1.0, ge=0)
    distance: str = "teacher"
    adversarial: bool = True
    discriminator: str = "teacher"
    balance: Literal["adaptive", "fixed"] = "adaptive"
    norms: Literal["squared", "plain"] = "plain"
    scale: float = Field(1.0, gt=0, description="factor of the adaptive weight, or the fixed weight")
    discriminator_rate: float = Field(
        5.0, gt=0, description="learning rate of the discriminator, relative to the generator's"
    )
    augment: tuple[Literal["colour", "translation", "cutout"], ...] = ("translation",)
    mismatched: bool = Field(True, description="ours: real images with the caption of another count as fake")
    similarity: SimilaritySettings | None = None

    @model_validator(mode="after")
    def _some_term(self) -> LossSettings:
        if not self.features and not self.pixels and (not self.adversarial or self.balance == "adaptive"):
            raise ValueError(
                "features: 0 and pixels: 0 leave no reconstruction loss: keep one of the two, or write adversarial: "
                "true and balance: fixed"
            )
        return self

    @field_validator("discriminator")
    @classmethod
    def _no_distance(cls, discriminator: str) -> str:
        if discriminator == "lpips":
            raise ValueError(
                "lpips is a distance; expected teacher, efficientnet-lite0, or a vision model's folder or name on the "
                "hub"
            )
        return discriminator


Preset = Literal["paper", "released-code"]
_BOTH = {"optimizer": "radam", "lr": 8e-6}  # the same in both
_PAPERS_LOSSES = {"discriminator_rate": 250.0, "mismatched": False}  # 2e-3 over 8e-6; `mismatched` is ours
# Only what is known of the two. The paper squares the norms and, where it grows, trains the base's last blocks too (how
# many of ours that are is our choice). The released code has plain norms; what it freezes is not known. Their
# distances, LPIPS and projected features, are of outside networks, which a recipe names.
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
GROWN: dict[str, Any] = {"features": 0.2, "pixels": 4.0, "scale": 0.2}  # growth without a preset; see `LossSettings`
EMA_STEPS = 1000  # standard deviation of an average of decay 0.999, that of both presets


def with_preset(given: Mapping[str, Any], verb: Literal["distill", "grow"]) -> dict[str, Any]:
    """The settings of a stage, with its preset's losses, optimizer and average where it does not set them itself.

    Without a preset, a growth's losses default to `GROWN`, but `scale` stays 1 with `balance: fixed`. The presets'
    average of decay 0.999 becomes a power-law average of the same deviation at the end of the run (EDM2).
    """
    filled, name = dict(given), given.get("preset")
    losses = filled.get("losses") or {}
    if name is None and verb == "grow" and isinstance(losses, Mapping):
        defaults = {k: v for k, v in GROWN.items() if k != "scale" or losses.get("balance") != "fixed"}
        filled["losses"] = defaults | dict(losses)
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
