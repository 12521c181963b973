"""What near-duplicates are found by: a perceptual hash, and a thumbnail that tells hashes apart that meet by chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.dataset.scores import Identity
from pipelines.score.scorer import Pixels

SIDE, LOW = 32, 8
THUMBNAIL_SIDE = 8
THUMBNAIL_BYTES = THUMBNAIL_SIDE * THUMBNAIL_SIDE * 3


class PerceptualHash:
    """Columns `phash` and `thumbnail` of each image."""

    identity = Identity(model="dct phash 32/8", version="1", sha256="")
    reads_captions = False
    fields = (
        pa.field("phash", pa.uint64(), nullable=False),
        pa.field("thumbnail", pa.binary(THUMBNAIL_BYTES), nullable=False),
    )

    def __call__(self, images: Sequence[Pixels], _captions: Sequence[str]) -> Mapping[str, Any]:
        return {
            "phash": np.array([phash(image) for image in images], np.uint64),
            "thumbnail": [thumbnail(image).tobytes() for image in images],
        }


def phash(image: Pixels) -> int:
    """64 bits of an RGB image [h, w, 3], after Zauner 2010 ("Implementation and benchmarking of perceptual image hash
    functions", section 3.2.1): which low frequencies of the image are above their median.

    Luma, averaged to 32x32; its DCT-II; of that the 8x8 coefficients of the frequencies 1 to 8 in both directions,
    which leaves the mean out. Row by row, a bit is set where a coefficient is greater than the median of the 64; the
    first is the highest bit. Coefficients are rounded to 1/1000 of a grey level first, so that an image without texture
    has the hash 0 rather than a random one. How alike two images are is the number of bits in which they differ.
    """
    import cv2

    luma = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    basis = _basis()
    coefficients = np.round(basis @ luma.astype(np.float64) @ basis.T, 3)
    bits = coefficients > np.median(coefficients)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def thumbnail(image: Pixels) -> Pixels:
    """uint8 RGB [8, 8, 3]: the averages of 8x8 equal parts of the image."""
    import cv2

    small = cv2.resize(image, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(small, np.uint8)


@cache
def _basis() -> NDArray[np.float64]:
    """Rows 1 to 8 of the orthonormal DCT-II of 32 values: [8, 32]."""
    frequency, place = np.arange(1, LOW + 1)[:, None], np.arange(SIDE)[None]
    waves: NDArray[np.float64] = np.sqrt(2 / SIDE) * np.cos(np.pi * (2 * place + 1) * frequency / (2 * SIDE))
    return waves
