"""Edits of images by a trained model: inpaint, upscale, transfer, interpolate.

Stands on `model` and `onestep`; Python users reach it as `pixelgrow.edit`.
"""

from pixelgrow.editing.edits import inpaint, interpolate, transfer, upscale

__all__ = ["inpaint", "interpolate", "transfer", "upscale"]
