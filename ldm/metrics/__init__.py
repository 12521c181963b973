"""Measures of images and of sets of images, as pure functions.

Distances between sets are of features (`ldm.features`), one row an image: N or M images, D features. They are computed
in float64 on the CPU.

Sets too large for memory are gathered in parts, in any order and by any number of workers whose parts are merged:
`FeatureMoments` for the Frechet distance, `FeatureSample` for kernel and Monge distances, precision and recall,
`RunningMean` for what is a mean over images (`clip_scores`, `psnr`, `losses_at_times`). Their memory doesn't grow with
the set. `measured` gives all figures of two sets that are asked for by name (`METRICS`).
"""

from __future__ import annotations

from ldm.metrics.estimates import Estimate, RunningMean
from ldm.metrics.frechet import FeatureMoments, frechet_distance, frechet_distance_of_features
from ldm.metrics.kernel import kernel_distance, kernel_distance_of_subsets
from ldm.metrics.manifolds import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from ldm.metrics.monge import monge_distance
from ldm.metrics.pairs import clip_scores, derangement, faithfulness, psnr
from ldm.metrics.sets import FeatureSample
from ldm.metrics.table import METRICS, measured
from ldm.metrics.validation import losses_at_times

__all__ = [
    "METRICS",
    "DensityCoverage",
    "Estimate",
    "FeatureMoments",
    "FeatureSample",
    "PrecisionRecall",
    "RunningMean",
    "clip_scores",
    "density_coverage",
    "derangement",
    "faithfulness",
    "frechet_distance",
    "frechet_distance_of_features",
    "kernel_distance",
    "kernel_distance_of_subsets",
    "losses_at_times",
    "measured",
    "monge_distance",
    "precision_recall",
    "psnr",
]
