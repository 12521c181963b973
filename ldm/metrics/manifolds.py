"""How far two sets of features overlap: a set's manifold is the union of balls around its images, each as wide as the
distance to the image's k-th nearest neighbour in the set.

All distances between two sets are needed once, N x M of them, but only `ROWS_AT_ONCE` x M are there at a time. Of sets
too large for that, give two `FeatureSample`s' features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.metrics.sets import checked_pair

ROWS_AT_ONCE = 1024
ROUNDING = 1e-12
"""Squared distances below this share of the squared lengths are 0: what equal features have left after subtraction."""
SLACK = 1 + 1e-9
"""Slack of squared radii, so that the k-th neighbour itself is in the ball in spite of rounding."""


NAMES = ("features of generated images", "features of real images")


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares of images, from 0 to 1."""

    precision: float
    """Share of generated images in the manifold of real ones: how many look real."""
    recall: float
    """Share of real images in the manifold of generated ones: how much is covered."""


@dataclass(frozen=True)
class DensityCoverage:
    """Precision and recall that outliers upset less."""

    density: float
    """Balls of real images that a generated one is in, on average, by the number of neighbours: about 1 for equal
    distributions, and it may be more."""
    coverage: float
    """Share of real images whose ball has a generated one in it."""


def precision_recall(generated_ND: Tensor, real_MD: Tensor, *, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2), balls closed.

    Raises `InputError` for differing widths, values that are not numbers, or no more images than `neighbours`.
    """
    generated, real = _checked(generated_ND, real_MD, neighbours)
    return PrecisionRecall(_inside(generated, real, neighbours), _inside(real, generated, neighbours))


def density_coverage(generated_ND: Tensor, real_MD: Tensor, *, neighbours: int = 5) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, equations 5 and 6), balls closed.

    Raises `InputError` for differing widths, values that are not numbers, or no more images than `neighbours`.
    """
    generated, real = _checked(generated_ND, real_MD, neighbours)
    balls = 0
    covered = torch.zeros(len(real), dtype=torch.bool)
    radii = _radii(real, neighbours)
    for distances in _distances(generated, real):
        inside = distances <= radii
        balls += int(inside.sum())
        covered |= inside.any(dim=0)
    return DensityCoverage(balls / (neighbours * len(generated)), float(covered.double().mean()))


def _inside(points: Tensor, centres: Tensor, neighbours: int) -> float:
    radii = _radii(centres, neighbours)
    inside = sum(int((distances <= radii).any(dim=1).sum()) for distances in _distances(points, centres))
    return inside / len(points)


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Squared distance to the k-th nearest other row, [N]."""
    parts = []
    first = 0
    for distances in _distances(features, features):
        rows = torch.arange(len(distances))
        distances[rows, first + rows] = torch.inf
        parts.append(distances.kthvalue(neighbours, dim=1).values)
        first += len(distances)
    return torch.cat(parts) * SLACK


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Squared distances of some rows of `x` from all of `y`."""
    lengths = y.square().sum(dim=1)
    for rows in torch.split(x, ROWS_AT_ONCE):
        lengths_of_both = rows.square().sum(dim=1, keepdim=True) + lengths
        squared = torch.addmm(lengths_of_both, rows, y.T, alpha=-2)
        yield squared.masked_fill_(squared <= ROUNDING * lengths_of_both, 0)


def _checked(generated: Tensor, real: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Centred, which distances don't notice but their rounding does."""
    x, y = checked_pair(generated, real, NAMES)
    if not 1 <= neighbours < min(len(x), len(y)):
        raise InputError(
            f"{neighbours} neighbours of {len(x)} and {len(y)} images: must be one at least, and fewer than images"
        )
    centre = y.mean(dim=0)
    return x - centre, y - centre
