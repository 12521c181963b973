"""What is dropped while downloading, because keeping it would cost storage: keep (None) or the reason to drop.

Everything that needs a model or another image to compare with is left to later stages.
"""

from __future__ import annotations

from pipelines.dataset.ledger import Reason
from pipelines.recipe import PairFilter

MIN_SIDE_PX = 2
"""Whatever the recipe says: an image of a single row or column is a tracking pixel or a ruler."""


def judge_caption(caption: str | None, rules: PairFilter) -> Reason | None:
    """Before anything is fetched."""
    length = len((caption or "").strip())
    if length >= rules.min_caption_chars:
        return None
    return Reason.CAPTION_TOO_SHORT if length else Reason.CAPTION_EMPTY


def judge_size(width: int, height: int, rules: PairFilter) -> Reason | None:
    """Before anything is decoded; width and height are those of the upright original."""
    if min(width, height) < max(rules.min_side_px, MIN_SIDE_PX):
        return Reason.TOO_SMALL
    if max(width, height) > rules.max_aspect * min(width, height):
        return Reason.TOO_ELONGATED
    return None
