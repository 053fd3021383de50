"""Training images: sources of captioned files or rendered scenes, and the loader that makes batches of them."""

from pixelgrow.data.images import BadImage
from pixelgrow.data.loader import Batch, Loader, take
from pixelgrow.data.sources.base import BadFile, Source, Subset, heldout_split
from pixelgrow.data.sources.opening import open_mixture, open_source

__all__ = [
    "BadFile",
    "BadImage",
    "Batch",
    "Loader",
    "Source",
    "Subset",
    "heldout_split",
    "open_mixture",
    "open_source",
    "take",
]
