"""Figures with their uncertainty, and means that are gathered in parts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.metrics.sets import checked


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


class RunningMean:
    """Means of `width` figures over images, in memory that doesn't grow with their number (Chan et al. 1979).

    `mean` is [width]; `squares` [width] are the sums of squared differences from it.
    """

    def __init__(self, width: int = 1) -> None:
        """Raises `InputError` for a width below 1."""
        if width < 1:
            raise InputError(f"means of width {width}: must be 1 at least")
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.squares = torch.zeros(width, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Add the values of some images: [N, width], or [N] for a width of 1.

        Raises `InputError` for another shape, or values that are not numbers or beyond float32's range.
        """
        rows = checked(values[:, None] if values.ndim == 1 else values, "values to average")
        if rows.shape[1] != len(self.mean):
            raise InputError(f"values are {tuple(rows.shape)}: must be [images, {len(self.mean)}]")
        if len(rows):
            mean = rows.mean(dim=0)
            self._join(len(rows), mean, (rows - mean).square().sum(dim=0))

    def merge(self, other: RunningMean) -> None:
        """Take over what the other has seen, as if it had been added here. Raises `InputError` for another width."""
        if other.mean.shape != self.mean.shape:
            raise InputError(f"means of width {len(self.mean)} and {len(other.mean)}: must be equal")
        if other.count:
            self._join(other.count, other.mean, other.squares)

    def estimates(self) -> list[Estimate]:
        """The mean of each figure with the standard error of it. Raises `InputError` for fewer than two images."""
        if self.count < 2:
            raise InputError(f"a standard error of {self.count} images: give two at least")
        errors = (self.squares / (self.count * (self.count - 1))).sqrt()
        return [Estimate(*pair) for pair in zip(self.mean.tolist(), errors.tolist(), strict=True)]

    def _join(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.squares = self.squares + squares + shift.square() * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total
