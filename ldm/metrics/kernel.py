"""Kernel distance of sets of features: KID, with the features of FID's network."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import InputError
from ldm.metrics.estimates import Estimate
from ldm.metrics.sets import checked_pair, generator

Rows = NDArray[np.int64]


def kernel_distance(x_ND: Tensor, y_MD: Tensor, *, subsets: int, subset_size: int, seed: int) -> Estimate:
    """Kernel Inception distance, KID (Binkowski et al. 2018): the unbiased squared maximum mean discrepancy of random
    subsets of both, with kernel (x.y / D + 1)^3, averaged over `subsets`. It may be below 0 for equal distributions.

    Subsets have `subset_size` images, or as many as the smaller set has. The standard error is that of the average
    over subsets, drawn independently from the given images: it says how well the subsets stand for these images, not
    how well these images stand for all.

    Of sets too large to keep, give two `FeatureSample`s' features. Sums that could be gathered instead would be the
    features' third moments: D^3 / 6 numbers, 11 GB in float64 for D = 2048.

    Raises `InputError` for fewer than two images, differing widths, values that are not numbers, fewer than two
    subsets, or a seed below 0.
    """
    if subsets < 2 or subset_size < 2:
        raise InputError(f"{subsets} subsets of {subset_size} images: must be two of each at least")
    x, y = checked_pair(x_ND, y_MD)
    size = min(subset_size, len(x), len(y))
    random = generator(seed)
    draws = ((_draw(random, x, size), _draw(random, y, size)) for _ in range(subsets))
    return _mean_of_subsets(x, y, draws)


def kernel_distance_of_subsets(x_ND: Tensor, y_MD: Tensor, subsets: Iterable[tuple[Rows, Rows]]) -> Estimate:
    """`kernel_distance` of given subsets: rows of both, equally many, none twice in a subset.

    Raises `InputError` for fewer than two images, differing widths, values that are not numbers, fewer than two
    subsets, or rows that are not there or twice.
    """
    x, y = checked_pair(x_ND, y_MD)
    return _mean_of_subsets(x, y, ((_checked_rows(a, x), _checked_rows(b, y)) for a, b in subsets))


def _mean_of_subsets(x: Tensor, y: Tensor, subsets: Iterable[tuple[Rows, Rows]]) -> Estimate:
    values = []
    for rows_x, rows_y in subsets:
        if len(rows_x) != len(rows_y) or len(rows_x) < 2:
            raise InputError(f"a subset of {len(rows_x)} and {len(rows_y)} images: must be as many, and two at least")
        values.append(_squared_discrepancy(x[torch.from_numpy(rows_x)], y[torch.from_numpy(rows_y)]))
    if len(values) < 2:
        raise InputError(f"{len(values)} subsets: must be two at least")
    scale = max(map(abs, values)) or 1.0  # squares of large ones would overflow
    deviation = scale * float(np.std(np.array(values) / scale, ddof=1))
    return Estimate(float(np.mean(values)), deviation / math.sqrt(len(values)))


def _checked_rows(rows: Rows, features: Tensor) -> Rows:
    found = np.asarray(rows)
    count = len(features)
    fits = found.ndim == 1 and (not len(found) or np.can_cast(found.dtype, np.int64))
    if not fits or ((found < 0) | (found >= count)).any() or len(np.unique(found)) != len(found):
        raise InputError(f"rows {found!r} of {count} images: must be whole numbers from 0 to {count - 1}, none twice")
    return found.astype(np.int64)


def _draw(random: np.random.Generator, features: Tensor, size: int) -> Rows:
    return random.choice(len(features), size, replace=False)


def _squared_discrepancy(x: Tensor, y: Tensor) -> float:
    """Unbiased (Gretton et al. 2012, equation 3), of equally many."""
    width, count = x.shape[1], len(x)
    within = 0.0
    for own in (x, y):
        kernel = (own @ own.T / width + 1) ** 3
        within += float(kernel.sum() - kernel.trace()) / (count * (count - 1))
    return within - 2 * float(((x @ y.T / width + 1) ** 3).mean())
