"""What can be wrong with what was published, by name. The message has the value, the rule, and what to do."""

from __future__ import annotations

from pipelines.errors import LatentworksError


class DatasetError(LatentworksError):
    """Something published can't be used."""


class TableUnreadable(DatasetError):
    """A published table is missing, cut short or damaged."""


class CacheDamaged(DatasetError):
    """A file of the cache is not what `encode` wrote."""


class CacheMismatch(DatasetError):
    """A file of the cache was made with something else than it is to be used with; the message says which."""


class UnusableImage(DatasetError):
    """A selected image is missing from its shard, can't be decoded, or has values that can't be stored."""


class UnknownScore(DatasetError):
    """A column, or features, that the recipe did not ask for."""


class ScoresDamaged(DatasetError):
    """Published scores don't hold a pair that they should hold."""


class UnusableData(DatasetError):
    """There are too few samples, or one of them can't be read as what it is listed as."""
