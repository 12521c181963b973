"""What a scorer is: it sees images, perhaps with their captions, and has columns of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.dataset.scores import Identity

Pixels = NDArray[np.uint8]
"""RGB [h, w, 3]."""


class Scorer(Protocol):
    """Scores each pair by itself: what else is in a batch makes no difference beyond rounding.

    What it needs is loaded when it is first asked who it is, or to score.
    """

    @property
    def identity(self) -> Identity:
        """Kept in the metadata of the scores, and part of their units' keys."""

    @property
    def reads_captions(self) -> bool:
        """Whether its values depend on captions; else on images alone."""

    @property
    def fields(self) -> Sequence[Any]:
        """Arrow fields of its columns."""

    def __call__(self, images: Sequence[Pixels], captions: Sequence[str], /) -> Mapping[str, Any]:
        """Values of each column by its name, one a pair; of `features` without a column, a row a pair."""


def by_shape(images: Sequence[Pixels], embed: Callable[[Tensor], Tensor]) -> NDArray[np.float32]:
    """Rows of `embed(uint8 [b, h, w, 3])` for images of any sizes, those of one size together: float32 [B, D]."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(image.shape, []).append(number)
    numbers = np.array([number for group in groups.values() for number in group], np.int64)
    parts = [embed(torch.from_numpy(np.stack([images[n] for n in group]))).numpy() for group in groups.values()]
    rows: NDArray[np.float32] = np.concatenate(parts)[np.argsort(numbers)]
    return rows
