"""Pixels to the stored image: fitted into a size, encoded, fingerprinted. Deterministic to the byte.

The meanings of the resize modes, and their rounding, are img2dataset's.
"""

from __future__ import annotations

import cv2
import numpy as np

from pipelines.acquire.decode import Pixels
from pipelines.recipe import ImageFormat

WHITE = (255, 255, 255)
PHASH_SIDE_PX = 32
PHASH_FREQUENCIES = 8


def fit(pixels: Pixels, form: ImageFormat) -> Pixels:
    """Resize to `form.size_px`.

    keep_ratio: the shorter side gets that size. center_crop: so, and the middle square is cut out. border: the longer
    side gets that size, and white is added to a square. no: as it is. An image that is not larger stays as it is in
    every mode, unless `form.upscale`.
    """
    height, width = pixels.shape[:2]
    if form.resize_mode == "no":
        return pixels
    side = max(height, width) if form.resize_mode == "border" else min(height, width)
    if side <= form.size_px and not form.upscale:
        return pixels
    if side != form.size_px:
        scale = form.size_px / side
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LANCZOS4
        size = (max(1, _rounded(width * scale)), max(1, _rounded(height * scale)))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=interpolation), dtype=np.uint8)
    if form.resize_mode == "center_crop":
        return _middle(pixels, form.size_px)
    return _padded(pixels, form.size_px) if form.resize_mode == "border" else pixels


def encode(pixels: Pixels, form: ImageFormat) -> bytes:
    """The image as JPEG or WebP of a quality, or as PNG of a compression level. Raises `ValueError` if the encoder
    refuses."""
    parameter = {"jpg": cv2.IMWRITE_JPEG_QUALITY, "png": cv2.IMWRITE_PNG_COMPRESSION, "webp": cv2.IMWRITE_WEBP_QUALITY}
    settings = [int(parameter[form.encode_format]), form.encode_quality]
    done, encoded = cv2.imencode(f".{form.encode_format}", pixels[..., ::-1], settings)
    if not done:
        raise ValueError(f"a {pixels.shape[1]}x{pixels.shape[0]} image can't be encoded as {form.encode_format}")
    return encoded.tobytes()


def phash(pixels: Pixels) -> int:
    """64-bit perceptual hash: which of the 8x8 lowest DCT frequencies of the grey 32x32 image exceed their median."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (PHASH_SIDE_PX, PHASH_SIDE_PX), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[:PHASH_FREQUENCIES, :PHASH_FREQUENCIES]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def _rounded(value: float) -> int:
    """Halves away from zero."""
    return int(value + 0.5)


def _middle(pixels: Pixels, size_px: int) -> Pixels:
    top, left = (pixels.shape[0] - size_px) // 2, (pixels.shape[1] - size_px) // 2
    return np.ascontiguousarray(pixels[top : top + size_px, left : left + size_px])


def _padded(pixels: Pixels, size_px: int) -> Pixels:
    free_rows, free_columns = size_px - pixels.shape[0], size_px - pixels.shape[1]
    top, left = free_rows // 2, free_columns // 2
    border = (top, free_rows - top, left, free_columns - left)
    return np.asarray(cv2.copyMakeBorder(pixels, *border, cv2.BORDER_CONSTANT, value=WHITE), dtype=np.uint8)
