from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipelines.acquire.decode import Undecodable, open_picture
from pipelines.acquire.sniff import sniff
from pipelines.dataset.ledger import Reason
from pipelines.gallery.server import bomb_png

MAX_PIXELS = 1_000_000
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return open_picture(data, MAX_PIXELS).pixels()


def quarters(width: int = 24, height: int = 16) -> Image.Image:
    """Red, green over blue, white: each orientation looks different."""
    image = Image.new("RGB", (width, height), WHITE)
    for place, color in (((0, 0), RED), ((width // 2, 0), GREEN), ((0, height // 2), BLUE)):
        image.paste(color, (*place, place[0] + width // 2, place[1] + height // 2))
    return image


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF"])
def test_formats(kind: str) -> None:
    options = {"quality": 100} if kind in {"JPEG", "AVIF"} else {"lossless": True} if kind == "WEBP" else {}
    picture = open_picture(saved(quarters(), kind, **options), MAX_PIXELS)
    assert (picture.mime, picture.width, picture.height) == (f"image/{kind.lower()}", 24, 16)
    found = picture.pixels()
    assert (found.shape, found.dtype) == ((16, 24, 3), np.uint8)
    assert np.abs(found[2, 2].astype(int) - RED).max() < 12
    assert np.abs(found[13, 21].astype(int) - WHITE).max() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_comes_before_anything_else(kind: str, orientation: int) -> None:
    upright = quarters()
    lies = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[kind]
    picture = open_picture(saved(lies[orientation](upright), kind, exif=exif, **options), MAX_PIXELS)
    assert (picture.width, picture.height, picture.orientation) == (24, 16, orientation)
    assert np.abs(picture.pixels().astype(int) - np.asarray(upright)).max() < 12


def test_an_orientation_that_cannot_be_is_none() -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    assert open_picture(saved(quarters(), "JPEG", exif=exif), MAX_PIXELS).orientation == 1
    broken = open_picture(saved(quarters(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), MAX_PIXELS)
    assert (broken.orientation, broken.pixels().shape) == (1, (16, 24, 3))


@settings(deadline=None)
@given(st.integers(0, 65535), st.integers(0, 65535))
def test_sixteen_bits_are_divided_by_257(red: int, grey: int) -> None:
    color = np.zeros((2, 3, 3), np.uint16)
    color[..., 2] = red  # OpenCV's order
    done, encoded = cv2.imencode(".png", color)
    assert done
    assert pixels(encoded.tobytes())[0, 0].tolist() == [round(red / 257), 0, 0]
    done, encoded = cv2.imencode(".png", np.full((2, 3), grey, np.uint16))
    assert pixels(encoded.tobytes())[1, 2].tolist() == [round(grey / 257)] * 3


def test_sixteen_bits_with_alpha_and_orientation() -> None:
    deep = np.zeros((4, 6, 4), np.uint16)
    deep[..., 2] = 65535
    deep[..., 3] = 32768
    assert pixels(cv2.imencode(".png", deep)[1].tobytes())[0, 0].tolist() == [255, 127, 127]


def test_alpha_lies_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 255, 255))
    image.putpixel((2, 2), (0, 0, 255, 128))
    found = pixels(saved(image))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[1, 1].tolist() == [0, 0, 255]
    assert found[2, 2].tolist() == [127, 127, 255]


def test_palettes_with_transparency_as_emoji_have_them() -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255, 0, 255, 0])
    palette.putpixel((1, 1), 1)
    found = pixels(saved(palette, transparency=bytes([0, 255, 255])))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[1, 1].tolist() == [0, 0, 255]
    assert pixels(saved(palette))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_becomes_rgb(mode: str) -> None:
    found = pixels(saved(Image.new("L", (5, 4), 255).convert(mode)))
    assert (found.shape, found.min()) == ((4, 5, 3), 255)


def test_cmyk_becomes_rgb() -> None:
    found = pixels(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(found[4, 4].astype(int) - RED).max() < 12


def test_colour_profiles_are_converted_to_srgb() -> None:
    """A profile whose red and green are swapped swaps them."""
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    at = {name: swapped.index(name) for name in (b"rXYZ", b"gXYZ")}
    tags = bytearray(swapped)
    tags[at[b"rXYZ"] : at[b"rXYZ"] + 4], tags[at[b"gXYZ"] : at[b"gXYZ"] + 4] = b"gXYZ", b"rXYZ"
    described = bytes(tags).replace("sRGB built-in".encode("utf-16-be"), "swap built-in".encode("utf-16-be"))
    found = pixels(saved(quarters(), icc_profile=described))
    assert np.abs(found[2, 2].astype(int) - GREEN).max() < 3
    assert np.abs(found[2, 20].astype(int) - RED).max() < 3
    alpha = quarters().convert("RGBA")
    alpha.putalpha(Image.new("L", alpha.size, 255))
    assert np.array_equal(pixels(saved(alpha, icc_profile=described)), found)


def test_broken_and_misplaced_profiles_are_passed_over() -> None:
    plain = np.asarray(quarters())
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels(saved(quarters(), icc_profile=b"no profile")), plain)
    assert np.array_equal(pixels(saved(quarters(), icc_profile=srgb)), plain)
    assert pixels(saved(Image.new("L", (4, 4), 200), icc_profile=srgb))[0, 0].tolist() == [200] * 3


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    for kind in ("GIF", "WEBP", "PNG"):
        found = pixels(saved(frames[0], kind, save_all=True, append_images=frames[1:], **{"duration": 50}))
        assert np.abs(found[4, 4].astype(int) - RED).max() < 12, kind


def test_large_jpegs_are_decoded_smaller_but_large_enough() -> None:
    picture = open_picture(saved(quarters(800, 600), "JPEG", quality=95), MAX_PIXELS)
    found = picture.pixels(needed_px=64)
    assert (picture.width, picture.height) == (800, 600)
    assert 128 <= min(found.shape[:2]) < 300
    assert np.abs(found[5, 5].astype(int) - RED).max() < 12


def test_a_bomb_is_refused_before_it_costs_memory() -> None:
    """In a process of its own, whose peak memory tells."""
    script = """
import resource, sys
from pipelines.acquire.decode import Undecodable, open_picture
from pipelines.gallery.server import bomb_png
bomb = bomb_png()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for limit in (50_000_000, 899_999_999):
    try:
        open_picture(bomb, limit)
    except Undecodable as error:
        assert error.reason == "too_many_pixels", error.reason
    else:
        sys.exit("opened")
print(len(bomb), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    size_bytes, grown_kib = map(int, done.stdout.split())
    assert size_bytes < 1_000_000
    assert grown_kib < 20_000


@pytest.mark.parametrize("limit", [383, 384])
def test_the_limit_of_pixels_is_exact(limit: int) -> None:
    if limit == 384:
        assert open_picture(saved(quarters()), limit).pixels().shape == (16, 24, 3)
        return
    with pytest.raises(Undecodable, match="24x16 is more than the 383 pixels") as caught:
        open_picture(saved(quarters()), limit)
    assert caught.value.reason is Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<!DOCTYPE html><html>", Reason.NOT_AN_IMAGE),
        (b"", Reason.NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0", Reason.NOT_AN_IMAGE),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", Reason.UNSUPPORTED_FORMAT),
        (saved(quarters(), "TIFF"), Reason.UNSUPPORTED_FORMAT),
        (saved(quarters())[:20], Reason.DECODE_ERROR),
        (saved(quarters())[:60], Reason.DECODE_ERROR),
        (saved(quarters(400, 400), "JPEG", quality=99)[:2000], Reason.DECODE_ERROR),
        (b"\xff\xd8\xff" + b"\0" * 100, Reason.DECODE_ERROR),
        (b"GIF89a" + b"\0" * 100, Reason.DECODE_ERROR),
    ],
)
def test_what_cannot_be_decoded_says_why(data: bytes, reason: Reason) -> None:
    with pytest.raises(Undecodable) as caught:
        pixels(data)
    assert caught.value.reason is reason


def test_a_cut_sixteen_bit_png_is_refused() -> None:
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(Undecodable) as caught:
        pixels(b"\x89PNG\r\n\x1a\n" + chunk)
    assert caught.value.reason is Reason.DECODE_ERROR


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP"]), st.integers(0, 400))
def test_damage_raises_nothing_else(damage: bytes, kind: str, at: int) -> None:
    data = saved(quarters(), kind)
    damaged = data[:at] + damage + data[at + len(damage) :]
    try:
        found = pixels(damaged)
    except Undecodable:
        return
    assert found.dtype == np.uint8
    assert found.ndim == 3


def test_sniffing_looks_at_bytes_alone() -> None:
    assert sniff(bomb_png()[:32]) == "image/png"
    assert sniff(b"RIFF\0\0\0\0WAVEfmt ") is None
    assert sniff(b"\0\0\0\x20ftypheic") == "image/heic"
    assert sniff(b"\0\0\0\x20ftypmp42") is None
