"""Images that look alike: pairs with similar perceptual hashes, held against their thumbnails. A pure function.

A row is a duplicate if one that comes before it *stays* and is like it: rows are held against winners alone, so that a
chain of small differences doesn't join images that differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

HASH_BITS = 64
FEW_BITS = 8
"""Hashes with fewer bits set, or fewer unset, are of images without texture. Of others the median sets half of them."""
FEW_ROWS = 192
"""Number of rows up to which each is compared with each: fewer comparisons than looking them up would take."""
PAIRS_AT_ONCE = 1 << 20

Hashes = NDArray[np.uint64]
Thumbnails = NDArray[np.uint8]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """Row `losers[i]` looks like row `winners[i]`, which stays; ascending by loser. `bits` is in how many bits the
    hashes differ, `rms` the thumbnails' root mean square difference, of 1."""

    losers: Places
    winners: Places
    bits: NDArray[np.int8]
    rms: NDArray[np.float32]


def near_duplicates(hashes: Hashes, thumbnails: Thumbnails, rank: Places, *, max_bits: int, max_rms: float) -> Pairs:
    """Each loser with the best-ranked of the rows that stay and are like it.

    `hashes` are uint64 [N], `thumbnails` uint8 [N, bytes]; `rank` orders the rows, each having its own: the lower one
    stays. Takes about N log^2 N as long as few rows share two blocks of their hashes without being duplicates.
    """
    rows = np.flatnonzero(_textured(hashes))
    order = rows[np.argsort(rank[rows], kind="stable")]
    first, class_of_row = _classes(hashes[order], thumbnails[order])
    search = _Search(hashes[order[first]], thumbnails[order[first]], max_bits, max_rms)
    search.stay_of(np.arange(len(first)))
    # A row equal to another in hash and thumbnail is like all that the other is like: classes stay or go as one.
    winner = np.where(search.winner < 0, np.arange(len(first)), search.winner)[class_of_row]
    lost = np.flatnonzero(first[winner] != np.arange(len(order)))
    losers, winners = order[lost], order[first[winner[lost]]]
    by_loser = np.argsort(losers)
    losers, winners = losers[by_loser], winners[by_loser]
    bits = np.bitwise_count(hashes[losers] ^ hashes[winners]).astype(np.int8)
    parts = [np.sqrt(_mean_squares(thumbnails, *part)) for part in _parts(losers, winners)]
    return Pairs(losers, winners, bits, np.concatenate([np.zeros(0), *parts]).astype(np.float32))


class _Search:
    """Which of some rows stay, the earlier ones first. `winner[row]` is the earliest that stays and is like it."""

    def __init__(self, hashes: Hashes, thumbnails: Thumbnails, max_bits: int, max_rms: float) -> None:
        self._hashes = hashes
        self._thumbnails = thumbnails
        self._max_bits = max_bits
        self._max_rms = max_rms
        self._masks = band_masks(max_bits)
        self.winner = np.full(len(hashes), -1, np.int64)

    def stay_of(self, rows: Places) -> Places:
        """Those of `rows` (ascending) that stay among themselves."""
        if len(rows) <= FEW_ROWS:
            return self._stay_of_few(rows)
        half = len(rows) // 2
        earlier = self.stay_of(rows[:half])
        later = rows[half:]
        self._hold_against(earlier, later)
        return np.concatenate([earlier, self.stay_of(later[self.winner[later] < 0])])

    def _stay_of_few(self, rows: Places) -> Places:
        own = self._hashes[rows]
        near = np.triu(np.bitwise_count(own[:, None] ^ own[None, :]) <= self._max_bits, k=1)
        first, second = np.nonzero(near.T)[::-1]  # ascending by the later row, then by the earlier
        alike = self._alike(rows[first], rows[second])
        for one, other in zip(rows[first[alike]].tolist(), rows[second[alike]].tolist(), strict=True):
            if self.winner[one] < 0 and self.winner[other] < 0:
                self.winner[other] = one
        return rows[self.winner[rows] < 0]

    def _hold_against(self, stay: Places, rows: Places) -> None:
        for mask in self._masks:
            keys = self._hashes[stay] & mask
            order = np.argsort(keys, kind="stable")
            keys, wanted = keys[order], self._hashes[rows] & mask
            begin, end = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
            for places, others in _expanded(begin, end):
                one, other = stay[order[others]], rows[places]
                near = np.bitwise_count(self._hashes[one] ^ self._hashes[other]) <= self._max_bits
                one, other = one[near], other[near]
                alike = self._alike(one, other)
                self._take(one[alike], other[alike])

    def _take(self, winners: Places, losers: Places) -> None:
        known = self.winner[losers]
        better = (known < 0) | (winners < known)
        winners, losers = winners[better], losers[better]
        order = np.argsort(-winners, kind="stable")  # of many assignments to one place the last one counts
        self.winner[losers[order]] = winners[order]

    def _alike(self, one: Places, other: Places) -> NDArray[np.bool_]:
        parts = [_mean_squares(self._thumbnails, *part) <= self._max_rms**2 for part in _parts(one, other)]
        return np.concatenate(parts) if parts else np.zeros(0, bool)


def band_masks(max_bits: int) -> list[np.uint64]:
    """Masks of the tables: hashes that differ in `max_bits` at most are equal under one of them at least.

    Of `max_bits` + 2 blocks two have no difference; each two of them make a table.
    """
    edges = np.linspace(0, HASH_BITS, max_bits + 3).round().astype(int)
    blocks = [sum(1 << bit for bit in range(*edge)) for edge in pairwise(edges)]
    return [np.uint64(one | other) for one, other in combinations(blocks, 2)]


def _textured(hashes: Hashes) -> NDArray[np.bool_]:
    ones = np.bitwise_count(hashes)
    textured: NDArray[np.bool_] = (ones >= FEW_BITS) & (ones <= HASH_BITS - FEW_BITS)
    return textured


def _classes(hashes: Hashes, thumbnails: Thumbnails) -> tuple[Places, Places]:
    """The first row of each class of equal hash and thumbnail, ascending, and the class of each row."""
    joined = np.concatenate([hashes[:, None].view(np.uint8).reshape(len(hashes), 8), thumbnails], axis=1)
    whole = np.ascontiguousarray(joined).view(np.dtype((np.void, joined.shape[1]))).ravel()
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return first[order], place[inverse]


def _mean_squares(thumbnails: Thumbnails, one: Places, other: Places) -> NDArray[np.float64]:
    """Mean square difference of each pair of thumbnails, of 1."""
    difference = thumbnails[one].astype(np.int32) - thumbnails[other]
    squares: NDArray[np.float64] = (difference * difference).sum(axis=1) / (255.0**2 * thumbnails.shape[1])
    return squares


def _parts(one: Places, other: Places) -> Iterator[tuple[Places, Places]]:
    size = PAIRS_AT_ONCE // 64
    for begin in range(0, len(one), size):
        yield one[begin : begin + size], other[begin : begin + size]


def _expanded(begin: Places, end: Places) -> Iterator[tuple[Places, Places]]:
    """All (i, j) with begin[i] <= j < end[i], as two arrays, about `PAIRS_AT_ONCE` at a time."""
    counts = end - begin
    filled = np.flatnonzero(counts)
    ends = np.cumsum(counts[filled])
    first = 0
    while first < len(filled):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + PAIRS_AT_ONCE, "right")))
        part = filled[first:last]
        places = np.repeat(part, counts[part])
        starts = np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
        yield places, np.arange(len(places)) - starts + begin[places]
        first = last
