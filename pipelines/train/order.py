"""The order of samples: which (row, epoch) pairs make up global batch i. A pure function; nothing is remembered.

The rows of the train split, numbered in the dataset's own order, are cut into L **lanes** of equal length (±1): shards
that follow each other go together. A lane is an endless stream of epochs, and each epoch of a lane is a permutation of
its rows, drawn from (seed, dataset revision, lane, epoch). A global batch takes the next equal share of every lane's
stream, so batch i begins at i x share in each of them: resuming at step n is asking for batch n.

Reading the rows is the loaders' matter, what is drawn for a sample `randomness`'.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.dataset.errors import UnusableData
from pipelines.train.errors import TrainError


class Sample(NamedTuple):
    """A row of the train split."""

    row: int
    epoch: int
    """How many times its lane was gone through before."""
    stratum: int = 0
    """A number from 0 to below the global batch size that no other sample of the batch has, as likely as any other."""


class Order:
    """Global batches by index, for any number of ranks.

    A batch lists lane after lane, and a rank takes a contiguous block of it: whole lanes, and so whole shards, are
    read by one rank alone wherever ranks divide lanes (with every W-th position each rank would read all of them).
    """

    def __init__(self, *, seed: int, revision: str, num_rows: int, lanes: int, global_batch_size: int) -> None:
        """
        Raises:
            UnusableData: there are fewer rows than lanes.
            TrainError: `lanes` does not divide `global_batch_size`.
        """
        if num_rows < lanes:
            raise UnusableData(
                f"{num_rows} samples to train on, fewer than lanes ({lanes}): each lane needs one; select more, or set"
                " `train.lanes` lower"
            )
        if global_batch_size % lanes:
            raise TrainError(f"lanes ({lanes}) must divide global_batch_size ({global_batch_size})")
        self._seed = seed
        self._revision = revision
        self._num_rows = num_rows
        self._lanes = lanes
        self._share = global_batch_size // lanes
        self.global_batch_size = global_batch_size
        self._permutations: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def batch(self, index: int) -> list[Sample]:
        """All samples of global batch `index`, counted from 0."""
        return self.block(index, 0, 1)

    def block(self, index: int, rank: int, world_size: int) -> list[Sample]:
        """The samples of global batch `index` that are `rank`'s, of `world_size`: a contiguous block of `batch`.

        Raises `TrainError` if `world_size` does not divide the global batch.
        """
        size, rest = divmod(self.global_batch_size, world_size)
        if rest:
            raise TrainError(f"ranks ({world_size}) must divide global_batch_size ({self.global_batch_size})")
        return [self._sample(index, position) for position in range(rank * size, (rank + 1) * size)]

    def _sample(self, index: int, position: int) -> Sample:
        lane, place = divmod(position, self._share)
        first, last = (edge * self._num_rows // self._lanes for edge in (lane, lane + 1))
        epoch, place = divmod(index * self._share + place, last - first)
        # Turned by chance from batch to batch: positions are lanes', and no lane is to keep to some strata.
        stratum = (position + _number(f"strata/{self._seed}/{index}")) % self.global_batch_size
        return Sample(first + int(self._permutation(lane, epoch, last - first)[place]), epoch, stratum)

    def _permutation(self, lane: int, epoch: int, length: int) -> NDArray[np.int64]:
        """Of one lane in one epoch; the lane's latest is kept, 8 bytes a row."""
        kept = self._permutations.get(lane)
        if kept is None or kept[0] != epoch:
            key = _number(f"order/{self._seed}/{self._revision}/{lane}/{epoch}")
            kept = (epoch, np.random.Generator(np.random.Philox(key=key)).permutation(length))
            self._permutations[lane] = kept
        return kept[1]


def _number(text: str) -> int:
    """128 bits that text decides."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
