"""Figures: how good something is, as records that the stages publish, and everybody reads here alone.

A unit, and an artifact, has them in its `info` under "figures", most telling first. What a record means is in its
fields and never in its name: a figure of a name that nobody knows is shown, compared and sent on like any other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pipelines.dataset.errors import DatasetError
from pipelines.dataset.facts import Published

FIGURES = "figures"
NUMBERS = ("value", "error", "floor", "untrained")
KERNEL_DISTANCE, FRECHET_DISTANCE = "kernel_distance", "frechet_distance"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figure:
    """One number with all that it is to be read with."""

    name: str
    """ "kernel_distance", "clip_score", "psnr"."""
    subject: str
    """What was measured: "seen" and "held_out" (captions, or images, of that side of the split), "reconstructions"."""
    value: float
    extractor: str | None = None
    """Network by whose features, or in whose view, it is."""
    error: float | None = None
    """Standard error of `value`."""
    floor: float | None = None
    """What real images give in the place of the model's."""
    untrained: float | None = None
    """What the network gives before training."""
    count: int | None = None
    """How many images, or pairs, it is of."""

    @property
    def label(self) -> str:
        """ "kernel_distance/seen/efficientnet_lite0_128px": no other figure of an artifact has the same."""
        return "/".join(filter(None, (self.name, self.subject, self.extractor)))

    @property
    def closed(self) -> float | None:
        """How much of the way from `untrained` to `floor` is gone: 1 is all of it; None where that isn't known."""
        if self.floor is None or self.untrained is None or self.floor == self.untrained:
            return None
        return (self.untrained - self.value) / (self.untrained - self.floor)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Figure:
        """Raises `ValueError` for what is no figure."""
        names = {field.name for field in fields(cls)}
        if not {"name", "subject", "value"} <= value.keys() <= names or not is_number(value["value"]):
            raise ValueError(f"{dict(value)} is no figure: it has a name, a subject, a value, and of the rest {names}")
        return cls(**value)


def figures_of(published: Published) -> list[Figure]:
    """The figures of a unit or an artifact.

    One that was published before figures were records has numbers by name alone: figures of that name, of nothing said.

    Raises `DatasetError` if they are not what is written today.
    """
    records = published.info.get(FIGURES)
    if records is None:
        return [Figure(name, "", value) for name, value in published.info.items() if isinstance(value, float)]
    try:
        return [Figure.from_json(record) for record in records]
    except (ValueError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{published.stage}/{published.key} has figures that this version can't read ({error}); make it again with"
            f" `--force {published.stage}`"
        ) from error


def finite(figures: Iterable[Figure]) -> tuple[list[Figure], list[str]]:
    """The figures whose value is a number, without an error, a floor or the like that is none; and what was left out,
    by label."""
    kept: list[Figure] = []
    left_out: list[str] = []
    for figure in figures:
        odd = [name for name in NUMBERS if not math.isfinite(getattr(figure, name) or 0.0)]
        if "value" in odd:
            left_out.append(figure.label)
        else:
            left_out += [f"{figure.label} ({name})" for name in odd]
            without: dict[str, Any] = dict.fromkeys(odd)
            kept.append(replace(figure, **without))
    return kept, left_out


def records(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    """The figures as they are published, JSON values under `FIGURES`; what is not finite is left out, with a line in
    the log.

    Raises `ValueError` if two have one label.
    """
    kept, left_out = finite(figures)
    if left_out:
        logger.warning("figures that are not finite are left out: %s", ", ".join(left_out))
    metrics_of(kept)
    return [asdict(figure) for figure in kept]


def metrics_of(figures: Sequence[Figure]) -> dict[str, float]:
    """The finite numbers by name, for MLflow: "<label>" and, where they are known, "<label>/error", "/floor",
    "/untrained" and "/closed". Raises `ValueError` if two have one label."""
    labels = [figure.label for figure in figures]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"several figures are {twice[0]!r}: give each a name, subject or extractor of its own")
    found = {}
    for figure in figures:
        found[figure.label] = figure.value
        for name in ("error", "floor", "untrained", "closed"):
            value = getattr(figure, name)
            if value is not None:
                found[f"{figure.label}/{name}"] = value
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def is_number(value: Any) -> bool:
    """A figure, and not a flag or a name, among what a unit says of itself."""
    return isinstance(value, int | float) and not isinstance(value, bool)
