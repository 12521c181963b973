"""The store of these tests is a local folder: what is in it is looked at as files. And a small CLIP of chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from asked import asked

from infra.storage import Store
from ldm.clip import build_clip, save_clip
from pipelines.artifacts import Artifact, Counts
from pipelines.building import building
from pipelines.publishing import publish_unit

SHAPE: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def write_clip(folder: Path, seed: int) -> Path:
    """A folder that open_clip loads."""
    torch.manual_seed(seed)
    save_clip(build_clip(SHAPE).state_dict(), SHAPE, folder)
    return folder


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "a_clip", 0)


@pytest.fixture
def trained_clip(store: Store, clip_folder: Path) -> Artifact:
    """The same model as an artifact of `train.clip`."""
    with building(store, "train.clip", asked(), {}, {}, 1) as build:
        files: dict[str, Path | bytes] = {f"clip/{path.name}": path for path in clip_folder.iterdir()}
        unit = publish_unit(store, "train.clip", build.unit_key({"seed": 0}), files, Counts(20, 20), {})
        return build.publish([unit])
