"""Bytes of an image to upright sRGB pixels, with nothing spent before the header says it is worth it.

`open_picture` reads the header alone: type, size, orientation. `Picture.pixels` decodes. In between, the caller may say
no. Only formats with a decoder that we name are opened at all.
"""

from __future__ import annotations

import contextlib
import functools
import io
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from pipelines.acquire.filter import too_many_pixels_message
from pipelines.acquire.sniff import HEAD_BYTES, SUPPORTED, sniff
from pipelines.dataset.ledger import Reason

Pixels = NDArray[np.uint8]
"""[height, width, 3], RGB, sRGB."""

ORIENTATION_TAG = 0x0112
SIDEWAYS = frozenset({5, 6, 7, 8})
DRAFT_MARGIN = 2.0
"""How much larger than needed a JPEG is decoded when the decoder itself scales down: it does so less well than we."""
PNG_BIT_DEPTH_OFFSET = 24
BROKEN_EXIF = (SyntaxError, struct.error, ValueError, TypeError, OSError)
"""What Pillow's reader raises: a header of no TIFF (SyntaxError), too short, values that don't fit their type, XMP."""

_FORMATS = {
    "image/jpeg": ("JPEG", "MPO"),
    "image/png": ("PNG",),
    "image/webp": ("WEBP",),
    "image/gif": ("GIF",),
    "image/bmp": ("BMP",),
    "image/avif": ("AVIF",),
}
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Undecodable(Exception):
    """The bytes are refused or can't be decoded; `reason` is the ledger's.

    `seen` is (MIME type, width, height, orientation), as `Picture` has them, where the header was read.
    """

    def __init__(self, reason: Reason, message: str, seen: tuple[str, int, int, int] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.seen = seen


@dataclass
class Picture:
    """An image whose header was read. `width` and `height` are as it is seen, after `orientation` (EXIF's, 1 to 8)."""

    mime: str
    width: int
    height: int
    orientation: int
    _data: bytes
    _image: Image.Image

    def pixels(self, needed_px: int | None = None) -> Pixels:
        """Decode: upright, sRGB, alpha laid onto white, 16 bits brought to 8, the first frame of an animation.

        `needed_px`: the shorter side need not be larger than this; a large JPEG is then decoded at 1/2, 1/4 or 1/8.
        Raises `Undecodable`.
        """
        try:
            with _quiet():
                return self._pixels(needed_px)
        except (Undecodable, MemoryError):
            raise
        except Exception as error:
            # Decoders raise whatever they come upon: OSError, SyntaxError, struct.error, ValueError, ...
            raise Undecodable(Reason.DECODE_ERROR, f"{type(error).__name__}: {error}") from error

    def _pixels(self, needed_px: int | None) -> Pixels:
        if self.mime == "image/png" and self._data[PNG_BIT_DEPTH_OFFSET] == 16:
            return _upright_array(_deep_png(self._data), self.orientation)
        image = self._image
        if needed_px is not None and self.mime == "image/jpeg":
            scale = min(1.0, DRAFT_MARGIN * needed_px / min(image.size))
            image.draft(None, (round(image.width * scale), round(image.height * scale)))
        image.load()
        image = _rgb(image)
        if self.orientation != 1:
            image = image.transpose(_TRANSPOSE[self.orientation])
        return np.asarray(image)


def open_picture(data: bytes, max_pixels: int) -> Picture:
    """Read the header of `data`.

    Raises `Undecodable`: not an image, a format without a decoder, a broken header, more than `max_pixels`.
    """
    mime = sniff(data[:HEAD_BYTES])
    if mime is None:
        raise Undecodable(Reason.NOT_AN_IMAGE, f"begins with {data[:16]!r}, as no image does")
    if mime not in SUPPORTED:
        raise Undecodable(Reason.UNSUPPORTED_FORMAT, f"{mime} is not decoded here")
    try:
        with _quiet():
            image = Image.open(io.BytesIO(data), formats=_FORMATS[mime])
            orientation = _orientation(image, mime)
    except Image.DecompressionBombError as error:
        raise Undecodable(Reason.TOO_MANY_PIXELS, str(error)) from error
    except UnidentifiedImageError as error:
        raise Undecodable(Reason.DECODE_ERROR, f"{mime} with a broken header") from error
    except Exception as error:
        raise Undecodable(Reason.DECODE_ERROR, f"{type(error).__name__}: {error}") from error
    width, height = image.size
    if orientation in SIDEWAYS:
        width, height = height, width
    if width * height > max_pixels:
        message = too_many_pixels_message(width, height, max_pixels)
        raise Undecodable(Reason.TOO_MANY_PIXELS, message, (mime, width, height, orientation))
    return Picture(mime, width, height, orientation, data, image)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of broken metadata, the daily bread here, and of sizes, which are judged by our own limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _orientation(image: Image.Image, mime: str) -> int:
    """1 where there is none, or one that can't be."""
    try:
        if mime == "image/png":  # its own `getexif` would decode the whole image
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
        else:
            exif = image.getexif()
        value = exif.get(ORIENTATION_TAG, 1)
    except BROKEN_EXIF:
        return 1  # as browsers take it; anything else that is raised counts as undecodable
    return value if value in _TRANSPOSE else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in {"I", "F"}:
        raise Undecodable(Reason.UNSUPPORTED_FORMAT, f"pixels of mode {image.mode} have no agreed range")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(_in_srgb(rgba.convert("RGB"), profile), mask=rgba.getchannel("A"))
        return white
    if image.mode in {"L", "CMYK", "RGB"}:
        return _in_srgb(image, profile)
    return _in_srgb(image.convert("RGB"), profile)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB; a profile that is broken or doesn't fit the image's mode is passed over, as browsers do."""
    if profile:
        try:
            transform = _to_srgb(profile, image.mode)
            if transform is not None:
                return ImageCms.applyTransform(image, transform) or image
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
    return image.convert("RGB")


@functools.lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None if the profile is sRGB's already, and for the profile of another kind of pixels."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}[mode]
    description = ImageCms.getProfileDescription(source)
    if source.profile.xcolor_space.strip() != space or description.startswith(("sRGB IEC61966", "sRGB built-in")):
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def _deep_png(data: bytes) -> Pixels:
    """A PNG of 16 bits a channel, as OpenCV decodes it without loss: each value divided by 257 and rounded."""
    deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if deep is None or deep.dtype != np.uint16:
        raise Undecodable(Reason.DECODE_ERROR, "a PNG of 16 bits that can't be decoded")
    values = (deep.astype(np.uint32) + 128) // 257
    if values.ndim == 2:
        values = np.repeat(values[..., None], 3, axis=2)
    color = values[..., 2::-1]
    if values.shape[2] == 4:
        alpha = values[..., 3:]
        color = (color * alpha + 255 * (255 - alpha) + 127) // 255
    return np.ascontiguousarray(color, dtype=np.uint8)


def _upright_array(pixels: Pixels, orientation: int) -> Pixels:
    if orientation == 1:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(_TRANSPOSE[orientation]))
