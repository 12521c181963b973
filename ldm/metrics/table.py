"""Measures of generated images against real ones, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from ldm.errors import ConfigError
from ldm.metrics.frechet import frechet_distance_of_features
from ldm.metrics.kernel import kernel_distance
from ldm.metrics.manifolds import density_coverage, precision_recall
from ldm.metrics.monge import monge_distance
from ldm.metrics.sets import checked_pair

KERNEL_SUBSETS = 50
LARGEST_SUBSET = 1000
"""Images in the largest subset, as published kernel distances have it; a quarter of the images where they are too few
for such subsets to differ."""

Figures = dict[str, float]
Measure = Callable[[Tensor, Tensor, int], Figures]
"""Measure of features of generated images [N, D], of real ones [M, D], and a seed: figures by name."""


def _frechet(generated_ND: Tensor, real_MD: Tensor, _seed: int) -> Figures:
    return {"fd": frechet_distance_of_features(generated_ND, real_MD)}


def _kernel(generated_ND: Tensor, real_MD: Tensor, seed: int) -> Figures:
    size = min(LARGEST_SUBSET, max(2, min(len(generated_ND), len(real_MD)) // 4))
    found = kernel_distance(generated_ND, real_MD, subsets=KERNEL_SUBSETS, subset_size=size, seed=seed)
    return {"kid": found.value, "kid_error": found.standard_error}


def _monge(generated_ND: Tensor, real_MD: Tensor, seed: int) -> Figures:
    return {"mind": monge_distance(generated_ND, real_MD, seed=seed)}


def _precision_recall(generated_ND: Tensor, real_MD: Tensor, _seed: int) -> Figures:
    return vars(precision_recall(generated_ND, real_MD))


def _density_coverage(generated_ND: Tensor, real_MD: Tensor, _seed: int) -> Figures:
    return vars(density_coverage(generated_ND, real_MD))


METRICS: Mapping[str, Measure] = MappingProxyType(
    {
        "frechet": _frechet,
        "kernel": _kernel,
        "monge": _monge,
        "precision_recall": _precision_recall,
        "density_coverage": _density_coverage,
    }
)
"""What may be asked for; each with its usual settings. Their figures have names of their own: `fd`; `kid` and
`kid_error`; `mind`; `precision` and `recall`; `density` and `coverage`."""


def measured(names: Sequence[str], generated_ND: Tensor, real_MD: Tensor, *, seed: int = 0) -> Figures:
    """The figures of the metrics `names`.

    Raises `ConfigError` for a name that is not in `METRICS`, before anything is measured, and `InputError` for features
    that can't be measured: fewer than two images of a set, or than the neighbours that a metric counts, differing
    widths, or values that are not numbers.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ConfigError(f"metric {unknown[0]!r}: must be one of {', '.join(METRICS)}")
    generated, real = checked_pair(generated_ND, real_MD, ("features of generated images", "features of real images"))
    figures: Figures = {}
    for name in names:
        figures |= METRICS[name](generated, real, seed)
    return figures
