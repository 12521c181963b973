"""Distances between sets of features against closed forms and independent implementations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.errors import InputError
from ldm.metrics import (
    Estimate,
    FeatureMoments,
    derangement,
    faithfulness,
    frechet_distance,
    frechet_distance_of_features,
    kernel_distance,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def moments(features: torch.Tensor) -> FeatureMoments:
    result = FeatureMoments(features.shape[1])
    result.add(features)
    return result


def gaussian(mean: list[float], covariance: torch.Tensor, count: int = 1000) -> FeatureMoments:
    """Moments that are given."""
    result = FeatureMoments(len(mean))
    result.count = count
    result.mean = torch.tensor(mean, dtype=torch.float64)
    result.scatter = covariance.double() * (count - 1)
    return result


def by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    """As Heusel et al.'s own code has it."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    shift = x.mean(0) - y.mean(0)
    return float(shift @ shift + np.trace(a) + np.trace(b) - 2 * np.trace(root).real)


def test_frechet_distance_of_known_gaussians() -> None:
    """Of commuting covariances it is |shift|^2 + sum of (sigma - tau)^2."""
    turn = torch.linalg.qr(normal(3, 3))[0]
    sigma, tau = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 0.5, 0.0]).double()
    a = gaussian([0, 0, 0], turn @ sigma.square().diag() @ turn.T)
    b = gaussian([1, 2, 2], turn @ tau.square().diag() @ turn.T)
    assert frechet_distance(a, b) == pytest.approx(9 + float((sigma - tau).square().sum()), rel=1e-7)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-7)


@pytest.mark.parametrize(("n", "m"), [(200, 150), (30, 20), (30, 300), (300, 30)])
def test_frechet_distance_is_that_of_matrix_square_roots(n: int, m: int) -> None:
    """Of more images than features, and of fewer, whose covariances have no full rank."""
    mix = normal(40, 40, seed=1)
    x, y = normal(n, 40, seed=2) @ mix, normal(m, 40, seed=3) @ mix.T + 0.3
    expected = by_sqrtm(x.numpy(), y.numpy())
    assert frechet_distance_of_features(x, y) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance_of_features(x, y) == pytest.approx(frechet_distance(moments(x), moments(y)), rel=1e-6)


def test_frechet_distance_is_that_of_torch_fidelity() -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = normal(200, 20, seed=1).numpy(), normal(150, 20, seed=2).numpy() * 1.4 + 0.2
    statistics = [{"mu": z.mean(0), "sigma": np.cov(z, rowvar=False)} for z in (x, y)]
    expected = fidelity.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance_of_features(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-6)


def test_a_set_is_at_no_distance_from_itself_and_offsets_do_not_drown_it() -> None:
    x = normal(25, 60) + 1e4
    assert frechet_distance_of_features(x, x.flip(0)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance_of_features(x, x + 0.5) == pytest.approx(60 * 0.25, rel=1e-6)


@pytest.mark.parametrize("size", [1000, 1300])
def test_distances_of_features_as_wide_as_real_ones_take_seconds(size: int) -> None:
    x, y = normal(size, 1280, seed=1).float(), normal(size, 1280, seed=2).float()
    started_s = time.process_time()
    assert frechet_distance_of_features(x, y) > 0
    assert time.process_time() - started_s < 15  # 2 s on an idle core


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.booleans())
def test_moments_do_not_depend_on_how_they_are_gathered(sizes: list[int], merged: bool) -> None:
    parts = [normal(size, 5, seed=number) + number for number, size in enumerate(sizes)]
    gathered = FeatureMoments(5)
    for part in parts:
        gathered.merge(moments(part)) if merged else gathered.add(part)
    whole = torch.cat(parts)
    assert gathered.count == len(whole)
    if len(whole) > 1:
        torch.testing.assert_close(gathered.mean, whole.mean(0))
        torch.testing.assert_close(gathered.covariance, torch.cov(whole.T))


