"""Frechet distance of two sets of features, from the features on, against torch-fidelity."""

from __future__ import annotations

from importlib import metadata

import torch
from cases.compare import Result, Side, compare

from ldm.metrics import FeatureMoments, frechet_distance

AIM = 1.8


def run(*, quick: bool, device: str, compiled: bool) -> list[Result]:  # noqa: ARG001
    """Moments of both sets and their distance, in float64 on the CPU, whatever is asked for.

    Both are given float64: of float32 features, torch-fidelity averages in float32, and the distances would differ by
    more than the tolerance.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    count, width = (1_000, 256) if quick else (10_000, 2_048)
    x, y = features(count, width, seed=0), features(count, width, seed=1)

    def ours() -> float:
        moments = []
        for rows in (x, y):
            moments.append(FeatureMoments(width))
            moments[-1].add(rows)
        return frechet_distance(*moments)

    def theirs() -> float:
        statistics = [fid_features_to_statistics(rows) for rows in (x, y)]
        return float(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])

    return [
        compare(
            "frechet",
            f"{count:,} x {width:,} features",
            Side("ldm", {"float64": lambda: ours}),
            Side(f"torch-fidelity {metadata.version('torch-fidelity')}", {"float64": lambda: theirs}),
            device="cpu",
            rounds=3 if quick else 5,
            tolerances={"float64": 1e-5},
            aim=AIM,
        )
    ]


def features(count: int, width: int, seed: int) -> torch.Tensor:
    """Like a classifier's: not negative, correlated, and with variances that fall over three orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    scale = torch.logspace(0, -1.5, width, dtype=torch.float64)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return ((rows * scale) @ mix + 0.3).clamp(min=0)
