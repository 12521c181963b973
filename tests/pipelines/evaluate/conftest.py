"""The store of these tests is a local folder: what is in it is looked at as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.storage import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")
