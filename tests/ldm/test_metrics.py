"""Distances between sets of features against closed forms and independent implementations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from random import Random
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.errors import InputError
from ldm.metrics import (
    Estimate,
    FeatureMoments,
    FeatureSample,
    PrecisionRecall,
    RunningMean,
    clip_scores,
    density_coverage,
    derangement,
    faithfulness,
    frechet,
    frechet_distance,
    frechet_distance_of_features,
    kernel_distance,
    kernel_distance_of_subsets,
    losses_at_times,
    manifolds,
    precision_recall,
)
from ldm.sampling import seeded_noise


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


@pytest.mark.parametrize(("n", "width"), [(200, 20), (700, 600)])
def test_frechet_distance_is_that_of_torch_fidelity(n: int, width: int) -> None:
    """The wider one in blocks of columns, whose number does not divide it."""
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = normal(n, width, seed=1), normal(n + 50, width, seed=2) * 1.4 + 0.2
    statistics = [fidelity.fid_features_to_statistics(z) for z in (x, y)]
    expected = fidelity.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance_of_features(x, y) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-6)


def test_moments_of_wide_features_in_blocks_are_the_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "ROWS_AT_ONCE", 1024)
    x = (normal(5000, 300, seed=3) + 10).float()
    torch.testing.assert_close(moments(x).covariance, torch.cov(x.double().T))


def test_a_set_is_at_no_distance_from_itself_and_offsets_do_not_drown_it() -> None:
    x = normal(25, 60) + 1e4
    assert frechet_distance_of_features(x, x.flip(0)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance_of_features(x, x + 0.5) == pytest.approx(60 * 0.25, rel=1e-6)


@pytest.mark.parametrize("size", [1000, 1300])
def test_distances_of_features_as_wide_as_real_ones_take_seconds(size: int) -> None:
    x, y = normal(size, 1280, seed=1).float(), normal(size, 1280, seed=2).float()
    started_s = time.process_time()
    assert frechet_distance_of_features(x, y) > 0
    # From 0.3 to 2 s of one core; 11 were seen of two threads that waited for each other beside other processes.
    assert time.process_time() - started_s < 60


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


def test_kernel_distance_is_that_of_torch_fidelity() -> None:
    """Of the subsets that it draws; its deviation is of the subsets, ours of their average."""
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = normal(120, 16, seed=1), normal(90, 16, seed=2) * 1.2 + 0.3
    count, size = 9, 40
    expected = fidelity.kid_features_to_metric(
        x, y, kid_subsets=count, kid_subset_size=size, rng_seed=2020, verbose=False
    )
    random = np.random.RandomState(2020)  # as torch-fidelity draws
    subsets = [tuple(random.choice(n, size, replace=False) for n in (120, 90)) for _ in range(count)]
    found = kernel_distance_of_subsets(x, y, subsets)
    assert found.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    deviation = expected["kernel_inception_distance_std"]
    assert found.standard_error == pytest.approx(deviation / math.sqrt(count - 1), rel=1e-9)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_precision_and_recall_are_those_of_torch_fidelity(neighbours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    monkeypatch.setattr(manifolds, "ROWS_AT_ONCE", 32)
    generated, real = normal(150, 6, seed=1) * 0.8 + 0.4, normal(110, 6, seed=2)
    expected = fidelity.prc_features_to_metric(
        generated, real, prc_neighborhood=neighbours, prc_batch_size=64, save_cpu_ram=False, verbose=False
    )
    found = precision_recall(generated, real, neighbours=neighbours)
    assert 0 < found.recall < found.precision < 1
    assert (found.precision, found.recall) == pytest.approx((expected["precision"], expected["recall"]), rel=1e-5)


def test_manifolds_by_hand() -> None:
    """On a line, with radii of real images 1, 1, 2 and of generated ones 0.5, 0.5, 4."""
    real, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[1.5], [2.0], [6.0]])
    assert precision_recall(generated, real, neighbours=1) == PrecisionRecall(2 / 3, 2 / 3)
    found = density_coverage(generated, real, neighbours=1)
    # 1.5 is in the balls of 1 and 3, and 2 as well; 6 is in none.
    assert (found.density, found.coverage) == pytest.approx((4 / 3, 2 / 3))


def test_density_and_coverage_are_the_double_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifolds, "ROWS_AT_ONCE", 17)
    generated, real = normal(60, 3, seed=1) * 0.7, normal(50, 3, seed=2)
    own = (real[:, None] - real).norm(dim=2).sort(dim=1).values[:, 4]
    inside = (generated[:, None] - real).norm(dim=2) <= own
    found = density_coverage(generated, real, neighbours=4)
    assert found.density == pytest.approx(float(inside.sum()) / (4 * 60), rel=1e-9)
    assert found.coverage == pytest.approx(float(inside.any(dim=0).double().mean()), rel=1e-9)


def test_manifolds_of_equal_sets_are_full_and_of_distant_ones_empty() -> None:
    x = normal(64, 8).float() + 1e3
    for one in (x, torch.ones(64, 8) / 3):  # the balls of equal features have no radius
        assert precision_recall(one, one.flip(0)) == PrecisionRecall(1, 1)
        assert density_coverage(one, one.flip(0)).coverage == 1
    assert density_coverage(x, x.flip(0), neighbours=4).density == pytest.approx(
        5 / 4
    )  # an image's own ball is one more
    assert precision_recall(x, x + 100) == PrecisionRecall(0, 0)


def test_precision_and_recall_of_a_part() -> None:
    """Generated images that are all like some of the real ones are precise; the others are not recalled."""
    real = torch.cat([normal(100, 4, seed=1), normal(100, 4, seed=2) + 50])
    found = precision_recall(normal(100, 4, seed=3), real)
    assert found.precision > 0.8
    assert 0.3 < found.recall <= 0.5


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(2, 40), st.randoms(use_true_random=False))
def test_a_sample_does_not_depend_on_how_it_is_gathered(sizes: list[int], capacity: int, random: Random) -> None:
    total = sum(sizes)
    features, keys = normal(total, 3).float(), np.arange(total) * 7 - 50
    whole = FeatureSample(3, capacity, seed=1)
    whole.add(features, keys)
    order = np.array(random.sample(range(total), total), np.int64)
    merged, added = FeatureSample(3, capacity, seed=1), FeatureSample(3, capacity, seed=1)
    for rows in np.split(order, np.cumsum(sizes)[:-1]):
        part = FeatureSample(3, capacity, seed=1)
        for each in (part, added):
            each.add(features[torch.from_numpy(rows)], keys[rows])
        merged.merge(part)
    for one in (merged, added):
        assert one.count == whole.count == total
        assert np.array_equal(one.keys, whole.keys)
        assert torch.equal(one.features, whole.features)
    assert len(whole.keys) == min(capacity, total)
    assert torch.equal(whole.features, features[torch.from_numpy((whole.keys + 50) // 7)])


def test_samples_are_uniform_and_bounded() -> None:
    """Each of 50 images is among 10 with probability 1/5; memory is that of two capacities and a batch."""
    counts = np.zeros(50)
    for seed in range(400):
        sample = FeatureSample(1, 10, seed=seed)
        for first in range(0, 50, 5):
            sample.add(torch.zeros(5, 1), np.arange(first, first + 5))
            assert len(sample._kept[0]) + sum(len(part) for part, _ in sample._new) < 20
        counts[sample.keys] += 1
    # 400 draws of probability 1/5: 80 with a deviation of 8.
    assert counts.sum() == 4000
    assert abs(counts - 80).max() < 32
    assert (counts.std() - 8) ** 2 < 9


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.booleans())
def test_means_do_not_depend_on_how_they_are_gathered(sizes: list[int], merged: bool) -> None:
    parts = [normal(size, 2, seed=number) + 1e3 * number for number, size in enumerate(sizes)]
    gathered = RunningMean(2)
    for part in parts:
        own = RunningMean(2)
        own.add(part)
        gathered.merge(own) if merged else gathered.add(part)
    whole = torch.cat(parts)
    if len(whole) > 1:
        found = gathered.estimates()
        errors = whole.std(dim=0) / math.sqrt(len(whole))
        assert [one.value for one in found] == pytest.approx(whole.mean(dim=0).tolist(), rel=1e-9)
        assert [one.standard_error for one in found] == pytest.approx(errors.tolist(), rel=1e-6)


def test_clip_scores_are_cosines_not_below_0() -> None:
    images = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]])
    texts = torch.tensor([[4.0, 3.0], [-2.0, 1.0], [0.0, 5.0]])
    assert clip_scores(images, texts).tolist() == pytest.approx([96, 0, 0])


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow", "edm"])
def test_losses_at_times(prediction: str) -> None:
    """A network that says 0 is off by the target; one that knows the answer isn't off. Any batches give the same."""
    diffusion = Diffusion(DiffusionConfig(prediction=prediction))  # type: ignore[arg-type]
    times: list[float] = {"flow": [0.25, 1.0], "edm": [0.05, 8.0]}.get(prediction, [10, 999])
    latents, noise = normal(6, 2, 4, 4).float(), seeded_noise(range(6), (2, 4, 4))
    expected = []
    for at in times:
        t = torch.full((6,), at)
        target = diffusion.target(latents, noise, t)
        expected.append(target.square().mean(dim=(1, 2, 3)))
        knows = Mock(return_value=target)
        assert losses_at_times(knows, diffusion, latents, noise, [at]).abs().max() == 0
        noised, model_time = knows.call_args.args
        seen = diffusion.scale_input(diffusion.noised(latents, noise, t), diffusion.alpha_sigma(t)[1])
        assert torch.equal(noised, seen)
        assert torch.equal(model_time, diffusion.model_time(t))
    found = losses_at_times(lambda x, t: torch.zeros_like(x), diffusion, latents, noise, times)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.stack(expected, dim=1).double(), rtol=1e-5, atol=1e-6)
    parts = [
        losses_at_times(lambda x, t: torch.zeros_like(x), diffusion, *rows, times)
        for rows in zip(latents.split(4), noise.split(4), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), found)


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


