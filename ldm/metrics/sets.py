"""Features of a set of images: what may be measured, and samples of sets too large to keep."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import InputError

_Part = tuple[NDArray[np.int64], Tensor]
"""Keys and features of some images."""


class FeatureSample:
    """A uniform sample of `capacity` images' features, in memory that doesn't grow with the number of images.

    Every image has a key, a number that no other image of the set has: its row, say. It is kept if its rank, a hash of
    key and seed, is among the lowest `capacity` (bottom-k sampling, Cohen & Kaplan 2007). So the sample depends on
    which images were seen, and not on their order, the batches or the worker that saw them, and samples merge. A set of
    up to `capacity` images is kept whole.

    For the figures that have no sums to be gathered in: kernel distances, precision and recall.
    """

    def __init__(self, width: int, capacity: int, *, seed: int) -> None:
        """Raises `InputError` for a capacity below 2."""
        if capacity < 2:
            raise InputError(f"a sample of {capacity} images: must be two at least")
        self.width, self.capacity, self.seed = width, capacity, seed
        self.count = 0
        """Images seen, kept or not."""
        self._kept: _Part = (np.zeros(0, np.int64), torch.zeros(0, width))
        self._new: list[_Part] = []

    def add(self, features_ND: Tensor, keys: NDArray[np.int64]) -> None:
        """Float32 features of `keys`' images, int64 [N].

        Raises `InputError` for another width or number of keys, values that are not numbers, or, now or when the sample
        is read, for the key of an image that is in the sample already.
        """
        features = checked(features_ND, torch.float32)
        if features.shape != (len(keys), self.width):
            raise InputError(f"features {tuple(features.shape)} of {len(keys)} keys: must be [keys, {self.width}]")
        self._append(np.array(keys, np.int64), features, len(keys))

    def merge(self, other: FeatureSample) -> None:
        """As if what the other has seen had been added here. Raises `InputError` for another width, capacity or seed,
        or an image that both have."""
        settings = [(one.width, one.capacity, one.seed) for one in (self, other)]
        if settings[0] != settings[1]:
            raise InputError(f"samples of (width, capacity, seed) {settings[0]} and {settings[1]}: must be equal")
        self._append(*other._sample(), other.count)

    @property
    def keys(self) -> NDArray[np.int64]:
        """Of the images in the sample, int64, by rank."""
        return self._sample()[0]

    @property
    def features(self) -> Tensor:
        """Float32 [images, width], by rank: the first few rows are a uniform sample too. Not to be written to."""
        return self._sample()[1]

    def _append(self, keys: NDArray[np.int64], features: Tensor, count: int) -> None:
        self._new.append((keys, features))
        self.count += count
        if sum(len(part) for part, _ in self._new) >= self.capacity:
            self._sample()

    def _sample(self) -> _Part:
        if self._new:
            parts = [self._kept, *self._new]
            keys = np.concatenate([part for part, _ in parts])
            order = np.argsort(_ranks(keys, self.seed))
            if (np.diff(keys[order]) == 0).any():  # ranks are one to one: equal keys stand side by side
                raise InputError("an image's key is there twice: give every image of the set its own")
            lowest = order[: self.capacity]
            self._kept = (keys[lowest], torch.cat([part for _, part in parts])[torch.from_numpy(lowest)])
            self._new = []
        return self._kept


def checked(features_ND: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """On the CPU. Raises `InputError` for another shape or values that are not numbers."""
    result = matrix(features_ND).to(dtype)
    check_finite(result)
    return result


def matrix(features_ND: Tensor) -> Tensor:
    """On the CPU. Raises `InputError` for another shape."""
    if features_ND.ndim != 2:
        raise InputError(f"features are {tuple(features_ND.shape)}: must be [images, width]")
    return features_ND.detach().cpu()


def check_finite(features: Tensor) -> None:
    """Raises `InputError`."""
    if not bool(features.isfinite().all()):
        raise InputError("features have values that are not numbers: look at the images they are of")


def checked_pair(x_ND: Tensor, y_MD: Tensor) -> tuple[Tensor, Tensor]:
    """In float64 on the CPU. Raises `InputError` as `checked`, for differing widths, or fewer than two images."""
    x, y = checked(x_ND), checked(y_MD)
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise InputError(f"features are {tuple(x.shape)} and {tuple(y.shape)}: must be of one width, two at least")
    return x, y


def _ranks(keys: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014), which maps 64 bits one to one."""
    offset = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    value = keys.astype(np.uint64) ^ np.uint64(offset)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
