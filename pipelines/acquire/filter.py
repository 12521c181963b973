"""What is dropped while downloading, because keeping it would cost storage: keep (None) or the reason to drop.

Everything that needs a model or another image to compare with is left to later stages. What a ledger knows of an answer
is judged by the same rules, in the same order and in the same words as the answer itself would be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.dataset.ledger import Reason
from pipelines.recipe import AcquireSpec, PairFilter

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


def judge_known(row: Mapping[str, Any], spec: AcquireSpec) -> tuple[Reason, str] | None:
    """Reason and message by which today's rules drop what a ledger's row knows of an answer.

    None: nothing that is known speaks against it; what isn't known, may.
    """
    if spec.fetch.opt_out and row["opt_out"] is not None:
        return Reason.OPT_OUT, opt_out_message(row["opt_out"]["evidence"])
    if (row["original_bytes"] or 0) > spec.fetch.max_bytes:
        return Reason.TOO_MANY_BYTES, too_many_bytes_message(spec.fetch.max_bytes)
    width, height = row["original_width"], row["original_height"]
    if width is None or height is None:
        return None
    if width * height > spec.fetch.max_pixels:
        return Reason.TOO_MANY_PIXELS, too_many_pixels_message(width, height, spec.fetch.max_pixels)
    reason = judge_size(width, height, spec.filter)
    return None if reason is None else (reason, size_message(width, height, reason))


def opt_out_message(evidence: str) -> str:
    return f"opted out by {evidence}"


def too_many_bytes_message(limit: int) -> str:
    """The same whether the size was announced or met on the way: a ledger doesn't know which."""
    return f"more than the {limit} bytes that are allowed"


def too_many_pixels_message(width: int, height: int, limit: int) -> str:
    return f"{width}x{height} is more than the {limit} pixels allowed"


def size_message(width: int, height: int, reason: Reason) -> str:
    return f"{width}x{height}: {reason}"
