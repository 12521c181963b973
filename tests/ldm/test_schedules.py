from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.errors import InputError
from ldm.schedules import cosine_alphas_cumprod, resolution_shift, shifted, stratified, zero_terminal_snr


def test_cosine_is_the_papers() -> None:
    t = torch.arange(1, 901, dtype=torch.float64) / 1000  # before β is capped
    f = ((t + 0.008) / 1.008 * math.pi / 2).cos().square()
    expected = f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(cosine_alphas_cumprod(1000)[:900].double(), expected, rtol=1e-4, atol=1e-7)


@given(first=st.floats(0.5, 0.9999), last=st.floats(1e-4, 0.4))
def test_zero_terminal_snr_keeps_the_first_step_and_empties_the_last(first: float, last: float) -> None:
    rescaled = zero_terminal_snr(torch.linspace(first, last, 50))
    assert float(rescaled[0]) == pytest.approx(first, rel=1e-5)
    assert float(rescaled[-1]) == 0
    assert bool((rescaled.diff() < 0).all())


@given(t=st.floats(0, 1), shift=st.floats(0.1, 10))
def test_shift_keeps_the_ends_and_can_be_undone(t: float, shift: float) -> None:
    assert shifted(0.0, shift) == 0
    assert shifted(1.0, shift) == pytest.approx(1)
    assert shifted(shifted(t, shift), 1 / shift) == pytest.approx(t, abs=1e-9)


def test_resolution_shift_is_the_papers() -> None:
    """Esser et al. 2024, section 5.3.2: the noise that is as sure of a constant image's value, √(m/n)·t/(1 − t)."""
    assert resolution_shift(4096, 1024) == 2
    t = 0.3
    moved = shifted(t, resolution_shift(4096, 1024))
    assert moved / (1 - moved) == pytest.approx(2 * t / (1 - t))
    with pytest.raises(InputError, match="both must be 1 or more"):
        resolution_shift(0, 1024)


@given(
    u=st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1, max_size=64),
    seed=st.integers(0, 1000),
)
def test_a_stratified_batch_has_one_number_in_each_part(u: list[float], seed: int) -> None:
    positions = torch.randperm(len(u), generator=torch.Generator().manual_seed(seed))
    spread = stratified(torch.tensor(u), positions, len(u))
    assert bool(((spread >= 0) & (spread < 1)).all())
    parts = (spread.double() * len(u) + 1e-4).floor().clamp(max=len(u) - 1)  # a float32 may round up to the next
    assert int((parts - positions).abs().max()) <= 1
    half = stratified(torch.tensor(u)[::2], positions[::2], len(u))
    assert torch.equal(half, spread[::2])


def test_stratified_numbers_stay_below_one_and_vary_less() -> None:
    top = torch.nextafter(torch.ones(1), torch.zeros(1))
    assert float(stratified(top, torch.tensor([999_999]), 1_000_000)) < 1
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(200, 16, generator=generator)
    means = torch.stack([stratified(row, torch.arange(16), 16).mean() for row in u])
    assert float(means.std()) < float(u.mean(dim=1).std()) / 8


@pytest.mark.parametrize(
    ("u", "positions", "size", "message"),
    [
        ([0.5], [0], 0, "batch_size = 0"),
        ([0.5], [2], 2, "from 0 to 1"),
        ([0.5, 0.5], [0], 2, "must be 2"),
        ([1.0], [0], 2, r"\[0, 1\)"),
        ([math.nan], [0], 2, r"\[0, 1\)"),
    ],
)
def test_stratified_refuses_what_does_not_fit(u: list[float], positions: list[int], size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        stratified(torch.tensor(u), torch.tensor(positions), size)
