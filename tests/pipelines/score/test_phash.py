"""The perceptual hash against another implementation, and what it is for: alike images are near, others far."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import scipy.fft
from numpy.typing import NDArray

from pipelines.score.phash import PerceptualHash, phash, thumbnail

Pixels = NDArray[np.uint8]
NEAR_BITS = 4


def scene(number: int, side: int = 96) -> Pixels:
    """Discs and bars of chance, softly lit: the spectrum of pictures rather than of noise."""
    random = np.random.default_rng(number)
    image = np.full((side, side, 3), random.integers(60, 200, 3), np.uint8)
    for _ in range(6):
        place, colour = random.integers(0, side, 2).tolist(), random.integers(0, 256, 3).tolist()
        cv2.circle(image, place, int(random.integers(side // 12, side // 3)), colour, -1)
    light = np.linspace(0.6, 1.0, side)[:, None, None]
    return (cv2.GaussianBlur(image, (5, 5), 0) * light).astype(np.uint8)


def bits_apart(a: Pixels, b: Pixels) -> int:
    return (phash(a) ^ phash(b)).bit_count()


def test_hash_is_that_of_another_transform() -> None:
    for number in range(20):
        luma = cv2.cvtColor(scene(number), cv2.COLOR_RGB2GRAY)
        small = luma.reshape(32, 3, 32, 3).mean(axis=(1, 3))  # 96 = 32 x 3: the average is exact but for rounding
        low = scipy.fft.dctn(small, norm="ortho")[1:9, 1:9].flatten()
        expected = "".join("1" if value else "0" for value in low > np.median(low))
        assert f"{phash(scene(number)):064b}".count("1") == 32
        differing = [
            at for at, (a, b) in enumerate(zip(f"{phash(scene(number)):064b}", expected, strict=True)) if a != b
        ]
        assert all(abs(low[at] - np.median(low)) < 1 for at in differing)  # half a grey level of rounding, no more
        assert len(differing) <= 2


def test_recompression_size_and_light_change_few_bits() -> None:
    for number in range(20):
        image = scene(number)
        _, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])
        variants = {
            "jpeg": np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), np.uint8),
            "half": cv2.resize(image, (48, 48), interpolation=cv2.INTER_AREA),
            "double": cv2.resize(image, (192, 192), interpolation=cv2.INTER_CUBIC),
            "darker": (image * 0.8).astype(np.uint8),
        }
        for name, variant in variants.items():
            assert bits_apart(image, variant) <= NEAR_BITS, (number, name)


def test_different_images_are_far_apart() -> None:
    hashes = [phash(scene(number)) for number in range(40)]
    apart = [(a ^ b).bit_count() for at, a in enumerate(hashes) for b in hashes[:at]]
    assert min(apart) > 2 * NEAR_BITS
    assert 24 < np.mean(apart) < 36
    assert bits_apart(scene(0), scene(0)[:, ::-1]) > 16, "a mirrored image is another one"


@pytest.mark.parametrize("shape", [(5, 5), (32, 32), (64, 48), (500, 333)])
def test_an_image_without_texture_has_the_hash_0(shape: tuple[int, int]) -> None:
    for level in (0, 17, 128, 255):
        assert phash(np.full((*shape, 3), level, np.uint8)) == 0


def test_thumbnail_is_the_mean_of_equal_parts() -> None:
    image = scene(3)
    expected = image.reshape(8, 12, 8, 12, 3).mean(axis=(1, 3))
    assert np.abs(thumbnail(image) - expected).max() <= 0.51
    assert thumbnail(image).shape == (8, 8, 3)


def test_columns_hold_the_values_of_each_image() -> None:
    images = [scene(1), scene(2, 80)]
    columns = PerceptualHash()(images, ["a", "b"])
    assert columns["phash"].tolist() == [phash(image) for image in images]
    assert [np.frombuffer(data, np.uint8).reshape(8, 8, 3).tolist() for data in columns["thumbnail"]] == [
        thumbnail(image).tolist() for image in images
    ]
