"""A recipe's inputs: sources of images, the held-out part, text encoder, autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from pixelgrow.data.images import PADDED, Fit, colour_of
from pixelgrow.data.scenes.source import MAX_SCENES, World
from pixelgrow.data.scenes.source import SETTINGS as SCENES
from pixelgrow.data.sources.base import HELD_OUT_AT_MOST
from pixelgrow.diffusion.sampling_spec import Spec

FILES = ("kind", "ground", "fit", "buckets", "lanes", "window", "cache")  # settings of a path


def _colour(name: str) -> str:
    colour_of(name)
    return name


class TextSpec(Spec):
    """The frozen text encoder, or class labels instead: `{classes: N}` is short for `{encoder: "labels:N"}`.

    Each caption is encoded once, into the run's folder; with `cache`, into a folder that recipes may share. With
    `online`, captions are encoded while a stage trains, again each time, and nothing is stored.
    """

    encoder: str = "minilm"
    max_tokens: int = Field(32, ge=1)
    online: bool = False
    cache: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _classes(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "classes" in given:
            if "encoder" in given:
                raise ValueError(
                    f"got encoder: {given['encoder']} and classes: {given['classes']}, expected one of the two; "
                    f"for class labels write text={{classes: {given['classes']}}} alone"
                )
            return {k: v for k, v in given.items() if k != "classes"} | {"encoder": f"labels:{given['classes']}"}
        return given

    @field_validator("encoder")
    @classmethod
    def _labels(cls, encoder: str) -> str:
        head, _, count = encoder.partition(":")
        if head == "labels" and not (count.isdigit() and int(count) > 0):
            raise ValueError(f"got {encoder!r}, expected labels:N with N the number of classes")
        return encoder

    @model_validator(mode="after")
    def _stored_or_not(self) -> TextSpec:
        if self.online and (self.cache is not None or self.classes):
            other = f"classes: {self.classes}" if self.classes else f"cache: {self.cache}"
            raise ValueError(f"got online: true and {other}, but with online nothing is stored; drop one of the two")
        if self.cache is not None and self.classes:
            raise ValueError(f"got cache: {self.cache}, but class labels are not encoded; drop it")
        return self

    @property
    def classes(self) -> int:
        """Number of classes; 0 for a text encoder."""
        head, _, count = self.encoder.partition(":")
        return int(count) if head == "labels" else 0


class LatentSpec(Spec):
    """Work in the latents of a diffusers `AutoencoderKL`. `autoencoder`: a folder or a repository of the hub.

    A word alone is its `autoencoder`. Resolutions of the stages are then sides of latents. Each image is encoded once,
    as a centre crop.
    """

    autoencoder: str

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        return {"autoencoder": given} if isinstance(given, str) else given


class DataSpec(Spec):
    """One source of images with captions or classes. A word alone is its `source`.

    `source`: `scenes` (rendered, with `n`, `captions`, `seed`, `split`, `world`), or the path of a folder or of tar
    shards, or the URL of tar shards. `lanes`, `window`: tar shards are read in so many lanes, each of which shuffles so
    many at a time; without them, as one shuffled whole, where they are on this machine. `cache`: GB of this machine for
    shards from a URL.
    `kind`: what is at the path; `auto` looks. `ground`: the colour of transparent parts (white). `fit`: images that are
    not square are cropped, or padded with the ground. `buckets`: they are grouped by shape instead of cropped to
    squares (`data.buckets`). `weight`: share of the mixture; in proportion to the size if left out.
    """

    source: str
    kind: Literal["auto", "folder", "classes", "tar"] = "auto"
    ground: Annotated[str, AfterValidator(_colour)] | None = None
    fit: Fit | None = None
    buckets: bool | None = None
    lanes: int | None = Field(None, ge=1)
    window: int | None = Field(None, ge=1)
    cache: float | None = Field(None, gt=0)
    weight: float | None = Field(None, gt=0)
    n: int | None = Field(None, ge=1, le=MAX_SCENES)
    captions: int | None = Field(None, ge=1)
    seed: int | None = None
    split: Literal["train", "heldout"] | None = None
    world: World | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        return {"source": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _scenes_alone(self) -> DataSpec:
        extra = [k for k in SCENES if getattr(self, k) is not None]
        if extra and self.source != "scenes":
            raise ValueError(f"{extra[0]} belongs to `source: scenes`, but the source is {self.source!r}; drop it")
        if self.source == "scenes" and (given := self._of_files()):
            raise ValueError(f"{given}, but it belongs to a path, not to scenes; drop it")
        if self.buckets and self.fit == "pad":
            raise ValueError(PADDED)
        return self

    @property
    def opening(self) -> dict[str, Any]:
        """The arguments of `pixelgrow.data.open_source`."""
        return self.model_dump(exclude_none=True, include={"source", *(SCENES if self.source == "scenes" else FILES)})

    def _of_files(self) -> str:
        """The first setting that is given and makes sense for files alone, in words; "" for none."""
        given = {key: getattr(self, key) for key in FILES} | ({"kind": None} if self.kind == "auto" else {})
        return next((f"{key}: got {value!r}" for key, value in given.items() if value is not None), "")


def _listed(data: Any) -> Any:
    return [data] if isinstance(data, Mapping | str) else data


Mixture = Annotated[tuple[DataSpec, ...], BeforeValidator(_listed), Field(min_length=1)]  # one source, or several


class HeldoutSpec(DataSpec):
    """The images kept from training: a source of their own, or a `fraction` of each source of files.

    The part has at least 16 images, at most `at_most`, and at most half of the source.
    """

    source: str = ""
    fraction: float = Field(0.02, gt=0, lt=1)
    at_most: int = Field(HELD_OUT_AT_MOST, ge=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> HeldoutSpec:
        if self.source and (part := {"fraction", "at_most"} & self.model_fields_set):
            raise ValueError(f"give a source or a {max(part)}, not both")
        if self.weight is not None:
            raise ValueError(f"weight: got {self.weight:g}, but held-out data is no mixture; drop it")
        if not self.source and (given := self._of_files()):
            raise ValueError(f"{given} without a source; drop it")
        return self
