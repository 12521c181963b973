"""Near-duplicates, against a search that compares every row with every other."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from pipelines.select.near_duplicates import PAIRS_AT_ONCE, _expanded, band_masks, near_duplicates

PIXELS = 192


def popcount(value: int) -> int:
    return bin(value).count("1")


def by_comparing_all(
    hashes: list[int], thumbnails: np.ndarray, rank: list[int], max_bits: int, max_rms: float
) -> dict[int, int]:
    """Winner of each loser."""
    stay: list[int] = []
    winners: dict[int, int] = {}
    for row in sorted(range(len(hashes)), key=lambda row: rank[row]):
        if not 8 <= popcount(hashes[row]) <= 56:
            continue
        for other in stay:
            difference = thumbnails[row].astype(float) - thumbnails[other]
            alike = np.sqrt((difference**2).mean()) / 255 <= max_rms
            if popcount(hashes[row] ^ hashes[other]) <= max_bits and alike:
                winners[row] = other
                break
        else:
            stay.append(row)
    return winners


def flipped(random: np.random.Generator, value: int, bits: int) -> int:
    for bit in random.choice(64, bits, replace=False):
        value ^= 1 << int(bit)
    return value


def families(random: np.random.Generator, rows: int, originals: int) -> tuple[list[int], np.ndarray]:
    """Rows made from a few originals by changing some bits of the hash and some brightness."""
    hashes = [int(value) for value in random.integers(0, 2**64, originals, np.uint64)]
    pictures = random.integers(20, 230, (originals, PIXELS))
    parent = random.integers(0, originals, rows)
    changed = [flipped(random, hashes[number], int(random.integers(0, 4))) for number in parent]
    brightness = random.integers(-6, 7, rows)[:, None]
    return changed, (pictures[parent] + brightness).astype(np.uint8)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(0, 700),
    originals=st.integers(1, 40),
    max_bits=st.integers(0, 4),
    max_rms=st.sampled_from([0.0, 0.01, 0.02, 1.0]),
)
def test_finds_what_comparing_all_finds(seed: int, rows: int, originals: int, max_bits: int, max_rms: float) -> None:
    random = np.random.default_rng(seed)
    hashes, thumbnails = families(random, rows, originals)
    rank = random.permutation(rows)
    found = near_duplicates(np.array(hashes, np.uint64), thumbnails, rank, max_bits=max_bits, max_rms=max_rms)
    expected = by_comparing_all(hashes, thumbnails, rank.tolist(), max_bits, max_rms)
    assert dict(zip(found.losers.tolist(), found.winners.tolist(), strict=True)) == expected
    assert (np.diff(found.losers) > 0).all()
    for loser, winner, bits, rms in zip(found.losers, found.winners, found.bits, found.rms, strict=True):
        assert popcount(hashes[loser] ^ hashes[winner]) == bits <= max_bits
        difference = thumbnails[loser].astype(float) - thumbnails[winner]
        assert rms == pytest.approx(np.sqrt((difference**2).mean()) / 255, abs=1e-6)


@pytest.mark.parametrize("max_bits", range(5))
def test_every_allowed_difference_leaves_a_table_in_which_hashes_are_equal(max_bits: int) -> None:
    random = np.random.default_rng(max_bits)
    masks = [int(mask) for mask in band_masks(max_bits)]
    assert len(masks) == (max_bits + 2) * (max_bits + 1) // 2
    for _ in range(500):
        difference = flipped(random, 0, max_bits)
        assert any(difference & mask == 0 for mask in masks)


def test_a_chain_of_small_differences_is_not_one_image() -> None:
    """The middle one goes, for the first; the last one is like the middle one only, and stays."""
    ground = 0x0F0F_0F0F_0F0F_0F0F
    hashes = np.array([ground, ground ^ 0b11, ground ^ 0b1111], np.uint64)
    thumbnails = np.full((3, PIXELS), 100, np.uint8)
    found = near_duplicates(hashes, thumbnails, np.arange(3), max_bits=2, max_rms=0.02)
    assert (found.losers.tolist(), found.winners.tolist()) == ([1], [0])
    from_the_middle = near_duplicates(hashes, thumbnails, np.array([1, 0, 2]), max_bits=2, max_rms=0.02)
    assert from_the_middle.losers.tolist() == [0, 2]


def test_images_without_texture_are_left_alone() -> None:
    hashes = np.array([0, 0, 0b1111111, 0b1111111, 2**64 - 1, 2**64 - 1, 0b11111111, 0b11111111], np.uint64)
    found = near_duplicates(hashes, np.zeros((8, PIXELS), np.uint8), np.arange(8), max_bits=2, max_rms=0.02)
    assert found.losers.tolist() == [7]


def test_a_placeholder_that_is_everywhere_costs_no_quadratic_time() -> None:
    """20,000 rows of one hash, with noise in their thumbnails: 2e8 pairs if each were compared with each."""
    random = np.random.default_rng(0)
    hashes = np.full(20_000, 0x0F0F_0F0F_0F0F_0F0F, np.uint64)
    thumbnails = random.integers(100, 103, (20_000, PIXELS), np.uint8)
    found = near_duplicates(hashes, thumbnails, np.arange(20_000)[::-1], max_bits=4, max_rms=0.02)
    assert (found.winners == 19_999).all()
    assert len(found.losers) == 19_999


def test_pairs_come_in_parts_that_hold_all_of_them() -> None:
    random = np.random.default_rng(0)
    begin = random.integers(0, 5000, 3000)
    end = begin + random.integers(0, 3, 3000) * random.integers(0, 2000, 3000)
    parts = list(_expanded(begin, end))
    assert len(parts) > 1
    assert max(len(places) for places, _ in parts) <= PAIRS_AT_ONCE
    places, others = (np.concatenate(side) for side in zip(*parts, strict=True))
    expected = [(row, other) for row in range(0, 3000, 50) for other in range(begin[row], end[row])]
    chosen = places % 50 == 0
    assert list(zip(places[chosen].tolist(), others[chosen].tolist(), strict=True)) == expected
