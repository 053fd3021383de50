"""Short names of published vision models: where on the hub, which revision, and the hash of the weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A model of the hub with a short name: its revision, and the SHA-256 of its weights, "" where it is not known.

    `weights`: their file, if it is not safetensors: it is read without running any code in it, after its hash.
    """

    repository: str
    revision: str = ""
    sha256: str = ""
    weights: str = ""

    @property
    def place(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


# The networks of published distances: FD-DINOv2 (arXiv 2306.04675), CMMD (arXiv 2401.09603), which takes clip-336, and
# the mean over several (arXiv 2604.28190). Of ConvNeXt no revision and no hash were at hand to verify.
PUBLISHED = {
    "dinov2": Published(
        "facebook/dinov2-large",
        "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
        "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
    ),
    "clip": Published(
        "openai/clip-vit-large-patch14",
        "32bd64288804d66eefd0ccbe215aa642df71cc41",
        "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
    ),
    "clip-336": Published(
        "openai/clip-vit-large-patch14-336",
        "ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
        "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801",
        "pytorch_model.bin",
    ),
    "siglip": Published(
        "google/siglip-so400m-patch14-384",
        "9fdffc58afc957d1a03a25b10dba0329ab15c2a3",
        "ea2abad2b7f8a9c1aa5e49a244d5d57ffa71c56f720c94bc5d240ef4d6e1d94a",
    ),
    "convnext": Published("facebook/convnextv2-base-22k-224"),
}
