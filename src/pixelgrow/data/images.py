"""Decode one untrusted image file to a uint8 RGB array of a given size.

The bytes of a file say what it is, not its name. JPEG, PNG and WebP are decoded. An image of more than `MAX_PIXELS` and
a truncated file are errors. Choices:
- EXIF orientation is applied; an unreadable EXIF block counts as "upright".
- Transparency is composited on a ground, white unless a `Frame` says otherwise.
- An image that is not of the target's shape is cropped, or padded with the ground (`Frame.fit`).
- 16-bit grey is scaled by 255/65535; 16-bit colour keeps its high bytes (Pillow's decoder).
- CMYK is converted without its colour profile, as every profile is ignored.
- The first frame of an animation is taken.
- Text and profiles in a PNG that Pillow refuses to unpack are skipped; the pixels are decoded without them.
- JPEGs are decoded at the smallest DCT scale that is still at least twice the target, then filtered (Lanczos).
"""

import errno
import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO, Literal, TypeVar

import numpy as np
from PIL import Image, ImageColor, ImageFile, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin

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
HEAD = 32  # bytes that `format_of` needs
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"}  # all that the pixels of a PNG depend on
WHITE = (255, 255, 255)
Fit = Literal["crop", "pad"]
T = TypeVar("T")


class BadImage(Exception):
    """A file that cannot become a sample; `reason` is one short line and a property of the file alone."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """What an image's header says.

    `size` (h, w) in pixels after EXIF orientation; `transparent`: it has an alpha channel or a transparent colour.
    """

    size: tuple[int, int]
    transparent: bool


@dataclass(frozen=True)
class Frame:
    """How images are laid out: `ground`, the name of a colour, lies behind transparent parts.

    `fit` of an image to a size: "crop" covers all of it and cuts what stands out, "pad" shows the whole image, in the
    middle of the ground. `buckets`: the size has nearly the image's own shape, where a stage has such sizes.
    """

    ground: str = "white"
    fit: Fit = "crop"
    buckets: bool = False

    @property
    def mark(self) -> str:
        """What the frame adds to the fingerprint of data; "" for the default, under any name of its colour."""
        rgb = colour_of(self.ground)
        laid = "" if (rgb, self.fit) == (WHITE, "crop") else f".{bytes(rgb).hex()}.{self.fit}"
        return laid + (".buckets" if self.buckets else "")


FRAME = Frame()
PADDED = "buckets: got true with fit: pad, which makes every image a square; drop one of the two"


@lru_cache
def colour_of(name: str) -> tuple[int, int, int]:
    """(r, g, b) of a colour such as white, grey or #ffe0b0. Raises ValueError."""
    try:
        found = ImageColor.getrgb(name)
    except ValueError:
        found = None
    if found is None or len(found) != 3:  # no colour, or one with transparency
        raise ValueError(f"got {name!r}, expected a colour such as white, grey or #ffe0b0")
    return found


def format_of(head: bytes) -> str:
    """The kind of file that starts with `head` (its first `HEAD` bytes or more), "" if unknown."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        return "AVIF" if head[8:12] in (b"avif", b"avis") else "HEIC or MP4"
    return next((name for magic, name in _MAGIC if head.startswith(magic)), "")


_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (PNG_SIGNATURE, "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"8BPS", "Photoshop"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML or SVG"),
    (b"<!DOCTYPE", "HTML"),
    (b"<html", "HTML"),
    (b"%PDF", "PDF"),
    (b"version https://git-lfs", "Git LFS pointer"),
    (b"PK\x03\x04", "zip"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!", "rar"),
)
DECODED = ("JPEG", "PNG", "WebP")
ARCHIVES = ("zip", "gzip", "bzip2", "xz", "zstd", "7z", "rar")


def read_header(file: BinaryIO) -> Header:
    """The header of an image, without its pixels. Raises `BadImage`."""

    def header(image: ImageFile.ImageFile) -> Header:
        w, h = image.size
        size = (w, h) if _orientation(image) >= 5 else (h, w)
        return Header(size, image.has_transparency_data)

    return _opened(file, header)


def read_image(
    file: BinaryIO, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5), frame: Frame = FRAME
) -> np.ndarray:
    """Decode a file to uint8 (h, w, 3) of the given `size` (h, w).

    The image is scaled until it just covers `size`; `crop` (y, x), each in [0, 1], says where along the slack of the
    longer side the window lies (0.5: centre). With the frame's fit "pad" it is scaled until it is just inside `size`,
    and nothing is cropped. Raises `BadImage`.
    """
    pad = frame.fit == "pad"

    def pixels(image: ImageFile.ImageFile) -> np.ndarray:
        turn = _orientation(image)
        h, w = size if turn < 5 else size[::-1]
        scale = (max if pad else min)(image.height / h, image.width / w)
        image.draft(None, (max(1, int(w * min(scale, REDUCING_GAP))), max(1, int(h * min(scale, REDUCING_GAP)))))
        rgb = to_rgb(image, colour_of(frame.ground))
        if turn in _TRANSPOSE:
            rgb = rgb.transpose(_TRANSPOSE[turn])
        return padded(rgb, size, colour_of(frame.ground)) if pad else fit(rgb, size, crop)

    return _opened(file, pixels)


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says."""
    turn = _orientation(image)
    return image.transpose(_TRANSPOSE[turn]) if turn in _TRANSPOSE else image


