"""Features of a set of images: what may be measured, and samples of sets too large to keep."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import InputError

LARGEST = torch.finfo(torch.float32).max
"""Largest of a feature's values, in whatever type: products of six of them, which kernel distances sum, are far from
the end of float64."""
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
        """Raises `InputError` for a width below 1, a capacity below 2, or a seed below 0."""
        if width < 1 or capacity < 2:
            raise InputError(f"a sample of {capacity} images, of width {width}: must be two at least, of 1 at least")
        check_seed(seed)
        self.width, self.capacity, self.seed = width, capacity, seed
        self.count = 0
        """Images seen, kept or not."""
        self._kept: _Part = (np.zeros(0, np.int64), torch.zeros(0, width))
        self._new: list[_Part] = []

    def add(self, features_ND: Tensor, keys: NDArray[np.int64]) -> None:
        """Float32 features of `keys`' images, int64 [N].

        Raises `InputError` for another width or number of keys, values that are not numbers, keys that are not whole
        numbers, or, now or when the sample is read, for the key of an image that is in the sample already.
        """
        keys = np.asarray(keys)
        if keys.ndim != 1 or (len(keys) and not np.can_cast(keys.dtype, np.int64)):
            raise InputError(f"keys are {keys.dtype} {keys.shape}: must be int64, one an image")
        features = checked(features_ND, dtype=torch.float32)
        if features.shape != (len(keys), self.width):
            raise InputError(f"features {tuple(features.shape)} of {len(keys)} keys: must be [keys, {self.width}]")
        self._append(np.array(keys, np.int64), features, len(keys))

    def merge(self, other: FeatureSample) -> None:
        """Take over what the other has seen, as if it had been added here. Raises `InputError` for another width,
        capacity or seed, or an image that both have."""
        settings = [(one.width, one.capacity, one.seed) for one in (self, other)]
        if settings[0] != settings[1]:
            raise InputError(f"samples of (width, capacity, seed) {settings[0]} and {settings[1]}: must be equal")
        self._append(*other._sample(), other.count)

    @property
    def keys(self) -> NDArray[np.int64]:
        """Keys of the images in the sample, int64, by rank."""
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


def checked(features_ND: Tensor, what: str = "features", dtype: torch.dtype = torch.float64) -> Tensor:
    """The features on the CPU. Raises `InputError` as `matrix` and `check_numbers`, which say `what` it is of."""
    features = matrix(features_ND, what)
    check_numbers(features, what)
    return features.to(dtype)


def matrix(features_ND: Tensor, what: str = "features") -> Tensor:
    """The features on the CPU; whole numbers as float64. Raises `InputError` for another type or shape, or no width."""
    if not isinstance(features_ND, Tensor) or features_ND.is_complex():
        kind = features_ND.dtype if isinstance(features_ND, Tensor) else type(features_ND).__name__
        raise InputError(f"{what} are {kind}: must be a torch.Tensor of real numbers")
    if features_ND.ndim != 2 or features_ND.shape[1] == 0:
        raise InputError(f"{what} are {tuple(features_ND.shape)}: must be [images, width], of a width of 1 at least")
    features = features_ND.detach().cpu()
    return features if features.is_floating_point() else features.double()


def check_numbers(features_ND: Tensor, what: str = "features") -> None:
    """Raises `InputError` for values that are not numbers or beyond `LARGEST`, with the first row that has one."""
    if not features_ND.numel():
        return
    low, high = torch.aminmax(features_ND)  # a tenth of the time of `isfinite`; NaN where there is one
    if float(low) >= -LARGEST and float(high) <= LARGEST:
        return
    odd = ~(features_ND.abs() <= LARGEST)
    row = int(odd.any(dim=1).nonzero()[0])
    value = float(features_ND[row][odd[row]][0])
    if math.isfinite(value):
        raise InputError(f"{what} have {value:g} in row {row}: must be {LARGEST:.2g} at most, or sums would overflow")
    raise InputError(f"{what} have values that are not numbers, {value} in row {row}: look at the image it is of")


def checked_pair(
    x_ND: Tensor, y_MD: Tensor, names: tuple[str, str] = ("features of the first set", "features of the second set")
) -> tuple[Tensor, Tensor]:
    """Both sets in float64 on the CPU. Raises `InputError` as `checked`, for differing widths, or fewer than two
    images."""
    x, y = (checked(features, what) for features, what in zip((x_ND, y_MD), names, strict=True))
    if x.shape[1] != y.shape[1]:
        raise InputError(f"{names[0]} are {tuple(x.shape)}, {names[1]} {tuple(y.shape)}: must be of one width")
    for features, what in zip((x, y), names, strict=True):
        if len(features) < 2:
            raise InputError(f"{what} are of {len(features)} images: must be of two at least")
    return x, y


def generator(seed: int) -> np.random.Generator:
    """Random numbers of a seed. Raises `InputError` as `check_seed`."""
    check_seed(seed)
    return np.random.default_rng(seed)


def check_seed(seed: int) -> None:
    """Raises `InputError` unless the seed is from 0 to below 2^63."""
    if not 0 <= seed < 2**63:
        raise InputError(f"seed {seed}: must be from 0 to below 2^63")


def _ranks(keys: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014), which maps 64 bits one to one."""
    offset = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    value = keys.astype(np.uint64) ^ np.uint64(offset)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
