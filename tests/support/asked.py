"""What a node is asked for, in tests: all of it is content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.artifacts import Identity


def asked(spec: Mapping[str, Any] | None = None) -> Identity:
    return Identity(dict(spec or {}), dict(spec or {}))
