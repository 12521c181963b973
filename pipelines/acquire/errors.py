"""What can go wrong in acquiring, by name. A single URL that fails is no error: it is a row of the ledger."""

from __future__ import annotations

from pipelines.errors import LatentworksError, WrongUsage


class AcquireError(LatentworksError):
    """The stage can't go on; what it has published stays, and the same command goes on from there."""


class SourceError(AcquireError, WrongUsage):
    """A source list can't be used: a missing file, a wrong column, an empty list."""


class NoImages(AcquireError):
    """Not one image could be kept; the message counts the reasons."""


class ShardFailed(AcquireError):
    """A shard couldn't be made: its worker died again and again, the disk is full, or a row was lost."""
