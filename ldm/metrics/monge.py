"""Sliced Wasserstein distance of sets of features: MIND, with the features of FID's network."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.metrics.sets import check_seed, checked_pair

PROJECTIONS_AT_ONCE = 128
"""Number of projections held at once: of 10,000 images, 10 MB a set."""


def monge_distance(x_ND: Tensor, y_MD: Tensor, *, projections: int = 1000, seed: int = 0) -> float:
    """Monge Inception distance, MIND (Berthet et al. 2026): 3 D times the mean over P random directions u of the
    squared Wasserstein distance of the sets' projections, W(Xu, Yu)^2. On a line W^2 is the integral over q from 0 to 1
    of the squared difference of the two q-quantiles: of as many images the mean over ranks j of
    (sort(Xu)_j - sort(Yu)_j)^2.

    With the factor, a shift of all features by s comes to about 3 |s|^2, since a direction sees |s|^2 / D of it. Sets
    of different sizes are compared whole, where torch-fidelity draws as many images from the larger one. It falls with
    the number of images, so that only figures of equal numbers compare; with few it still sees more than means and
    covariances do. It costs O(P (N + M) D) to project, nearly all of its time, and O(P (N log N + M log M)) to sort.

    Directions are drawn as torch-fidelity's metric draws them, so that a seed gives the same figure there.

    Raises `InputError` for fewer than two images, differing widths, values that are not numbers, or no projections.
    """
    x, y = checked_pair(x_ND, y_MD)
    if projections < 1:
        raise InputError(f"{projections} projections: must be one at least")
    check_seed(seed)
    width = x.shape[1]
    directions = torch.randn(projections, width, generator=torch.Generator().manual_seed(seed))
    directions = (directions / directions.norm(dim=1, keepdim=True)).double()
    parts = [_on_lines(x @ part.T, y @ part.T) for part in torch.split(directions, PROJECTIONS_AT_ONCE)]
    return 3 * width * float(torch.cat(parts).mean())


def _on_lines(x_NP: Tensor, y_MP: Tensor, power: int = 2) -> Tensor:
    """W^p [P] between the columns of both: quantile functions are steps, which are compared from step to step."""
    n, m = len(x_NP), len(y_MP)
    ends = torch.from_numpy(np.union1d(m * np.arange(1, n + 1), n * np.arange(1, m + 1)))  # of steps, times n m
    shares = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
    apart = x_NP.sort(dim=0).values[(ends - 1) // m] - y_MP.sort(dim=0).values[(ends - 1) // n]
    distances: Tensor = shares @ apart.abs() ** power
    return distances
