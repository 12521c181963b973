"""What can go wrong in scoring, by name. The message has the value, the rule, and what to do."""

from __future__ import annotations

from pipelines.errors import LatentworksError


class ScoreError(LatentworksError):
    """Pairs can't be scored, or scores can't be had."""


class ScorerMissing(ScoreError):
    """A scorer's package is not installed."""
