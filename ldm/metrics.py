"""Measures of images and of sets of images, as pure functions.

Distances between sets are of features (`ldm.features`), one row an image: N or M images, D features. They are computed
in float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import InputError


def psnr(pixels_BCHW: Tensor, reference_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels, float32 [B], for pixels in [-1, 1] (values beyond are
    clipped); infinite for equal images. Average decibels over images for a data set's figure.

    Raises `InputError` if the shapes differ.
    """
    if pixels_BCHW.shape != reference_BCHW.shape:
        shapes = f"{tuple(pixels_BCHW.shape)} and {tuple(reference_BCHW.shape)}"
        raise InputError(f"images are {shapes}: must be of one shape")
    error = pixels_BCHW.float().clamp(-1, 1) - reference_BCHW.float().clamp(-1, 1)
    # The peak is 2: the width of [-1, 1].
    return 10 * (4 / error.square().flatten(1).mean(dim=1)).log10()


@dataclass(frozen=True)
class Estimate:
    """A figure and how far off it may be."""

    value: float
    standard_error: float

    @property
    def z(self) -> float:
        """The value in standard errors; 0 where both are 0."""
        if self.standard_error == 0:
            return math.copysign(math.inf, self.value) if self.value else 0.0
        return self.value / self.standard_error


class FeatureMoments:
    """Count, mean and scatter of features, in memory that doesn't grow with their number (Chan et al. 1979).

    `mean` is [D]; `scatter` [D, D] is the sum of outer products of what remains when the mean is taken off.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features_ND: Tensor) -> None:
        """Raises `InputError` for another width, or values that are not numbers."""
        features = _checked(features_ND)
        if features.shape[1] != len(self.mean):
            raise InputError(f"features have width {features.shape[1]}, the moments {len(self.mean)}: must be equal")
        if not len(features):
            return
        mean = features.mean(dim=0)
        centred = features - mean
        self._join(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureMoments) -> None:
        """As if what the other has seen had been added here. Raises `InputError` for another width."""
        if other.mean.shape != self.mean.shape:
            raise InputError(f"moments of width {len(self.mean)} and {len(other.mean)}: must be equal")
        if other.count:
            self._join(other.count, other.mean, other.scatter)

    @property
    def covariance(self) -> Tensor:
        """Unbiased, [D, D]. Raises `InputError` for fewer than two images."""
        if self.count < 2:
            raise InputError(f"a covariance of {self.count} images: give two at least")
        return self.scatter / (self.count - 1)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """Squared Frechet distance of two Gaussians with these moments (Dowson & Landau 1982), FID's formula (Heusel et al.
    2017): |mean_a - mean_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a^1/2 C_b C_a^1/2)^1/2).

    By eigenvalues of symmetric matrices, which covariances of too few images do not upset. It falls with the number of
    images, so that only figures of equal numbers compare. Raises `InputError` for fewer than two images.
    """
    covariance_a, covariance_b = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt()  # C_a = root root^T; any such root gives the same eigenvalues
    shared = torch.linalg.eigvalsh(root.T @ covariance_b @ root).clamp(min=0).sqrt().sum()
    return _frechet(a.mean - b.mean, covariance_a.trace(), covariance_b.trace(), shared)


def frechet_distance_of_features(x_ND: Tensor, y_MD: Tensor) -> float:
    """`frechet_distance` of the features' moments. Of fewer images than features, by an N x M matrix instead of D x D.

    Raises `InputError` for fewer than two images, differing widths, or values that are not numbers.
    """
    x, y = _checked_pair(x_ND, y_MD)
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


def kernel_distance(x_ND: Tensor, y_MD: Tensor, *, subsets: int, subset_size: int, seed: int) -> Estimate:
    """Kernel Inception distance, KID (Binkowski et al. 2018): the unbiased squared maximum mean discrepancy of random
    subsets of both, with kernel (x.y / D + 1)^3, averaged over `subsets`. It may be below 0 for equal distributions.

    Subsets have `subset_size` images, or as many as the smaller set has. The standard error is that of the average
    over subsets, drawn independently from the given images: it says how well the subsets stand for these images, not
    how well these images stand for all.

    Raises `InputError` for fewer than two images, differing widths, values that are not numbers, or fewer than two
    subsets.
    """
    x, y = _checked_pair(x_ND, y_MD)
    size = min(subset_size, len(x), len(y))
    if subsets < 2 or size < 2:
        raise InputError(f"{subsets} subsets of {size} images: must be two of each at least")
    random = np.random.default_rng(seed)
    values = np.empty(subsets)
    for number in range(subsets):
        rows_x, rows_y = (torch.from_numpy(random.choice(len(of), size, replace=False)) for of in (x, y))
        values[number] = _squared_discrepancy(x[rows_x], y[rows_y])
    return Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(subsets)))


def faithfulness(
    similarity_NN: Tensor, *, derangements: int, seed: int, groups: Sequence[Hashable] | None = None
) -> Estimate:
    """How much more a picture is like its own prompt than like others: the mean over prompts *i* of
    s[i, i] - mean over k of s[i, p_k(i)], where s[i, j] is the similarity of prompt *i* and the picture of prompt *j*,
    and p_k are `derangements` random permutations that leave no prompt in its place.

    The standard error is that of the mean over prompts; its ratio to the gap is `z`: about standard normal for pictures
    that know nothing of their prompts. No p_k leads from a prompt to another of its group: give equal prompts one.

    Raises `InputError` for a matrix that is not square or has values that are not numbers, no derangement, or a group
    with more than half of the prompts.
    """
    similarity = _checked(similarity_NN)
    count = len(similarity)
    if similarity.shape != (count, count) or derangements < 1:
        raise InputError(
            f"similarities {tuple(similarity.shape)}, {derangements} derangements: must be square, and one at least"
        )
    random = np.random.default_rng(seed)
    rows = torch.arange(count)
    others = torch.zeros(count, dtype=torch.float64)
    for _ in range(derangements):
        others += similarity[rows, torch.from_numpy(derangement(groups or range(count), random))]
    gaps = similarity.diagonal() - others / derangements
    return Estimate(float(gaps.mean()), float(gaps.std() / math.sqrt(count)))


def derangement(groups: Sequence[Hashable], random: np.random.Generator) -> NDArray[np.int64]:
    """A random permutation of the positions of `groups` that leads each one to a position of another group.

    A uniform permutation, mended by swaps with random positions. Raises `InputError` if there is none: with fewer than
    two positions, or a group that has more than half of them.
    """
    group = _numbered(groups)
    largest = int(np.bincount(group, minlength=1).max())
    if len(group) < 2 or 2 * largest > len(group):
        raise InputError(
            f"{len(group)} prompts, {largest} of them in one group: must be two at least, half in one group at most"
        )
    permutation = random.permutation(len(group))
    for at in np.flatnonzero(group[permutation] == group):
        if group[permutation[at]] != group[at]:  # mended with an earlier one
            continue
        fits = np.flatnonzero((group != group[at]) & (group[permutation] != group[at]))
        # There is one: each condition excludes `largest` positions at most, half of all, and both exclude `at`.
        swap = np.array([at, random.choice(fits)])
        permutation[swap] = permutation[swap[::-1]]
    return permutation


def _numbered(groups: Sequence[Hashable]) -> NDArray[np.int64]:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], np.int64)


def _frechet(shift: Tensor, trace_a: Tensor, trace_b: Tensor, shared: Tensor) -> float:
    return max(0.0, float(shift.square().sum() + trace_a + trace_b - 2 * shared))


def _squared_discrepancy(x: Tensor, y: Tensor) -> float:
    """Unbiased (Gretton et al. 2012, equation 3), of equally many."""
    width, count = x.shape[1], len(x)
    within = 0.0
    for own in (x, y):
        kernel = (own @ own.T / width + 1) ** 3
        within += float(kernel.sum() - kernel.trace()) / (count * (count - 1))
    return within - 2 * float(((x @ y.T / width + 1) ** 3).mean())


def _checked(features: Tensor) -> Tensor:
    """In float64 on the CPU."""
    if features.ndim != 2:
        raise InputError(f"features are {tuple(features.shape)}: must be [images, width]")
    result = features.detach().to("cpu", torch.float64)
    if not bool(result.isfinite().all()):
        raise InputError("features have values that are not numbers: look at the images they are of")
    return result


def _checked_pair(x_ND: Tensor, y_MD: Tensor) -> tuple[Tensor, Tensor]:
    x, y = _checked(x_ND), _checked(y_MD)
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise InputError(f"features are {tuple(x.shape)} and {tuple(y.shape)}: must be of one width, two at least")
    return x, y
