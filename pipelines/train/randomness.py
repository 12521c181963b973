"""What chance decides about a sample: a function of (seed, epoch, sample), never of rank, step or batch.

Every draw comes from a counter-based generator, Philox4x64-10 (Salmon et al., 2011, "Parallel random numbers: as easy
as 1, 2, 3"), keyed with (seed, sample) and started at counter (0, 0, purpose, epoch). The draws of one sample are the
same on any machine and in any batch, different purposes are independent, and each epoch draws anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a draw is for. The numbers are part of the contract: they never change meaning."""

    DIFFUSION_NOISE = 1
    POSTERIOR_NOISE = 2
    TIMESTEP = 3
    CAPTION_DROPOUT = 4
    SHIFT_X = 5
    SHIFT_Y = 6
    OFFSET_NOISE = 7
    INPUT_PERTURBATION = 8


class Randomness:
    """The draws of one training run. `samples` are (sample id, epoch) pairs, a row of the result for each."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def normal(self, purpose: Purpose, samples: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal values, float32 [len(samples), *shape]."""
        values = np.empty((len(samples), *shape), np.float32)
        for row, (identity, epoch) in zip(values, samples, strict=True):
            self._generator(purpose, identity, epoch).standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(values)

    def uniform(self, purpose: Purpose, samples: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Values in [0, 1), float32 [len(samples)]."""
        values = [self._generator(purpose, *sample).random(dtype=np.float32) for sample in samples]
        return torch.from_numpy(np.array(values, np.float32))

    def _generator(self, purpose: Purpose, identity: int, epoch: int) -> np.random.Generator:
        key = np.array((self._seed & (2**64 - 1), identity), np.uint64)
        counter = np.array((0, 0, purpose, epoch), np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))
