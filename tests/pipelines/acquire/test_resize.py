from __future__ import annotations

import io
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.acquire.resize import encode, fit, phash
from pipelines.recipe import ImageFormat

COMPARE = """
import sys, warnings, io
warnings.simplefilter("ignore")
import cv2, numpy as np
from img2dataset.resizer import Resizer
from pipelines.acquire.resize import fit
from pipelines.recipe import ImageFormat
random = np.random.default_rng(3)
for mode in ("border", "keep_ratio", "center_crop", "no"):
    for upscale in (False, True):
        theirs = Resizer(64, mode, not upscale, encode_format="png", encode_quality=1)
        for width, height in ((200, 100), (99, 301), (64, 64), (64, 90), (30, 50), (65, 64), (63, 127), (131, 77)):
            pixels = cv2.blur(random.integers(0, 256, (height, width, 3), np.uint8), (3, 3))
            png, w, h, *_ = theirs(io.BytesIO(cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()))
            want = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            ours = fit(pixels, ImageFormat(size_px=64, resize_mode=mode, upscale=upscale))
            assert ours.shape == want.shape, (mode, upscale, width, height, ours.shape, want.shape)
            assert np.array_equal(ours, want), (mode, upscale, width, height)
print("equal")
"""


def test_modes_are_those_of_img2dataset() -> None:
    """To the pixel. In a process of its own: its import takes long, and warns."""
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]


@settings(deadline=None)
@given(
    st.integers(2, 300), st.integers(2, 300), st.sampled_from(["border", "keep_ratio", "center_crop"]), st.booleans()
)
def test_sizes(width: int, height: int, mode: str, upscale: bool) -> None:
    form = ImageFormat(size_px=64, resize_mode=mode, upscale=upscale)
    found = fit(np.zeros((height, width, 3), np.uint8), form).shape[:2]
    side = max(width, height) if mode == "border" else min(width, height)
    if side <= 64 and not upscale:
        assert found == (height, width)
    elif mode == "keep_ratio":
        assert min(found) == 64
        assert abs(max(found) - 64 * max(width, height) / min(width, height)) <= 0.5
    else:
        assert found == (64, 64)


def test_shrinking_averages() -> None:
    """Fine stripes become grey; interpolation between neighbours would keep some of them."""
    stripes = np.tile(np.array([0, 255], np.uint8), (128, 64))[..., None].repeat(3, axis=2)
    found = fit(stripes, ImageFormat(size_px=64, resize_mode="border"))
    assert found.min() >= 127
    assert found.max() <= 128


@pytest.mark.parametrize(("kind", "quality"), [("png", 6), ("jpg", 95), ("webp", 90)])
def test_encoding_is_deterministic_and_right(kind: str, quality: int) -> None:
    pixels = cv2.blur(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), (9, 9))
    form = ImageFormat(size_px=64, encode_format=kind, encode_quality=quality)
    encoded = encode(pixels, form)
    assert encoded == encode(pixels.copy(), form)
    decoded = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    difference = np.abs(decoded.astype(int) - pixels).mean()
    assert difference == 0 if kind == "png" else difference < 6


def test_perceptual_hash_forgives_size_and_quality_only() -> None:
    def image(seed: int) -> np.ndarray:
        return cv2.resize(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8), (96, 96))

    def distance(a: int, b: int) -> int:
        return (a ^ b).bit_count()

    one = phash(image(1))
    assert one.bit_count() == 32
    assert distance(one, phash(cv2.resize(image(1), (64, 64), interpolation=cv2.INTER_AREA))) <= 4
    compressed = cv2.imdecode(cv2.imencode(".jpg", image(1), [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)
    assert distance(one, phash(compressed)) <= 6
    assert distance(one, phash(image(2))) > 12
