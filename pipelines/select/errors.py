"""What can go wrong in selecting, by name. The message has the value, the rule, and what to do."""

from __future__ import annotations

from pipelines.errors import LatentworksError


class SelectError(LatentworksError):
    """The recipe's `select` block doesn't fit the acquired pairs."""


class NothingSelected(SelectError):
    """No pair is left to train on; the message says what became of them."""