def test_kernel_distance_is_the_double_sum() -> None:
    """Of whole sets: every subset is all of them, so that there is no error left."""
    x, y = normal(7, 4, seed=1), normal(7, 4, seed=2) + 0.5

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 4 + 1) ** 3)

    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    expected = (
        sum(kernel(x[i], x[j]) for i, j in pairs) / 42
        + sum(kernel(y[i], y[j]) for i, j in pairs) / 42
        - 2 * sum(kernel(a, b) for a in x for b in y) / 49
    )
    found = kernel_distance(x, y, subsets=3, subset_size=100, seed=0)
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.standard_error == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_unbiased_and_grows() -> None:
    """Equal distributions: within a few standard errors of 0, whatever the number of images. Others: further away."""
    found = [
        kernel_distance(normal(80, 16, seed=2 * k), normal(80, 16, seed=2 * k + 1), subsets=2, subset_size=80, seed=k)
        for k in range(60)
    ]
    values = np.array([one.value for one in found])
    assert abs(values.mean()) < 3.5 * values.std(ddof=1) / math.sqrt(60)
    near, far = (
        kernel_distance(normal(200, 16, seed=1), normal(300, 16, seed=2) + by, subsets=20, subset_size=50, seed=0)
        for by in (0.3, 1.0)
    )
    assert 0 < near.value < far.value
    assert 0 < near.standard_error < near.value
    again = kernel_distance(normal(200, 16, seed=1), normal(300, 16, seed=2) + 0.3, subsets=20, subset_size=50, seed=0)
    assert again == near


@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(0, 2**32))
def test_a_derangement_leads_to_another_group(groups: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    if 2 * max(groups.count(group) for group in groups) > len(groups):
        with pytest.raises(InputError, match="half in one group at most"):
            derangement(groups, random)
        return
    permutation = derangement(groups, random)
    assert sorted(permutation) == list(range(len(groups)))
    assert all(groups[i] != groups[j] for i, j in enumerate(permutation))


def test_derangements_reach_everywhere() -> None:
    random = np.random.default_rng(0)
    seen = {(i, int(j)) for _ in range(400) for i, j in enumerate(derangement(range(6), random))}
    assert seen == {(i, j) for i in range(6) for j in range(6) if i != j}


def test_faithfulness_by_hand() -> None:
    """With two prompts there is one derangement: the swap."""
    found = faithfulness(torch.tensor([[5.0, 1.0], [2.0, 3.0]]), derangements=3, seed=0)
    assert found.value == pytest.approx((4 + 1) / 2)
    assert found.standard_error == pytest.approx(np.std([4, 1], ddof=1) / math.sqrt(2))
    assert found.z == pytest.approx(2.5 / (np.std([4, 1], ddof=1) / math.sqrt(2)))


def test_faithfulness_of_pictures_that_know_nothing_is_about_standard_normal() -> None:
    z = [faithfulness(normal(100, 100, seed=k), derangements=20, seed=k).z for k in range(150)]
    assert abs(float(np.mean(z))) < 0.35
    assert 0.7 < float(np.std(z)) < 1.3
    known = normal(100, 100) + 2 * torch.eye(100)
    assert faithfulness(known, derangements=20, seed=0).z > 10
    # A picture that is like everything, or a prompt that is, is no sign of faithfulness.
    biased = normal(100, 100) + 10 * normal(100, 1, seed=1) + 10 * normal(1, 100, seed=2)
    assert abs(faithfulness(biased, derangements=20, seed=0).z) < 4


def test_equal_prompts_do_not_count_against_each_other() -> None:
    """Two pairs of equal prompts, each picture as like its twin's as its own."""
    groups = ["a", "a", "b", "b"]
    same = torch.tensor([[float(a == b) for b in groups] for a in groups])
    assert faithfulness(same, derangements=5, seed=0, groups=groups).value == 1
    assert faithfulness(same, derangements=5, seed=0).value < 1


def test_z_where_nothing_varies() -> None:
    assert faithfulness(torch.ones(4, 4), derangements=2, seed=0) == Estimate(0, 0)
    assert Estimate(0, 0).z == 0
    assert Estimate(-1, 0).z == -math.inf


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: frechet_distance_of_features(normal(5, 3), normal(5, 4)), "of one width"),
        (lambda: frechet_distance_of_features(normal(1, 3), normal(5, 3)), "two at least"),
        (lambda: frechet_distance_of_features(normal(5, 3) * math.nan, normal(5, 3)), "not numbers"),
        (lambda: frechet_distance(FeatureMoments(3), FeatureMoments(3)), "a covariance of 0 images"),
        (lambda: FeatureMoments(3).add(normal(2, 4)), "features have width 4, the moments 3"),
        (lambda: FeatureMoments(3).merge(FeatureMoments(2)), "moments of width 3 and 2"),
        (lambda: kernel_distance(normal(5, 3), normal(5, 3), subsets=1, subset_size=5, seed=0), "1 subsets"),
        (lambda: faithfulness(normal(3, 4), derangements=2, seed=0), "must be square"),
        (lambda: faithfulness(normal(1, 1), derangements=2, seed=0), "1 prompts"),
        (lambda: faithfulness(normal(3, 3), derangements=0, seed=0), "0 derangements"),
    ],
)
def test_what_can_not_be_measured_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
