"""The store of these tests is a local folder: what is in it is looked at as files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from infra.storage import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread, unless OMP_NUM_THREADS says otherwise: networks are so small here that two are no faster, and take
    many times as long as soon as anything else runs, each waiting for the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if "OMP_NUM_THREADS" in os.environ else 1)
    yield
    torch.set_num_threads(before)
