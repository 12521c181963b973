"""What can go wrong in training, by name. The message has the value, the rule, and what to do."""

from __future__ import annotations

from pipelines.errors import LatentworksError


class TrainError(LatentworksError):
    """Training can't start, or can't go on."""


class InputMissing(TrainError):
    """A rank can't find a file that it is to train on."""


class WorkerFailed(TrainError):
    """A training process died or raised, more often than it is started again."""
