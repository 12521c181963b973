"""Figures of features whose distances are known: real images taken for pictures, noise, and what lies between."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.metrics import frechet_distance_of_features, monge_distance, precision_recall
from pipelines.dataset.figures import Figure
from pipelines.evaluate.figures import Measured, clip_scores, distances, figures, judge_name, subset_size
from pipelines.recipe import EvaluateSpec

SPEC = EvaluateSpec(images=120, judge="judge")
NUM, WIDTH = 120, 24


def features(seed: int, num: int = NUM, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(num, WIDTH)) + shift).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def measured(trained: np.ndarray, initial: np.ndarray | None = None) -> Measured:
    seen = {"trained_features": trained} | ({} if initial is None else {"initial_features": initial})
    return Measured({"features": features(1)}, {"features": features(2)}, {}, seen, {})


def by_label(found: list[Figure]) -> dict[str, Figure]:
    return {figure.label.removesuffix("/x"): figure for figure in found}


def distances_of(trained: np.ndarray, initial: np.ndarray | None = None) -> dict[str, Figure]:
    found = by_label(distances(measured(trained, initial), SPEC, "x"))
    return {label.removesuffix("/seen"): figure for label, figure in found.items()}


DISTANCES = ("kernel_distance", "frechet_distance", "monge_distance")


def test_real_images_as_pictures_score_at_the_floor_and_noise_as_untrained() -> None:
    noise = features(3, shift=2)
    oracle = distances_of(features(1), noise)
    assert list(oracle) == [*DISTANCES, "precision", "recall"]
    for figure in oracle.values():
        assert figure.value == figure.floor
        assert figure.closed == 1
        assert figure.count == NUM
    lost = distances_of(noise, noise)
    for name in DISTANCES:
        assert lost[name].value == lost[name].untrained > 5 * (lost[name].floor or 0)
        assert lost[name].closed == 0
    assert lost["precision"].value < 0.1 < 0.5 < (lost["precision"].floor or 0)
    assert lost["recall"].value < 0.1 < 0.5 < (lost["recall"].floor or 0)
    half = distances_of(features(3, shift=1), noise)
    assert 0.5 < (half["frechet_distance"].closed or 0) < 0.9  # the distance grows with the square of the shift
    assert 0.5 < (half["monge_distance"].closed or 0) < 0.9
    kernel = half["kernel_distance"]
    assert kernel.value > 10 * (kernel.error or 0) > 0


def test_distances_are_from_the_reference_images() -> None:
    import torch

    found = distances_of(features(5))
    own, reference, floor = (torch.from_numpy(features(seed)) for seed in (5, 2, 1))
    assert found["frechet_distance"].value == frechet_distance_of_features(own, reference)
    assert found["frechet_distance"].floor == frechet_distance_of_features(floor, reference)
    assert found["monge_distance"].value == monge_distance(own, reference, seed=SPEC.seed)
    overlap = precision_recall(own, reference)
    assert (found["precision"].value, found["recall"].value) == (overlap.precision, overlap.recall)
    assert all(figure.untrained is figure.closed is None for figure in found.values())


def test_of_too_few_images_for_neighbours_there_are_distances_alone() -> None:
    few = Measured(
        {"features": features(1, 3)}, {"features": features(2, 3)}, {}, {"trained_features": features(3, 3)}, {}
    )
    assert [figure.name for figure in distances(few, SPEC, "x")] == list(DISTANCES)


def test_a_judge_has_one_name_wherever_it_lies() -> None:
    names = [judge_name(judge) for judge in ("judge", "hub:ViT-B-32/openai", "/models/clip/", "elsewhere/clip")]
    assert names == ["judge", "hub:ViT-B-32/openai", "clip", "clip"]


def test_subsets_differ_however_few_images_there_are() -> None:
    assert [subset_size(num) for num in (2, 40, 1000, 30_000)] == [2, 10, 250, 1000]


def test_clip_score_is_the_mean_cosine_of_pictures_and_their_prompts() -> None:
    texts, pictures, real = unit(features(1)), unit(features(2)), unit(features(3))
    seen = {"texts": texts, "trained_judged": pictures, "initial_judged": -texts}
    (found,) = clip_scores(Measured({"judged": real}, {}, {}, seen, {}), SPEC)
    assert (found.label, found.count) == ("clip_score/seen/judge", NUM)
    cosines = 100 * np.sum(texts.astype(float) * pictures, axis=1)
    assert found.value == pytest.approx(np.mean(cosines))
    assert found.error == pytest.approx(np.std(cosines, ddof=1) / NUM**0.5)
    assert found.floor == pytest.approx(100 * np.mean([t @ r for t, r in zip(texts, real, strict=True)]))
    assert found.untrained == pytest.approx(-100, rel=1e-5)


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
    found = by_label(figures(everything, range(NUM), SPEC, "x"))
    assert list(found)[:3] == ["kernel_distance/seen", "frechet_distance/seen", "clip_score/seen/judge"]
    seen, held_out = found["faithfulness/seen"], found["faithfulness/held_out"]
    judged, judged_held_out = found["faithfulness/seen/judge"], found["faithfulness/held_out/judge"]
    assert seen.value > 10
    assert judged.value > 10
    assert (judged.floor or 0) > judged.value  # the captions' own images
    assert judged_held_out.value > 5
    for blind in (seen.untrained, judged.untrained, held_out.value):
        assert abs(blind or 0) < 3
    assert (seen.count, held_out.count) == (NUM, 40)
    few = by_label(figures(everything, range(0, NUM, 4), SPEC, "x"))
    assert 0 < few["faithfulness/seen/judge"].value < judged.value
    assert few["frechet_distance/seen"] == found["frechet_distance/seen"]


def test_what_there_is_too_little_for_is_left_out() -> None:
    found = figures(measured(features(1)), [0], SPEC, "x")
    assert not [figure for figure in found if figure.name == "faithfulness"]
