"""From features and judgements to a model's figures. Pure functions over arrays: float32, one row an image.

Each figure stands beside two others of as many images: the *floor*, real images in the place of pictures, and that of
the *untrained* network. How much of the way between them is closed doesn't depend on the extractor's scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.metrics import (
    faithfulness,
    frechet_distance_of_features,
    kernel_distance,
    monge_distance,
    precision_recall,
)
from pipelines.dataset.figures import FRECHET_DISTANCE, KERNEL_DISTANCE, Figure
from pipelines.recipe import EvaluateSpec

KERNEL_SUBSETS = 50
MAX_SUBSET_SIZE = 1000
"""Images in the largest subset, as published kernel distances have it; a quarter of the images where they are too few
for such subsets to differ."""
NEIGHBOURS = 3
"""Neighbours that precision and recall look at, as published."""
MAX_MANIFOLD = 10_000
"""Images for precision and recall, whose time grows with the square of their number."""
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


def judge_name(judge: str) -> str:
    """What figures call the judge: as the recipe does; a folder by its last part, wherever it lies."""
    return judge if judge.startswith("hub:") else Path(judge).name


def figures(measured: Measured, places: Sequence[int], spec: EvaluateSpec, extractor: str) -> list[Figure]:
    """All figures, most telling first; `places` are the rows of `seen` whose prompts differ, for faithfulness."""
    kernel, frechet, *others = distances(measured, spec, extractor)
    scores, faithful = clip_scores(measured, spec), faithfulness_figures(measured, places, spec, extractor)
    return [kernel, frechet, *scores, *others, *faithful]


def distances(measured: Measured, spec: EvaluateSpec, extractor: str) -> list[Figure]:
    """Kernel, Frechet and Monge distance of the pictures from the reference images, precision and recall."""
    reference = torch.from_numpy(measured.reference["features"])
    sets = _networks(measured.seen, "features") | {"floor": measured.described["features"]}
    tensors = {beside: torch.from_numpy(features) for beside, features in sets.items()}

    def figure(name: str, values: Mapping[str, float], error: float | None = None, most: int | None = None) -> Figure:
        count = len(reference[:most])
        return Figure(name, "seen", extractor=extractor, error=error, count=count, **values)

    size = subset_size(len(reference))
    kernel = {
        beside: kernel_distance(own, reference, subsets=KERNEL_SUBSETS, subset_size=size, seed=spec.seed)
        for beside, own in tensors.items()
    }
    frechet = {beside: frechet_distance_of_features(own, reference) for beside, own in tensors.items()}
    monge = {beside: monge_distance(own, reference, seed=spec.seed) for beside, own in tensors.items()}
    found = [
        figure(KERNEL_DISTANCE, {beside: one.value for beside, one in kernel.items()}, kernel["value"].standard_error),
        figure(FRECHET_DISTANCE, frechet),
        figure("monge_distance", monge),
    ]
    if len(reference) > NEIGHBOURS:
        some = reference[:MAX_MANIFOLD]  # rows are in the order of a hash: the first are a sample
        overlap = {
            beside: precision_recall(own[:MAX_MANIFOLD], some, neighbours=NEIGHBOURS) for beside, own in tensors.items()
        }
        for name in ("precision", "recall"):
            found.append(
                figure(name, {beside: getattr(one, name) for beside, one in overlap.items()}, most=MAX_MANIFOLD)
            )
    return found


def clip_scores(measured: Measured, spec: EvaluateSpec) -> list[Figure]:
    """Mean cosine, times 100, of a caption with its picture by the model; beside it with the untrained network's, and
    with its own real image. Empty without a judge."""
    if "texts" not in measured.seen:
        return []
    texts = measured.seen["texts"].astype(np.float64)
    images = _networks(measured.seen, "judged") | {"floor": measured.described["judged"]}
    cosines = {name: 100 * (texts * own).sum(axis=1) for name, own in images.items()}
    means = {name: float(own.mean()) for name, own in cosines.items()}
    count = len(texts)
    error = float(cosines["value"].std(ddof=1)) / math.sqrt(count) if count > 1 else None
    return [Figure("clip_score", "seen", extractor=_judge(spec), error=error, count=count, **means)]


def faithfulness_figures(measured: Measured, places: Sequence[int], spec: EvaluateSpec, extractor: str) -> list[Figure]:
    """How many standard errors pictures are more like their own prompts than like others: first in the judge's view of
    both, beside the prompts' real images, then by the likeness of pictures to the prompts' real images.

    Sides of fewer than two prompts have none.
    """
    centre = measured.reference["features"].mean(axis=0)
    sides = {
        "seen": (_rows(measured.seen, places), _rows(measured.described, places)),
        "held_out": (measured.unseen, measured.held_out),
    }
    by_judge, by_features = [], []
    for side, (pictures, real) in sides.items():
        count = len(real.get("features", ()))
        if count < 2:
            continue
        own = _unit(real["features"] - centre)
        likeness = {name: own @ _unit(found - centre).T for name, found in _networks(pictures, "features").items()}
        zs = {name: _z(similarity, spec) for name, similarity in likeness.items()}
        by_features.append(Figure("faithfulness", side, extractor=extractor, count=count, **zs))
        if "texts" in pictures:
            views = _networks(pictures, "judged") | ({"floor": real["judged"]} if "judged" in real else {})
            zs = {name: _z(pictures["texts"] @ view.T, spec) for name, view in views.items()}
            by_judge.append(Figure("faithfulness", side, extractor=_judge(spec), count=count, **zs))
    return [*by_judge, *by_features]


def _networks(pictures: Mapping[str, Array], kind: str) -> dict[str, Array]:
    """What is told of the trained network's pictures, and of the untrained one's where there are such."""
    names = {"value": f"trained_{kind}", "untrained": f"initial_{kind}"}
    return {beside: pictures[name] for beside, name in names.items() if name in pictures}


def _rows(arrays: Mapping[str, Array], rows: Sequence[int]) -> dict[str, Array]:
    return {name: own[list(rows)] for name, own in arrays.items()}


def _judge(spec: EvaluateSpec) -> str:
    assert spec.judge is not None, "what nobody judges has no texts"
    return judge_name(spec.judge)


def _z(similarity: Any, spec: EvaluateSpec) -> float:
    """Infinite where nothing varies."""
    return faithfulness(torch.from_numpy(similarity), derangements=spec.derangements, seed=spec.seed).z


def _unit(rows: Any) -> Any:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(lengths, np.finfo(np.float32).tiny)
