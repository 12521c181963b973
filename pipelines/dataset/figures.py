"""Names of the figures that `evaluate` publishes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_number(value: Any) -> bool:
    """A figure, and not a flag or a name, among what a unit says of itself."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def distance_names(metrics: Mapping[str, float], kind: str) -> list[str]:
    """Names of the distances themselves ("fd_efficientnet_lite0_128px"), without their floors and errors, in order.

    `kind` is "fd" or "kid".
    """
    beside = (f"{kind}_closed", f"{kind}_error_", f"{kind}_floor_", f"{kind}_untrained_")
    return sorted(name for name in metrics if name.startswith(f"{kind}_") and not name.startswith(beside))
