"""Figures of features whose distances are known: real images taken for pictures, noise, and what lies between."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.metrics import frechet_distance_of_features
from pipelines.evaluate.figures import Measured, clip_scores, distances, figures, subset_size
from pipelines.recipe import EvaluateSpec

SPEC = EvaluateSpec(images=120)
NUM, WIDTH = 120, 24


def features(seed: int, num: int = NUM, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(num, WIDTH)) + shift).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def measured(trained: np.ndarray, initial: np.ndarray | None = None) -> Measured:
    seen = {"trained_features": trained} | ({} if initial is None else {"initial_features": initial})
    return Measured({"features": features(1)}, {"features": features(2)}, {}, seen, {})


def test_real_images_as_pictures_score_at_the_floor_and_noise_as_untrained() -> None:
    noise = features(3, shift=2)
    oracle = distances(measured(features(1), noise), SPEC, "x")
    assert oracle["fd_x"] == oracle["fd_floor_x"] > 0
    assert oracle["kid_x"] == oracle["kid_floor_x"]
    assert oracle["fd_closed"] == oracle["kid_closed"] == 1
    lost = distances(measured(noise, noise), SPEC, "x")
    assert lost["fd_x"] == lost["fd_untrained_x"] > 5 * lost["fd_floor_x"]
    assert lost["fd_closed"] == lost["kid_closed"] == 0
    half = distances(measured(features(3, shift=1), noise), SPEC, "x")
    assert 0.5 < half["fd_closed"] < 0.9  # the distance grows with the square of the shift
    assert half["kid_x"] > 10 * half["kid_error_x"] > 0


def test_distances_are_from_the_reference_images() -> None:
    import torch

    found = distances(measured(features(5)), SPEC, "x")
    reference, floor = torch.from_numpy(features(2)), torch.from_numpy(features(1))
    assert found["fd_x"] == frechet_distance_of_features(torch.from_numpy(features(5)), reference)
    assert found["fd_floor_x"] == frechet_distance_of_features(floor, reference)
    assert set(found) == {"fd_x", "fd_floor_x", "kid_x", "kid_floor_x", "kid_error_x"}


def test_subsets_differ_however_few_images_there_are() -> None:
    assert [subset_size(num) for num in (2, 40, 1000, 30_000)] == [2, 10, 250, 1000]


def test_clip_score_is_the_mean_cosine_of_pictures_and_their_prompts() -> None:
    texts, pictures, real = unit(features(1)), unit(features(2)), unit(features(3))
    seen = {"texts": texts, "trained_judged": pictures, "initial_judged": -texts}
    found = clip_scores(Measured({"judged": real}, {}, {}, seen, {}))
    assert found["clip_score"] == pytest.approx(100 * np.mean([t @ p for t, p in zip(texts, pictures, strict=True)]))
    assert found["clip_score_real"] == pytest.approx(100 * np.mean([t @ p for t, p in zip(texts, real, strict=True)]))
    assert found["clip_score_untrained"] == pytest.approx(-100, rel=1e-5)


def test_faithful_pictures_are_told_from_good_ones_of_something_else() -> None:
    """Pictures near their own prompts' real images, on the seen side; as good ones, in another order, on the other."""
    described, reference, held_out = features(1), features(2), features(3, 40)
    near = described + features(4)
    seen = {
        "trained_features": near,
        "initial_features": features(5),
        "texts": unit(described),
        "trained_judged": unit(near),
        "initial_judged": unit(features(6)),
    }
    unseen = {
        "trained_features": np.roll(held_out, 1, axis=0),
        "texts": unit(held_out),
        "trained_judged": unit(held_out + features(7, 40)),
    }
    everything = Measured(
        {"features": described, "judged": unit(described)},
        {"features": reference},
        {"features": held_out},
        seen,
        unseen,
    )
    found = figures(everything, range(NUM), SPEC, "x")
    assert found["z_features_seen"] > 10
    assert found["z_clip_seen"] > 10
    assert found["z_clip_held_out"] > 5
    for blind in ("z_features_untrained", "z_clip_untrained", "z_features_held_out"):
        assert abs(found[blind]) < 3
    few = figures(everything, range(0, NUM, 4), SPEC, "x")
    assert 0 < few["z_clip_seen"] < found["z_clip_seen"]
    assert few["fd_x"] == found["fd_x"]


def test_what_there_is_too_little_for_is_left_out() -> None:
    found = figures(measured(features(1)), [0], SPEC, "x")
    assert not [name for name in found if name.startswith("z_")]
