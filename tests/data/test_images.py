"""Decoding one image file: modes, orientation, geometry, and what is refused."""

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from pixelgrow.data import images
from pixelgrow.data.images import BadImage, fit, read_header, read_image

CORNERS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 220), "yellow": (230, 220, 20)}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def corners(w: int = 48, h: int = 32) -> Image.Image:
    """Red top left, green top right, blue bottom left, yellow bottom right."""
    image = Image.new("RGB", (w, h))
    for place, colour in enumerate(CORNERS.values()):
        x, y = place % 2 * w // 2, place // 2 * h // 2
        image.paste(colour, (x, y, x + w // 2, y + h // 2))
    return image


def corner_colours(pixels: np.ndarray) -> list[str]:
    names, values = list(CORNERS), np.array(list(CORNERS.values()))
    spots = [pixels[2, 2], pixels[2, -3], pixels[-3, 2], pixels[-3, -3]]
    return [names[int(np.abs(values - spot.astype(int)).sum(1).argmin())] for spot in spots]


def png16(pixels: np.ndarray, colour_type: int, extra: bytes = b"") -> io.BytesIO:
    """A 16-bit PNG, written by hand: Pillow writes only the grey ones. `pixels` (h, w, channels) uint16."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    h, w = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", w, h, 16, colour_type, 0, 0, 0)
    return io.BytesIO(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def trns(*values: int) -> bytes:
    data = b"tRNS" + struct.pack(f">{len(values)}H", *values)
    return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    upright = corners()
    undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)  # what a camera held so would have stored
    stored = upright.transpose(images._TRANSPOSE[undo]) if orientation > 1 else upright
    file = encoded(stored, kind, exif=exif.tobytes())
    assert read_header(file).size == (32, 48)
    assert corner_colours(read_image(file, (32, 48))) == list(CORNERS)


def test_orientation_from_xmp() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="3"/></x:xmpmeta>'
    file = encoded(corners(), "JPEG", xmp=xmp)
    assert corner_colours(read_image(file, (32, 48))) == list(CORNERS)[::-1]


@pytest.mark.parametrize(
    "junk", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9]
)
def test_damaged_exif_counts_as_upright(junk: bytes) -> None:
    file = encoded(corners(), "JPEG", exif=junk)
    assert read_header(file).size == (32, 48)
    assert corner_colours(read_image(file, (32, 48))) == list(CORNERS)


@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_orientation_out_of_range_counts_as_upright(value: int) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION] = value
    assert read_header(encoded(corners(), "JPEG", exif=exif.tobytes())).size == (32, 48)


def test_grey_and_bilevel() -> None:
    ramp = np.linspace(0, 255, 16 * 16).astype(np.uint8).reshape(16, 16)
    pixels = read_image(encoded(Image.fromarray(ramp)), (16, 16))
    assert (pixels == ramp[..., None]).all()
    pixels = read_image(encoded(Image.fromarray(ramp > 100)), (16, 16))
    assert (pixels == (ramp > 100)[..., None] * np.uint8(255)).all()


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    wide = np.array([[0, 128, 32768, 65535]], np.uint16).repeat(4, 0)
    pixels = read_image(encoded(Image.fromarray(wide)), (4, 4))
    assert pixels[0, :, 0].tolist() == [0, 0, 128, 255]


def test_16_bit_grey_with_a_transparent_value() -> None:
    wide = np.array([[0, 1000, 32768, 65535]], np.uint16).repeat(4, 0)[..., None]
    pixels = read_image(png16(wide, 0, trns(1000)), (4, 4))
    assert pixels[0, :, 0].tolist() == [0, 255, 128, 255]


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_and_alpha(colour_type: int, channels: int) -> None:
    wide = np.full((4, 4, channels), 0x8000, np.uint16)
    if colour_type != 2:
        wide[..., -1] = 0xFFFF
        wide[0, 0, -1] = 0
    pixels = read_image(png16(wide, colour_type), (4, 4))
    assert pixels[3, 3].tolist() == [128] * 3
    assert pixels[0, 0].tolist() == ([128] * 3 if colour_type == 2 else [255] * 3)


def test_cmyk() -> None:
    ink = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert np.abs(read_image(encoded(ink, "JPEG", quality=95), (16, 16)).astype(int) - (0, 255, 255)).max() < 12


def test_alpha_is_composited_on_white() -> None:
    rgba = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    rgba.paste((0, 0, 0, 0), (0, 0, 4, 8))
    rgba.paste((0, 0, 0, 128), (4, 0, 8, 4))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        pixels = read_image(encoded(rgba, kind, **options), (8, 8))
        assert pixels[6, 1].tolist() == [255] * 3
        assert pixels[6, 6].tolist() == [200, 0, 0]
        assert np.abs(pixels[1, 6].astype(int) - 127).max() <= 1


def test_palette_with_and_without_transparency() -> None:
    palette = corners().quantize(4)
    assert corner_colours(read_image(encoded(palette), (32, 48))) == list(CORNERS)
    clear = palette.getpixel((0, 0))
    assert read_image(encoded(palette, transparency=clear), (32, 48))[0, 0].tolist() == [255] * 3
    levels = bytes(0 if i == clear else 255 for i in range(4))
    assert read_image(encoded(palette, transparency=levels), (32, 48))[0, 0].tolist() == [255] * 3


def test_a_transparent_colour_without_alpha() -> None:
    for mode, clear in (("L", 7), ("RGB", (7, 7, 7))):
        pixels = read_image(encoded(Image.new(mode, (8, 8), clear), transparency=clear), (8, 8))
        assert (pixels == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue", "green")]
    file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    assert read_image(file, (16, 16))[8, 8].tolist() == [255, 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.floats(0, 1))
def test_any_size_fits(h: int, w: int, th: int, tw: int, y: float, x: float) -> None:
    image = Image.new("RGB", (w, h), (10, 200, 30))
    for kind in ("PNG", "JPEG"):
        pixels = read_image(encoded(image, kind), (th, tw), (y, x))
        assert pixels.shape == (th, tw, 3)
        assert pixels.dtype == np.uint8
        assert np.abs(pixels.astype(int) - (10, 200, 30)).max() < 9


def test_the_crop_moves_along_the_longer_side_only() -> None:
    image = corners(96, 32)
    left, right = (fit(image, (32, 32), (0.5, x)) for x in (0.0, 1.0))
    assert corner_colours(left) == ["red", "red", "blue", "blue"]
    assert corner_colours(right) == ["green", "green", "yellow", "yellow"]
    assert (fit(image, (32, 32), (0.0, 0.3)) == fit(image, (32, 32), (1.0, 0.3))).all()
    assert (fit(image, (32, 32), (0.0, 0.0)) == np.asarray(image)[:, :32]).all()


def test_crop_and_resize_in_one_are_resize_then_crop() -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (120, 240, 3), dtype=np.uint8))
    whole = np.asarray(noise.resize((80, 40), Image.Resampling.LANCZOS)).astype(int)
    for offset in (0, 7, 40):
        assert np.abs(fit(noise, (40, 40), (0.5, offset / 40)) - whole[:, offset : offset + 40]).max() <= 1


def test_downscaling_is_antialiased() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    for kind in ("PNG", "JPEG"):
        pixels = read_image(encoded(Image.fromarray(stripes), kind), (32, 32)).astype(int)
        assert np.abs(pixels - 127).max() < 8


def test_a_reduced_jpeg_is_nearly_the_full_one() -> None:
    y, x = np.mgrid[0:480, 0:640]
    waves = (127 + 60 * np.sin(x / 23) + 60 * np.cos((x + 2 * y) / 31)).astype(np.uint8)
    image = Image.fromarray(np.stack([waves, waves.T[:480, :480].repeat(2, 1)[:, :640], 255 - waves], -1))
    file = encoded(image, "JPEG", quality=95)
    full = fit(Image.open(file).convert("RGB"), (64, 64)).astype(int)
    assert np.abs(read_image(file, (64, 64)) - full).mean() < 1.0


def test_other_formats_are_refused_by_their_names() -> None:
    for kind in ("GIF", "BMP", "TIFF"):
        with pytest.raises(BadImage, match=f"^a {kind} file, not a JPEG, PNG or WebP image$"):
            read_header(encoded(corners(), kind))
    for kind in ("PPM", "ICO"):
        with pytest.raises(BadImage, match=r"^not a JPEG, PNG or WebP image, or its header is damaged$"):
            read_header(encoded(corners(), kind))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer, .*: run git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "a HTML file, not"),
        (b"\0\0\0\x1cftypavif" + bytes(40), "a AVIF file, not"),
        (b"\xff\xd8\xff\xe0", "not a JPEG, PNG or WebP image, or its header is damaged"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        read_header(io.BytesIO(data))


def test_a_transparent_image_is_known_by_its_header() -> None:
    grey = Image.new("L", (8, 8))
    clear = [encoded(Image.new(mode, (8, 8))) for mode in ("RGBA", "LA")]
    clear += [encoded(grey, transparency=7), encoded(corners().quantize(4), transparency=1)]
    clear += [encoded(Image.new("RGBA", (8, 8)), "WEBP")]
    opaque = [encoded(grey), encoded(corners()), encoded(corners(), "JPEG"), encoded(corners(), "WEBP")]
    assert [read_header(file).transparent for file in clear + opaque] == [True] * len(clear) + [False] * len(opaque)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncation_at_any_place_is_bad(kind: str) -> None:
    rng = np.random.default_rng(1)
    whole = encoded(Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)), kind).getvalue()
    for cut in [0, 1, 10, *range(20, len(whole) - 16, max(1, len(whole) // 25))]:
        with pytest.raises(BadImage) as caught:
            read_image(io.BytesIO(whole[:cut]), (16, 16))
        assert "\n" not in caught.value.reason
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP"]), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8)
)
def test_a_damaged_file_is_an_image_or_bad(kind: str, damage: list[tuple[float, int]]) -> None:
    data = bytearray(encoded(corners(), kind).getvalue())
    for place, value in damage:
        data[int(place * len(data))] = value
    with contextlib.suppress(BadImage):
        assert read_image(io.BytesIO(data), (8, 8)).shape == (8, 8, 3)


def header_only(w: int, h: int) -> io.BytesIO:
    file = png16(np.zeros((1, 1, 3), np.uint16), 2).getvalue()
    header = b"IHDR" + struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)
    return io.BytesIO(file[:12] + header + struct.pack(">I", zlib.crc32(header)) + file[33:])


@pytest.mark.parametrize("side", [9460, 14000, 65000, 2**31 - 1])
def test_bombs_are_bad_at_any_limit_of_pillow(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (Image.MAX_IMAGE_PIXELS, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadImage, match=r"^more than the limit of 89478485 pixels$"):
            read_header(header_only(side, side))
    assert images.MAX_PIXELS == 89_478_485


def with_chunk(png: bytes, name: bytes, data: bytes, at: int) -> io.BytesIO:
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return io.BytesIO(png[:at] + chunk + png[at:])


@pytest.mark.parametrize("where", ["before", "behind"])
@pytest.mark.parametrize(
    ("name", "head"), [(b"zTXt", b"Comment\0\0"), (b"iTXt", b"Comment\0\1\0\0\0"), (b"iCCP", b"profile\0\0")]
)
def test_a_png_with_much_metadata_is_decoded_without_it(name: bytes, head: bytes, where: str) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    stored = encoded(corners().transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes()).getvalue()
    file = with_chunk(
        stored, name, head + zlib.compress(b"x" * 5_000_000), 33 if where == "before" else len(stored) - 12
    )
    assert read_header(file).size == (32, 48)
    file.seek(0)
    assert corner_colours(read_image(file, (32, 48))) == list(CORNERS)


def test_metadata_does_not_hide_damage() -> None:
    stored = encoded(corners()).getvalue()
    bomb = zlib.compress(b"x" * 5_000_000)
    file = with_chunk(stored[:-30], b"zTXt", b"a\0\0" + bomb, 33)
    with pytest.raises(BadImage):
        read_image(file, (8, 8))
    with pytest.raises(BadImage, match=r"more than the limit of 89478485 pixels"):
        read_image(with_chunk(header_only(60_000, 60_000).getvalue(), b"zTXt", b"a\0\0" + bomb, 33), (8, 8))


def test_out_of_memory_is_not_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image, ground: tuple[int, int, int]) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(images, "to_rgb", fail)
    with pytest.raises(MemoryError):
        read_image(encoded(corners()), (8, 8))


def test_no_warning_escapes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(encoded(corners().quantize(4), transparency=b"\0\xff\xff\xff"), (8, 8))
        read_header(encoded(corners(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"))
