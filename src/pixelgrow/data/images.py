"""One untrusted image file -> one uint8 RGB picture of the size that was asked for.

Only JPEG, PNG and WebP are decoded, Pillow's own bomb limit holds, a truncated file is an error. Choices:
- EXIF orientation is applied; an unreadable EXIF block counts as "upright".
- Transparency is composited on white.
- 16-bit grey is scaled by 255/65535; 16-bit colour keeps its high bytes (Pillow's decoder).
- CMYK is converted without its colour profile, as every profile is ignored.
- Of an animation the first frame is taken.
- JPEGs are decoded at the smallest DCT scale that is still at least twice the target, then filtered (Lanczos).
"""

import errno
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin

FORMATS = (
    JpegImagePlugin.JpegImageFile.format,
    PngImagePlugin.PngImageFile.format,
    WebPImagePlugin.WebPImageFile.format,
)
MAX_PIXELS = 89_478_485  # Pillow's default MAX_IMAGE_PIXELS, kept whatever the process does to Pillow's own
REDUCING_GAP = 2.0  # source pixels per target pixel that are left to the antialiasing filter
ORIENTATION = 0x0112

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
OUR_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}  # the machine's state, not the file's


class BadImage(Exception):
    """A file that cannot become a sample; `reason` is one short line and a property of the file alone."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def read_size(file: BinaryIO) -> tuple[int, int]:
    """Size (h, w) in pixels after EXIF orientation, from the header alone. Raises `BadImage`."""
    with _as_bad_image():
        image = _open(file)
        w, h = image.size
        return (w, h) if _orientation(image) >= 5 else (h, w)


def read_image(file: BinaryIO, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Decode a file to uint8 (h, w, 3) of the given `size` (h, w).

    The picture is scaled until it just covers `size`; `crop` (y, x), each in [0, 1], says where along the slack of the
    longer side the window lies (0.5: centre). Raises `BadImage`.
    """
    with _as_bad_image():
        image = _open(file)
        turn = _orientation(image)
        h, w = size if turn < 5 else size[::-1]
        scale = min(image.height / h, image.width / w)
        image.draft(None, (max(1, int(w * min(scale, REDUCING_GAP))), max(1, int(h * min(scale, REDUCING_GAP)))))
        rgb = to_rgb(image)
        if turn in _TRANSPOSE:
            rgb = rgb.transpose(_TRANSPOSE[turn])
        return fit(rgb, size, crop)


def upright(image: Image.Image) -> Image.Image:
    """A picture turned as its EXIF orientation says."""
    turn = _orientation(image)
    return image.transpose(_TRANSPOSE[turn]) if turn in _TRANSPOSE else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode that the three decoders yield -> 8-bit RGB; transparency is composited on white."""
    if image.mode.startswith("I"):  # I;16, or I holding 16-bit values
        wide = np.asarray(image).astype(np.int64)
        grey = (np.clip(wide, 0, 65535) * 255 + 32767) // 65535
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            grey[wide == clear] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def fit(image: Image.Image, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """An RGB image -> uint8 (h, w, 3): smallest side to the target, antialiased, and cropped as `crop` says."""
    h, w = size
    if image.size == (w, h):
        return np.array(image)
    scale = min(image.height / h, image.width / w)  # source pixels per target pixel
    top, left = crop[0] * (image.height - h * scale), crop[1] * (image.width - w * scale)
    box = (left, top, min(left + w * scale, image.width), min(top + h * scale, image.height))
    return np.array(image.resize((w, h), Image.Resampling.LANCZOS, box=box, reducing_gap=REDUCING_GAP))


def _open(file: BinaryIO) -> ImageFile.ImageFile:
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width}x{image.height} pixels, more than the limit of {MAX_PIXELS}")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF (or XMP) orientation 1..8 as far as the header tells; 1 where it is absent or damaged."""
    if not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
        return 1
    try:
        # The base class's method: PNG's own would decode the pixels to look for EXIF behind them.
        value = Image.Image.getexif(image).get(ORIENTATION, 1)
    except (ValueError, TypeError, KeyError, IndexError, OSError, SyntaxError, struct.error, EOFError, OverflowError):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


@contextmanager
def _as_bad_image() -> Iterator[None]:
    """What a decoder says of a file becomes `BadImage`; what the machine says (no memory, no file handles) stays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged EXIF and the like: either usable or an error below
        try:
            yield
        except (BadImage, MemoryError):
            raise
        except UnidentifiedImageError:
            raise BadImage("not a JPEG, PNG or WebP image, or its header is damaged") from None
        except OSError as error:
            if error.errno in OUR_FAULT:
                raise
            raise BadImage(_one_line(error)) from error
        except (ValueError, TypeError, KeyError, IndexError, SyntaxError, AttributeError) as error:
            raise BadImage(_one_line(error)) from error
        except (EOFError, struct.error, zlib.error, OverflowError, RuntimeError, Image.DecompressionBombError) as error:
            raise BadImage(_one_line(error)) from error


def _one_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]* object at 0x[0-9a-f]+>", "file", text))[:200]
    return text[:1].lower() + text[1:]