FEW, MORE = np.arange(2), np.arange(3)


def losses(times: list[float], prediction: str, side: int = 4, noises: int = 2) -> torch.Tensor:
    diffusion = Diffusion(DiffusionConfig(prediction=prediction))  # type: ignore[arg-type]
    return losses_at_times(
        lambda x, t: x[..., :side], diffusion, torch.zeros(2, 1, 4, 4), torch.zeros(noises, 1, 4, 4), times
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: frechet_distance_of_features(normal(5, 3), normal(5, 4)), "of one width"),
        (lambda: frechet_distance_of_features(normal(1, 3), normal(5, 3)), "two at least"),
        (lambda: frechet_distance_of_features(normal(5, 3) * math.nan, normal(5, 3)), "not numbers"),
        (lambda: frechet_distance(FeatureMoments(3), FeatureMoments(3)), "a covariance of 0 images"),
        (lambda: FeatureMoments(3).add(normal(2, 4)), "features have width 4, the moments 3"),
        (lambda: FeatureMoments(3).merge(FeatureMoments(2)), "moments of width 3 and 2"),
        (lambda: FeatureMoments(3).add(normal(2, 3) / 0), "not numbers"),
        (lambda: FeatureMoments(3).add(normal(3)), r"must be \[images, width\]"),
        (lambda: frechet_distance(moments(normal(4, 3)), moments(normal(4, 2))), "moments of width 3 and 2"),
        (lambda: kernel_distance(normal(5, 3), normal(5, 3), subsets=1, subset_size=5, seed=0), "1 subsets"),
        (lambda: kernel_distance(normal(5, 3), normal(5, 3), subsets=2, subset_size=1, seed=0), "of 1 images"),
        (lambda: kernel_distance(normal(5, 3), normal(5, 4), subsets=2, subset_size=5, seed=0), "of one width"),
        (lambda: kernel_distance_of_subsets(normal(5, 3), normal(5, 3), []), "0 subsets"),
        (lambda: kernel_distance_of_subsets(normal(5, 3), normal(5, 3), [(FEW, MORE)]), "2 and 3 images"),
        (lambda: precision_recall(normal(4, 3), normal(3, 3)), "3 neighbours of 4 and 3 images"),
        (lambda: precision_recall(normal(4, 3), normal(4, 3), neighbours=0), "0 neighbours"),
        (lambda: precision_recall(normal(9, 3), normal(9, 2)), "of one width"),
        (lambda: density_coverage(normal(9, 3), normal(9, 3) * math.nan), "not numbers"),
        (lambda: FeatureSample(3, 1, seed=0), "a sample of 1 images"),
        (lambda: FeatureSample(3, 9, seed=0).add(normal(2, 4), FEW), r"must be \[keys, 3\]"),
        (lambda: FeatureSample(3, 9, seed=0).add(normal(3, 3), FEW), "of 2 keys"),
        (lambda: FeatureSample(3, 9, seed=0).add(normal(2, 3) * math.nan, FEW), "not numbers"),
        (lambda: FeatureSample(3, 2, seed=0).add(normal(2, 3), FEW * 0), "there twice"),
        (lambda: FeatureSample(3, 9, seed=0).merge(FeatureSample(3, 9, seed=1)), "must be equal"),
        (lambda: RunningMean(2).add(normal(3)), r"must be \[images, 2\]"),
        (lambda: RunningMean(1).add(normal(3) / 0), "values to average have values that are not numbers"),
        (lambda: RunningMean(2).merge(RunningMean(1)), "width 2 and 1"),
        (lambda: RunningMean(2).estimates(), "0 images"),
        (lambda: clip_scores(normal(2, 3), normal(2, 4)), "of one shape"),
        (lambda: clip_scores(normal(2, 3), normal(2, 3) * 0), "length 0"),
        (lambda: losses([0.5, 2], "flow"), "must be numbers from 0 to 1, one at least"),
        (lambda: losses([0.5], "eps"), "must be whole numbers from 0 to 999"),
        (lambda: losses([], "flow"), "one at least"),
        (lambda: losses([0.5], "flow", side=3), "prediction is"),
        (lambda: losses([0.5], "flow", noises=3), "noise is"),
        (lambda: faithfulness(normal(3, 4), derangements=2, seed=0), "must be square"),
        (lambda: faithfulness(normal(1, 1), derangements=2, seed=0), "1 prompts"),
        (lambda: faithfulness(normal(3, 3), derangements=0, seed=0), "0 derangements"),
    ],
)
def test_what_can_not_be_measured_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
