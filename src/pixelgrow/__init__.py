"""Grow a pixel-space image generator from a small one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "edit", "load", "search"]

if TYPE_CHECKING:
    from pixelgrow import editing as edit
    from pixelgrow import search
    from pixelgrow.model import Model, load


def __getattr__(name: str) -> Any:
    """Import `load`, `Model` and `edit` at first use: they import torch."""
    if name in ("Model", "load"):
        import pixelgrow.model

        return getattr(pixelgrow.model, name)
    if name == "edit":
        import pixelgrow.editing

        return pixelgrow.editing
    if name == "search":
        return importlib.import_module("pixelgrow.search")
    raise AttributeError(f"module 'pixelgrow' has no attribute {name!r}")
