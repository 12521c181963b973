from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import InputError
from ldm.images import image_grid, save_png

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3), dtype=np.uint8))


def test_png_holds_pixels_and_facts(tmp_path: Path) -> None:
    save_png(IMAGES[0], tmp_path / "a.png", {"prompt": "flag of Åland, “noto”", "seed": 7, "guidance_scale": 3.0})
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), IMAGES[0].numpy())
        assert image.text["prompt"] == "flag of Åland, “noto”"
        assert json.loads(image.text["seed"]) == 7
        assert json.loads(image.text["guidance_scale"]) == 3.0


def test_same_image_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_png(IMAGES[0], tmp_path / name, {"seed": 7})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_grid_places_images_row_by_row() -> None:
    grid = image_grid(IMAGES, columns=2, gap=1)
    assert grid.shape == (3 * 4 + 2, 2 * 6 + 1, 3)
    for index, (top, left) in enumerate([(0, 0), (0, 7), (5, 0), (5, 7), (10, 0)]):
        assert torch.equal(grid[top : top + 4, left : left + 6], IMAGES[index])
    assert grid[10:, 7:].eq(255).all()
    assert grid[4].eq(255).all()


def test_grid_is_no_wider_than_its_images() -> None:
    assert torch.equal(image_grid(IMAGES[:1], columns=8), IMAGES[0])


def test_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be uint8"):
        save_png(IMAGES[0].float(), tmp_path / "a.png")
    with pytest.raises(InputError, match="columns 0"):
        image_grid(IMAGES, columns=0)
    with pytest.raises(InputError, match="at least 1"):
        image_grid(IMAGES[:0], columns=2)
