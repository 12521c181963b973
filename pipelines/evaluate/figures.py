"""From features and judgements to a model's figures. Pure functions over arrays: float32, one row an image.

Each distance stands beside two others of as many images: the *floor*, real images against other real images, and that
of the *untrained* network. How much of the way between them is closed doesn't depend on the extractor's scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.metrics import Estimate, faithfulness, frechet_distance_of_features, kernel_distance
from pipelines.recipe import EvaluateSpec

KERNEL_SUBSETS = 50
MAX_SUBSET_SIZE = 1000
"""As published kernel distances have it; a quarter of the images where they are too few for such subsets to differ."""
Array = NDArray[Any]


@dataclass(frozen=True)
class Measured:
    """What the workers found. `described`, `reference` and `held_out` are of real images, in the order of
    `pairs.Comparison`; `seen` and `unseen` of pictures for the captions of `described` and `held_out`."""

    described: Mapping[str, Array]
    reference: Mapping[str, Array]
    held_out: Mapping[str, Array]
    seen: Mapping[str, Array]
    unseen: Mapping[str, Array]


def subset_size(num_images: int) -> int:
    """Images of a subset, for the kernel distance of `num_images`."""
    return min(MAX_SUBSET_SIZE, max(2, num_images // 4))


def figures(measured: Measured, places: Sequence[int], spec: EvaluateSpec, extractor: str) -> dict[str, float]:
    """All figures by name; `places` are the rows of `seen` whose prompts differ, for faithfulness."""
    found = distances(measured, spec, extractor) | clip_scores(measured)
    centre = measured.reference["features"].mean(axis=0)
    rows = list(places)
    for network, side in (("trained", "seen"), ("initial", "untrained")):
        if f"{network}_features" in measured.seen:
            pictures = {name: values[rows] for name, values in measured.seen.items()}
            real = measured.described["features"][rows]
            found |= _faithfulness(pictures, real, centre, network, side, spec)
    found |= _faithfulness(measured.unseen, measured.held_out.get("features"), centre, "trained", "held_out", spec)
    return {name: value for name, value in found.items() if math.isfinite(value)}  # z is infinite where nothing varies


def distances(measured: Measured, spec: EvaluateSpec, extractor: str) -> dict[str, float]:
    """Frechet (`fd_...`) and kernel distances (`kid_...`) from the reference images."""
    sets = {"": measured.seen["trained_features"], "floor_": measured.described["features"]}
    if "initial_features" in measured.seen:
        sets["untrained_"] = measured.seen["initial_features"]
    reference = torch.from_numpy(measured.reference["features"])
    found = {}
    for name, features in sets.items():
        own = torch.from_numpy(features)
        found[f"fd_{name}{extractor}"] = frechet_distance_of_features(own, reference)
        size = subset_size(len(reference))
        kid = kernel_distance(own, reference, subsets=KERNEL_SUBSETS, subset_size=size, seed=spec.seed)
        found[f"kid_{name}{extractor}"] = kid.value
        if not name:
            found[f"kid_error_{extractor}"] = kid.standard_error
    for kind in ("fd", "kid"):
        if f"{kind}_untrained_{extractor}" in found:
            model, floor, untrained = (found[f"{kind}_{name}{extractor}"] for name in ("", "floor_", "untrained_"))
            if untrained != floor:
                found[f"{kind}_closed"] = (untrained - model) / (untrained - floor)
    return found


def clip_scores(measured: Measured) -> dict[str, float]:
    """Mean cosine, times 100, of a caption with its picture by the model, by the untrained network, and with its own
    real image; empty without a judge."""
    if "texts" not in measured.seen:
        return {}
    texts = measured.seen["texts"].astype(np.float64)
    images = {"clip_score": measured.seen["trained_judged"], "clip_score_real": measured.described["judged"]}
    if "initial_judged" in measured.seen:
        images["clip_score_untrained"] = measured.seen["initial_judged"]
    return {name: 100 * float((texts * own).sum(axis=1).mean()) for name, own in images.items()}


def _faithfulness(
    pictures: Mapping[str, Array], real: Any, centre: Any, network: str, side: str, spec: EvaluateSpec
) -> dict[str, float]:
    """`z_features_...`, by the likeness of pictures to the prompts' real images, and `z_clip_...`, by the judge's view
    of pictures and prompts; empty for fewer than two prompts."""
    if real is None or len(real) < 2:
        return {}
    similarities = {"features": _unit(real - centre) @ _unit(pictures[f"{network}_features"] - centre).T}
    if "texts" in pictures:
        similarities["clip"] = pictures["texts"] @ pictures[f"{network}_judged"].T
    return {f"z_{name}_{side}": _estimate(similarity, spec).z for name, similarity in similarities.items()}


def _estimate(similarity: Any, spec: EvaluateSpec) -> Estimate:
    return faithfulness(torch.from_numpy(similarity), derangements=spec.derangements, seed=spec.seed)


def _unit(rows: Any) -> Any:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(lengths, np.finfo(np.float32).tiny)
