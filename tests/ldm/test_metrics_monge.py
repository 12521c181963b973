"""The Monge distance (sliced Wasserstein) against closed forms and scipy, and metrics by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from ldm.errors import ConfigError, InputError
from ldm.metrics import (
    METRICS,
    frechet_distance_of_features,
    kernel_distance,
    measured,
    monge,
    monge_distance,
    precision_recall,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_monge_distance_by_hand() -> None:
    """On a line the two directions are 1 and -1. Sorted: 0, 1, 5 and 2, 3, 4, so (4 + 4 + 1) / 3, times 3 D."""
    x, y = torch.tensor([[5.0], [0.0], [1.0]]), torch.tensor([[4.0], [2.0], [3.0]])
    assert monge_distance(x, y, projections=7, seed=3) == pytest.approx(9)
    # Of two and three: quantiles 0 | 0 6 | 6 and 1 | 2 | 6 over a third, a sixth, a sixth and a third.
    few, more = torch.tensor([[6.0], [0.0]]), torch.tensor([[1.0], [6.0], [2.0]])
    assert monge_distance(few, more, projections=2) == pytest.approx(3 * (1 / 3 + 4 / 6 + 16 / 6 + 0 / 3))


def test_monge_distance_of_a_shift_is_three_times_its_square() -> None:
    """Exactly, once directions are as many as average out; the error of the mean of P squared cosines is known."""
    x, shift = normal(50, 40), torch.full((40,), 0.5).double()
    found = monge_distance(x, x + shift, projections=4000)
    assert found == pytest.approx(3 * float(shift.square().sum()), rel=6 * math.sqrt(2 / 4000))


@pytest.mark.parametrize(("n", "m"), [(60, 60), (60, 45), (7, 64)])
def test_lines_are_compared_as_by_scipy(n: int, m: int) -> None:
    x, y = normal(n, 5, seed=1), normal(m, 5, seed=2) * 1.5 + 0.2
    expected = [scipy.stats.wasserstein_distance(a, b) for a, b in zip(x.T.numpy(), y.T.numpy(), strict=True)]
    assert monge._on_lines(x, y, power=1).tolist() == pytest.approx(expected, rel=1e-9)  # sums in other orders


def test_squares_of_unequal_numbers_are_those_of_repeated_rows() -> None:
    x, y = normal(6, 3, seed=1), normal(4, 3, seed=2)
    found = monge._on_lines(x, y)
    torch.testing.assert_close(found, monge._on_lines(x.repeat(2, 1), y.repeat(3, 1)))
    expected = (x.repeat(2, 1).sort(dim=0).values - y.repeat(3, 1).sort(dim=0).values).square().mean(dim=0)
    torch.testing.assert_close(found, expected)


def test_monge_distance_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the directions of torch-fidelity (its release 0.4.0 has no such metric yet, its repository has)."""
    monkeypatch.setattr(monge, "PROJECTIONS_AT_ONCE", 16)
    x, y = normal(80, 24, seed=1), normal(80, 24, seed=2) * 1.2 + 0.1
    directions = torch.randn(50, 24, generator=torch.Generator().manual_seed(5))
    directions = (directions / directions.norm(dim=1, keepdim=True)).double()
    total = 0.0
    for direction in directions:
        total += float(((x @ direction).sort().values - (y @ direction).sort().values).square().mean())
    assert monge_distance(x, y, projections=50, seed=5) == pytest.approx(3 * 24 * total / 50, rel=1e-9)


def test_monge_distance_is_symmetric_and_of_equal_sets_nothing() -> None:
    x, y = normal(50, 8, seed=1).float() + 100, normal(30, 8, seed=2).float() + 100
    assert monge_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-20)
    assert monge_distance(x, y) == pytest.approx(monge_distance(y, x), rel=1e-12)
    assert monge_distance(x, torch.cat([x, x])) == pytest.approx(0, abs=1e-20)
    assert monge_distance(x, y, seed=1) != monge_distance(x, y, seed=2)


def test_few_images_tell_sets_apart_whose_moments_are_equal() -> None:
    """Gaussian features, and a mixture of narrow and wide ones with their mean and covariance: the Frechet distance of
    500 images doesn't always tell them apart, the Monge distance does in every pair of draws."""

    def mixed(seed: int) -> Tensor:
        wide = torch.from_numpy(np.random.default_rng(1000 + seed).random((500, 1)) < 0.5)
        return normal(500, 16, seed=seed) * torch.where(wide, 0.6, math.sqrt(2 - 0.6**2))

    references = [normal(500, 16, seed=100 + k) for k in range(8)]
    found = {}
    for name, distance in (
        ("monge", lambda x, y: monge_distance(x, y, projections=150)),
        ("frechet", frechet_distance_of_features),
    ):
        same = [distance(normal(500, 16, seed=k), y) for k, y in enumerate(references)]
        other = [distance(mixed(k), y) for k, y in enumerate(references)]
        found[name] = (np.mean(other) - np.mean(same)) / math.sqrt((np.var(same) + np.var(other)) / 2)
        if name == "monge":
            assert min(other) > 1.2 * max(same)
    assert found["monge"] > 2 * found["frechet"]


def test_metrics_by_name_are_the_functions() -> None:
    made, real = normal(60, 6, seed=1) * 0.9, normal(50, 6, seed=2)
    found = measured(list(METRICS), made, real, seed=3)
    kid = kernel_distance(made, real, subsets=50, subset_size=12, seed=3)
    assert found["fd"] == frechet_distance_of_features(made, real)
    assert (found["kid"], found["kid_error"]) == (kid.value, kid.standard_error)
    assert found["mind"] == monge_distance(made, real, seed=3)
    assert (found["precision"], found["recall"]) == tuple(vars(precision_recall(made, real)).values())
    assert set(found) == {"fd", "kid", "kid_error", "mind", "precision", "recall", "density", "coverage"}
    assert measured(["monge"], made, real, seed=3) == {"mind": found["mind"]}


def test_metrics_that_are_not_there_are_refused_before_anything_is_measured() -> None:
    with pytest.raises(ConfigError, match="metric 'fid': must be one of frechet, kernel, monge, precision_recall"):
        measured(["frechet", "fid"], torch.zeros(0, 0), torch.zeros(0, 0))
    with pytest.raises(InputError, match="0 projections"):
        monge_distance(normal(3, 2), normal(3, 2), projections=0)
