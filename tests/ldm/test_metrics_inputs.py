"""Features that can't be measured are refused by set and row, whichever metric is asked; what can be is measured."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.metrics import (
    METRICS,
    FeatureMoments,
    FeatureSample,
    RunningMean,
    clip_scores,
    density_coverage,
    faithfulness,
    frechet_distance,
    frechet_distance_of_features,
    kernel_distance,
    kernel_distance_of_subsets,
    measured,
    monge_distance,
    precision_recall,
    psnr,
)

DISTANCES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "frechet": frechet_distance_of_features,
    "kernel": lambda x, y: kernel_distance(x, y, subsets=3, subset_size=4, seed=0),
    "subsets": lambda x, y: kernel_distance_of_subsets(x, y, [(np.arange(2), np.arange(2))] * 2),
    "monge": monge_distance,
    "precision_recall": precision_recall,
    "density_coverage": density_coverage,
    "measured": lambda x, y: measured(list(METRICS), x, y),
}
FIRST = "features of (the first set|generated images)"
SECOND = "features of (the second set|real images)"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def with_value(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """In row 4 of 9."""
    features = normal(9, 3).to(dtype)
    features[4, 1] = value
    return features


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "have values that are not numbers, nan in row 4"),
        (-math.inf, "have values that are not numbers, -inf in row 4"),
        (1e200, r"have 1e\+200 in row 4: must be 3\.4e\+38 at most"),
        (-1e39, r"have -1e\+39 in row 4"),
    ],
)
def test_values_are_refused_by_set_and_row(
    distance: Callable[[Tensor, Tensor], object], value: float, message: str
) -> None:
    """1e200 made a Frechet distance of 0 without a word: its squares are infinite, and what is left no number."""
    with pytest.raises(InputError, match=f"{FIRST} {message}"):
        distance(with_value(value), normal(9, 3))
    with pytest.raises(InputError, match=f"{SECOND} {message}"):
        distance(normal(9, 3), with_value(value))


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(0, 3), "are of 0 images: must be of two at least"),
        (torch.zeros(1, 3), "are of 1 images: must be of two at least"),
        (torch.zeros(9, 0), r"are \(9, 0\): must be \[images, width\], of a width of 1 at least"),
        (torch.zeros(9), r"are \(9,\): must be \[images, width\]"),
        (torch.zeros(()), r"are \(\): must be \[images, width\]"),
        (torch.zeros(9, 3, dtype=torch.complex64), r"are torch\.complex64: must be a torch\.Tensor of real numbers"),
        (np.zeros((9, 3)), r"are ndarray: must be a torch\.Tensor"),
    ],
)
def test_shapes_are_refused_by_set(distance: Callable[[Tensor, Tensor], object], wrong: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=f"{FIRST} {message}"):
        distance(wrong, normal(9, 3))
    with pytest.raises(InputError, match=f"{SECOND} {message}"):
        distance(normal(9, 3), wrong)


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
def test_differing_widths_are_refused(distance: Callable[[Tensor, Tensor], object]) -> None:
    with pytest.raises(InputError, match=rf"{FIRST} are \(9, 3\), {SECOND} \(8, 4\): must be of one width"):
        distance(normal(9, 3), normal(8, 4))


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_features_of_any_real_type_are_those_in_float64(
    distance: Callable[[Tensor, Tensor], object], dtype: torch.dtype
) -> None:
    x, y = ((10 * normal(9, 3, seed=seed)).abs().to(dtype) for seed in (1, 2))
    assert repr(distance(x, y)) == repr(distance(x.double(), y.double()))


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
def test_the_largest_features_are_measured_without_overflow(distance: Callable[[Tensor, Tensor], object]) -> None:
    largest = torch.finfo(torch.float32).max
    found = repr(distance(torch.full((9, 3), largest) * torch.rand(9, 3), -torch.full((9, 3), largest)))
    assert "nan" not in found
    assert "inf" not in found


def moments(features: Tensor) -> FeatureMoments:
    result = FeatureMoments(features.shape[1])
    result.add(features)
    return result


def test_what_is_refused_is_not_added() -> None:
    gathered, sample, mean = moments(normal(5, 3)), FeatureSample(3, 20, seed=0), RunningMean(3)
    sample.add(normal(5, 3), np.arange(5))
    mean.add(normal(5, 3))
    for value in (math.nan, 1e200):
        with pytest.raises(InputError, match="in row 4"):
            gathered.add(with_value(value))
        with pytest.raises(InputError, match="in row 4"):
            sample.add(with_value(value), np.arange(9))
        with pytest.raises(InputError, match=r"values to average have .* in row 4"):
            mean.add(with_value(value))
    assert (gathered.count, sample.count, mean.count) == (5, 5, 5)
    torch.testing.assert_close(gathered.covariance, torch.cov(normal(5, 3).T))


def test_moments_of_whole_numbers_are_those_of_floats() -> None:
    whole = torch.arange(12).reshape(6, 2)
    for features in (whole, whole.to(torch.uint8), whole > 4):
        torch.testing.assert_close(moments(features).covariance, torch.cov(features.double().T))


def test_moments_that_are_not_numbers_are_refused() -> None:
    """However they came to be: read from a file, say."""
    odd = moments(normal(5, 3))
    odd.scatter[1, 1] = math.nan
    with pytest.raises(InputError, match="moments of the second set are not numbers"):
        frechet_distance(moments(normal(5, 3)), odd)


@pytest.mark.parametrize("kind", ["constant columns", "equal columns", "one direction", "constant", "fewer rows"])
def test_degenerate_covariances_are_measured_as_by_torch_fidelity(kind: str) -> None:
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = normal(60, 12, seed=1), normal(70, 12, seed=2) * 1.3 + 0.2
    for features in (x, y):
        if kind == "constant columns":
            features[:, 3:6] = 2.0
        elif kind == "equal columns":
            features[:, 6:] = features[:, :6]
        elif kind == "one direction":
            features[:] = features[:, :1] * torch.arange(1, 13)
    if kind == "constant":
        x[:] = 1.5
    if kind == "fewer rows":
        x, y = x[:8], y[:11]
    statistics = [fidelity.fid_features_to_statistics(z) for z in (x, y)]
    expected = fidelity.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance_of_features(x, y) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-6)


PAIR = (np.arange(2), np.arange(2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: FeatureMoments(0), "moments of width 0"),
        (lambda: RunningMean(0), "means of width 0"),
        (lambda: FeatureSample(0, 5, seed=0), "of width 0"),
        (lambda: FeatureSample(3, 5, seed=-1), "seed -1: must be from 0"),
        (lambda: FeatureSample(3, 5, seed=0).add(normal(2, 3), np.array([0.2, 1.7])), "keys are float64"),
        (lambda: FeatureSample(3, 5, seed=0).add(normal(2, 3), np.array([1, 2**63], np.uint64)), "keys are uint64"),
        (lambda: kernel_distance(normal(5, 3), normal(5, 3), subsets=2, subset_size=5, seed=-1), "seed -1"),
        (lambda: monge_distance(normal(5, 3), normal(5, 3), seed=2**63), "must be from 0 to below"),
        (lambda: faithfulness(normal(3, 3), derangements=1, seed=-1), "seed -1"),
        (lambda: faithfulness(normal(3, 3), derangements=1, seed=0, groups=[]), "groups of 0 prompts"),
        (lambda: faithfulness(normal(3, 3), derangements=1, seed=0, groups=[1, 2]), "groups of 2 prompts"),
        (lambda: faithfulness(with_value(math.nan)[:, :3], derangements=1, seed=0), "similarities have .* in row 4"),
        (
            lambda: kernel_distance_of_subsets(normal(5, 3), normal(5, 3), [(np.arange(4, 6), PAIR[1])] * 2),
            r"rows array\(\[4, 5\]\) of 5 images: must be whole numbers from 0 to 4, none twice",
        ),
        (
            lambda: kernel_distance_of_subsets(normal(5, 3), normal(5, 3), [(np.array([-1, 0]), PAIR[1])] * 2),
            "must be whole numbers from 0 to 4",
        ),
        (
            lambda: kernel_distance_of_subsets(normal(5, 3), normal(5, 3), [(np.zeros(2, np.int64), PAIR[1])] * 2),
            "none twice",
        ),
        (lambda: clip_scores(with_value(math.inf), normal(9, 3)), "embeddings of images have .* inf in row 4"),
        (lambda: clip_scores(normal(9, 3), with_value(1e200)), r"embeddings of texts have 1e\+200 in row 4"),
        (lambda: clip_scores(normal(2, 3), torch.eye(2, 3).flip(0) - torch.eye(2, 3).flip(0)), "of text 0 has length"),
        (lambda: psnr(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 4, 4)), "images are torch.uint8"),
        (lambda: psnr(torch.zeros(()), torch.zeros(())), "must be of one shape"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()
