"""Frechet distance of sets of features: FID, with the features of its network.

A covariance is symmetric, and so is C_a^1/2 C_b C_a^1/2: eigenvalues of symmetric matrices do, which are found several
times as fast as those of the product C_a C_b or its square root, and are real and not negative but for rounding.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.metrics.sets import check_numbers, checked_pair, matrix

ROWS_AT_ONCE = 16384
"""Rows of features that are copied to float64 at once: 256 MiB at a width of 2,048."""
BLOCKS, NARROWEST = 4, 128
"""Most blocks of columns, and the least width of one, in products whose result is symmetric or a factor of which is
triangular: those that are 0 or known from others are left out. More of them save less than narrow products cost."""


class FeatureMoments:
    """Count, mean and scatter of features, in memory that doesn't grow with their number (Chan et al. 1979).

    `mean` is [D]; `scatter` [D, D] is the sum of outer products of what remains when the mean is taken off.
    """

    def __init__(self, width: int) -> None:
        """Raises `InputError` for a width below 1."""
        if width < 1:
            raise InputError(f"moments of width {width}: must be 1 at least")
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features_ND: Tensor) -> None:
        """Add some images'. Raises `InputError` for another width, or values that are not numbers or beyond float32's;
        nothing is added then."""
        features = matrix(features_ND)
        if features.shape[1] != len(self.mean):
            raise InputError(f"features have width {features.shape[1]}, the moments {len(self.mean)}: must be equal")
        if not len(features):
            return
        check_numbers(features)
        mean = features.mean(dim=0, dtype=torch.float64)
        self._join(len(features), mean, _scatter(features, mean))

    def merge(self, other: FeatureMoments) -> None:
        """Take over what the other has seen, as if it had been added here. Raises `InputError` for another width."""
        if other.mean.shape != self.mean.shape:
            raise InputError(f"moments of width {len(self.mean)} and {len(other.mean)}: must be equal")
        if other.count:
            self._join(other.count, other.mean, other.scatter)

    @property
    def degrees_of_freedom(self) -> int:
        """What the scatter is divided by, for an unbiased covariance. Raises `InputError` for fewer than two images."""
        if self.count < 2:
            raise InputError(f"a covariance of {self.count} images: give two at least")
        return self.count - 1

    @property
    def covariance(self) -> Tensor:
        """Unbiased, [D, D]. Raises `InputError` for fewer than two images."""
        return self.scatter / self.degrees_of_freedom

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.scatter.add_(scatter).addr_(shift, shift, alpha=self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """Squared Frechet distance of two Gaussians with these moments (Dowson & Landau 1982), FID's formula (Heusel et al.
    2017): |mean_a - mean_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a^1/2 C_b C_a^1/2)^1/2).

    Covariances of too few images, which have no full rank, do not upset it. It falls with the number of images, so that
    only figures of equal numbers compare. Raises `InputError` for fewer than two images, moments of another width, or
    moments that are not numbers.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"moments of width {len(a.mean)} and {len(b.mean)}: must be equal")
    freedom_a, freedom_b = a.degrees_of_freedom, b.degrees_of_freedom
    for moments, which in ((a, "first"), (b, "second")):
        if not bool(moments.mean.isfinite().all() and moments.scatter.isfinite().all()):
            raise InputError(f"moments of the {which} set are not numbers: gather them again from the features")
    values = torch.linalg.eigvalsh(_product(a.scatter, b.scatter))  # of the covariances', times both
    shared = values.clamp(min=0).sqrt().sum() / math.sqrt(freedom_a * freedom_b)
    return _frechet(a.mean - b.mean, a.scatter.trace() / freedom_a, b.scatter.trace() / freedom_b, shared)


def frechet_distance_of_features(x_ND: Tensor, y_MD: Tensor) -> float:
    """`frechet_distance` of the features' moments. Of fewer images than features, by an N x M matrix instead of D x D.

    Raises `InputError` for fewer than two images, differing widths, or values that are not numbers.
    """
    x, y = checked_pair(x_ND, y_MD)
    width = x.shape[1]
    if min(len(x), len(y)) >= width:
        moments = [FeatureMoments(width) for _ in range(2)]
        for own, features in zip(moments, (x, y), strict=True):
            own.add(features)
        return frechet_distance(*moments)
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    # With X the centred features over sqrt(N - 1), C_x = X^T X: the last term's trace is the nuclear norm of X Y^T.
    x, y = (x - mean_x) / math.sqrt(len(x) - 1), (y - mean_y) / math.sqrt(len(y) - 1)
    return _frechet(mean_x - mean_y, x.square().sum(), y.square().sum(), torch.linalg.svdvals(x @ y.T).sum())


def _scatter(features_ND: Tensor, mean_D: Tensor) -> Tensor:
    """X^T X of the centred features X."""
    return reduce(Tensor.add_, (_own_product(part - mean_D) for part in torch.split(features_ND, ROWS_AT_ONCE)))


def _own_product(x_ND: Tensor) -> Tensor:
    """X^T X: the blocks of columns on and above the diagonal are multiplied, those below are copied."""
    width = x_ND.shape[1]
    step = _step(width)
    result = x_ND.new_empty(width, width)
    for first in range(0, width, step):
        torch.mm(x_ND[:, first : first + step].T, x_ND[:, first:], out=result[first : first + step, first:])
    for end in range(step, width, step):
        result[end:, end - step : end] = result[end - step : end, end:].T
    return result


def _product(a: Tensor, b: Tensor) -> Tensor:
    """R^T B R for an R with R R^T = A, whose eigenvalues are those of A B whichever R is taken; at least the lower
    triangle of it.

    Cholesky's R is the fastest to find, but there is none where A has no full rank.
    """
    root, failed = torch.linalg.cholesky_ex(a)
    if not failed:
        return _lower_product(root, b)
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt()
    product: Tensor = root.T @ b @ root
    return product


def _lower_product(root: Tensor, b: Tensor) -> Tensor:
    """The lower triangle of R^T B R for a lower triangular R, without the blocks of it that are 0."""
    width = len(root)
    step = _step(width)
    result = torch.zeros_like(root)
    for first in range(0, width, step):
        columns = slice(first, first + step)
        right = b[first:, first:] @ root[first:, columns]
        for row in range(first, width, step):
            result[row : row + step, columns] = root[row:, row : row + step].T @ right[row - first :]
    return result


def _step(width: int) -> int:
    return max(NARROWEST, -(-width // BLOCKS))


def _frechet(shift: Tensor, trace_a: Tensor, trace_b: Tensor, shared: Tensor) -> float:
    return max(0.0, float(shift.square().sum() + trace_a + trace_b - 2 * shared))
