"""What can go wrong in scoring, by name. The message has the value, the rule, and what to do."""


class ScoreError(Exception):
    """Pairs can't be scored, or scores can't be had."""


class UnknownScore(ScoreError):
    """A column, or features, that the recipe did not ask for."""


class ScorerMissing(ScoreError):
    """A scorer's package is not installed."""


class ScoresDamaged(ScoreError):
    """Published scores don't hold a pair that they should hold."""
