from __future__ import annotations

import pytest

from pipelines.acquire.filter import judge_caption, judge_size
from pipelines.dataset.ledger import Reason
from pipelines.recipe import PairFilter


@pytest.mark.parametrize(
    ("caption", "least", "reason"),
    [
        ("a cat", 5, None),
        ("a cat", 6, Reason.CAPTION_TOO_SHORT),
        ("  a  ", 2, Reason.CAPTION_TOO_SHORT),
        ("", 1, Reason.CAPTION_EMPTY),
        (" \n", 1, Reason.CAPTION_EMPTY),
        (None, 1, Reason.CAPTION_EMPTY),
        (None, 0, None),
        ("猫です", 3, None),
    ],
)
def test_captions(caption: str | None, least: int, reason: Reason | None) -> None:
    assert judge_caption(caption, PairFilter(min_caption_chars=least)) is reason


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((200, 200), None),
        ((199, 400), Reason.TOO_SMALL),
        ((200, 600), None),
        ((601, 200), Reason.TOO_ELONGATED),
        ((1, 1), Reason.TOO_SMALL),
    ],
)
def test_sizes(size: tuple[int, int], reason: Reason | None) -> None:
    assert judge_size(*size, PairFilter(min_side_px=200, max_aspect=3.0)) is reason


def test_tracking_pixels_are_never_images() -> None:
    assert judge_size(1, 1, PairFilter()) is Reason.TOO_SMALL
    assert judge_size(2, 2, PairFilter()) is None