def to_rgb(image: Image.Image, ground: tuple[int, int, int] = WHITE) -> Image.Image:
    """Any mode that the three decoders yield -> 8-bit RGB; transparency is composited on `ground` (r, g, b)."""
    if image.mode.startswith("I"):  # I;16, or I holding 16-bit values
        wide = np.asarray(image).astype(np.int64)
        grey = (np.clip(wide, 0, 65535) * 255 + 32767) // 65535
        clear = image.info.get("transparency")
        rgb = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
        if isinstance(clear, int):
            rgb[wide == clear] = ground
        return Image.fromarray(rgb)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, ground), rgba).convert("RGB")
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


def padded(image: Image.Image, size: tuple[int, int], ground: tuple[int, int, int]) -> np.ndarray:
    """An RGB image -> uint8 (h, w, 3): all of it, antialiased, in the middle of `ground`."""
    h, w = size
    scale = max(image.height / h, image.width / w)  # source pixels per target pixel
    inner = max(1, round(image.height / scale)), max(1, round(image.width / scale))
    page = np.full((h, w, 3), ground, np.uint8)
    top, left = (h - inner[0]) // 2, (w - inner[1]) // 2
    page[top : top + inner[0], left : left + inner[1]] = np.asarray(
        image.resize(inner[::-1], Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
    )
    return page


def _opened(file: BinaryIO, use: Callable[[ImageFile.ImageFile], T]) -> T:
    """`use(image)` of the open image. Raises `BadImage`."""
    start = file.tell()
    head = file.read(HEAD)
    file.seek(start)
    with _as_bad_image(head):
        try:
            return use(_open(file))
        except ValueError:
            if format_of(head) != "PNG":
                raise
            file.seek(start)
            return use(_open(pixel_chunks(file)))


def _open(file: BinaryIO) -> ImageFile.ImageFile:
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    return image


def pixel_chunks(file: BinaryIO) -> BinaryIO:
    """A PNG without the chunks that its pixels do not depend on: text, colour profiles, animation.

    Pillow refuses a PNG with more than 1 MiB in one of them, against decompression bombs.
    """
    kept = [file.read(len(PNG_SIGNATURE))]
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[:4])
        if head[4:] in _PIXEL_CHUNKS:
            kept += [head, file.read(length + 4)]  # with its checksum
        else:
            file.seek(length + 4, io.SEEK_CUR)
    return io.BytesIO(b"".join(kept))


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
def _as_bad_image(head: bytes) -> Iterator[None]:
    """Turn a decoder's error into `BadImage`; an error of the machine (no memory, no file handles) stays. `head`: the
    file's first bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged EXIF and the like: either usable or an error below
        try:
            yield
        except (BadImage, MemoryError):
            raise
        except UnidentifiedImageError:
            raise BadImage(_unknown(head)) from None
        except Image.DecompressionBombError:
            raise BadImage(f"more than the limit of {MAX_PIXELS} pixels") from None
        except OSError as error:
            if error.errno in OUR_FAULT:
                raise
            raise BadImage(_one_line(error)) from error
        except (ValueError, TypeError, KeyError, IndexError, SyntaxError, AttributeError) as error:
            raise BadImage(_one_line(error)) from error
        except (EOFError, struct.error, zlib.error, OverflowError, RuntimeError) as error:
            raise BadImage(_one_line(error)) from error


def _unknown(head: bytes) -> str:
    """Why a file that no decoder knows is none of ours."""
    if not head:
        return "empty file"
    kind = format_of(head)
    if kind == "Git LFS pointer":
        return "a Git LFS pointer, not the file itself: run git lfs pull"
    if kind and kind not in DECODED:
        return f"a {kind} file, not a JPEG, PNG or WebP image"
    return "not a JPEG, PNG or WebP image, or its header is damaged"


def _one_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]* object at 0x[0-9a-f]+>", "file", text))[:200]
    return text[:1].lower() + text[1:]
