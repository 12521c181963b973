"""Self-contained HTML pages: what the reports have in common. No request leaves a page, no script runs in it.

Captions and addresses come from the web: every value is escaped by the template engine, and pages forbid themselves
scripts and requests by their content security policy.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.dataset.funnel import Funnel
from pipelines.terminal.words import number, percent

WEBP_QUALITY = 82


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart: `share`, 0 to 1, is its length, `kind` its colour (kept, dropped, failed, idle)."""

    label: str
    text: str
    share: float
    kind: str


@dataclass(frozen=True)
class Threshold:
    """A rule drawn into a histogram; `place` is 0 (left edge) to 1."""

    text: str
    place: float


@dataclass(frozen=True)
class Histogram:
    """Heights of two histograms over the same bins, each 0 to 1: all values, and those of the selected rows."""

    title: str
    low: str
    high: str
    heights: Sequence[float]
    selected: Sequence[float]
    thresholds: Sequence[Threshold] = ()
    note: str = ""


def render(template: str, **values: Any) -> str:
    """The page `template` (a file of this package) with `values`, escaped. Raises jinja2's errors for a missing one."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def data_uri(data: bytes, mime: str) -> str:
    """`data` as an address that holds it."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def picture(pixels: NDArray[np.uint8], side_px: int) -> str:
    """An RGB image [h, w, 3], made to fit a square of `side_px` if it is larger, as a WebP data URI."""
    import cv2

    scale = side_px / max(pixels.shape[:2])
    if scale < 1:
        size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
        pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
    _, encoded = cv2.imencode(".webp", pixels[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY])
    return data_uri(encoded.tobytes(), "image/webp")


def funnel_bars(account: Funnel, sides: Mapping[str, int]) -> list[tuple[str, list[Bar]]]:
    """A chart for each step of the funnel, titled with what came in; `sides` are the parts of what is left."""
    charts = []
    for step in account.steps:
        rows = [("kept", "", step.kept)]
        for outcome, reasons in (("dropped", step.dropped), ("failed", step.failed)):
            ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
            rows += [(outcome, reason, count) for reason, count in ordered]
        bars = [count_bar(": ".join(filter(None, (kind, reason))), n, step.total, kind) for kind, reason, n in rows]
        charts.append((f"{step.node}: {step.total:,} {step.unit} in", bars))
    total = sum(sides.values())
    if total:
        bars = [count_bar(side.replace("_", " "), count, total, "kept") for side, count in sides.items()]
        charts.append((f"split: {total:,} pairs", bars))
    return charts


def count_bar(label: str, count: int, total: int, kind: str) -> Bar:
    share = count / total if total else 0.0
    return Bar(label, f"{count:,} ({percent(share)})", share, kind)


def histogram(
    title: str,
    values: NDArray[Any],
    selected: NDArray[np.bool_],
    rules: Sequence[tuple[str, float]] = (),
    bins: int = 48,
) -> Histogram | None:
    """A histogram of the finite values; `rules` are (text, threshold), and lie within its range. None if there are no
    values.

    Whole numbers get bins of whole numbers.
    """
    finite = np.isfinite(values)
    values, selected = values[finite].astype(np.float64), selected[finite]
    if not len(values):
        return None
    low, high = (float(edge(values)) for edge in (np.min, np.max))
    low, high = min([low, *(at for _, at in rules)]), max([high, *(at for _, at in rules)])
    whole = bool((values == np.round(values)).all())
    if whole:
        step = max(1, math.ceil((high - low + 1) / bins))
        edges = np.arange(math.floor(low), math.ceil(high) + step + 1, step, dtype=np.float64)
    else:
        edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    counts, counts_selected = (np.histogram(part, edges)[0] for part in (values, values[selected]))
    peak, span = int(counts.max()), edges[-1] - edges[0]
    return Histogram(
        title,
        _edge(edges[0], span),
        _edge(edges[-1] - whole, span),
        [float(count) / peak for count in counts],
        [float(count) / peak for count in counts_selected],
        [Threshold(text, float((at - edges[0]) / span)) for text, at in rules],
        f"highest bar: {peak:,} pairs",
    )


def _edge(value: float, span: float) -> str:
    """As exactly as the span lets see."""
    return number(round(float(value), 3 - math.floor(math.log10(span))))
