"""Figures as records: what is published is what is read, nothing that is no number gets into JSON, no name is lost."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pipelines.dataset.errors import DatasetError
from pipelines.dataset.figures import Figure, figures_of, finite, metrics_of, records

KID = Figure("kernel_distance", "seen", 0.041, "net", error=0.002, floor=0.002, untrained=0.31, count=1000)
OWN = Figure("a_name_of_ones_own", "held_out", 3.0)


@dataclass(frozen=True)
class Published:
    info: dict[str, Any] = field(default_factory=dict)
    stage: str = "evaluate.base"
    key: str = "k"


def test_what_is_published_is_read_again_through_strict_json() -> None:
    text = json.dumps({"figures": records([KID, OWN]), "images": 12}, allow_nan=False)
    assert figures_of(Published(json.loads(text))) == [KID, OWN]
    assert figures_of(Published({"figures": []})) == []


def test_closed_is_computed_where_it_is_known() -> None:
    assert KID.closed == pytest.approx((0.31 - 0.041) / (0.31 - 0.002))
    assert OWN.closed is None
    assert replace(KID, untrained=KID.floor).closed is None
    better = Figure("clip_score", "seen", 27.0, floor=33.0, untrained=20.0)  # more is better
    assert better.closed == pytest.approx(7 / 13)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out_by_name(odd: float, caplog: pytest.LogCaptureFixture) -> None:
    figures = [replace(OWN, value=odd), replace(KID, error=odd, floor=odd)]
    kept, left_out = finite(figures)
    assert kept == [replace(KID, error=None, floor=None)]
    assert left_out == ["a_name_of_ones_own/held_out", *(f"{KID.label} ({name})" for name in ("error", "floor"))]
    json.dumps(records(figures), allow_nan=False)
    assert "a_name_of_ones_own/held_out" in caplog.text
    assert all(math.isfinite(value) for value in metrics_of(figures).values())


def test_metrics_have_a_name_for_each_number() -> None:
    label = "kernel_distance/seen/net"
    assert metrics_of([KID, OWN]) == {
        label: 0.041,
        f"{label}/error": 0.002,
        f"{label}/floor": 0.002,
        f"{label}/untrained": 0.31,
        f"{label}/closed": KID.closed,
        "a_name_of_ones_own/held_out": 3.0,
    }


def test_two_of_one_label_are_an_error_and_no_silent_choice() -> None:
    with pytest.raises(ValueError, match="several figures are 'kernel_distance/seen/net'"):
        records([KID, replace(KID, value=1.0)])
    assert len(metrics_of([KID, replace(KID, extractor="other")])) == 10


@pytest.mark.parametrize(
    "record",
    [{"name": "x"}, {"name": "x", "subject": "", "value": "1"}, {"name": "x", "subject": "", "value": 1, "new": 2}, 3],
)
def test_records_that_cannot_be_read_are_said_to_be_so(record: Any) -> None:
    with pytest.raises(DatasetError, match=r"evaluate.base/k has figures that this version can't read"):
        figures_of(Published({"figures": [record]}))


def test_numbers_of_before_there_were_records_are_told_by_their_names() -> None:
    before = Published({"steps": 12, "held_out_psnr_db": 28.5, "name": "x"})
    assert figures_of(before) == [Figure("held_out_psnr_db", "", 28.5)]
