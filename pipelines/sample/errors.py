"""What `ldm sample` can't do."""

from __future__ import annotations


class UsageError(Exception):
    """An argument can't be used; the message says which and what would do."""
