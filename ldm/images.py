"""Images as files: PNG with the facts of their making, and grids. Pillow is imported where a file is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError


def save_png(image: Tensor, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a uint8 image [H, W, 3] as PNG, with `facts` (prompt, seed, sampler, ...) as text chunks of their names.

    Values that are not strings are written as JSON. Raises `InputError` for another type or shape.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise InputError(f"image is {image.dtype} {tuple(image.shape)}: must be uint8 [height, width, 3]")
    chunks = PngInfo()
    for key, value in (facts or {}).items():
        chunks.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    Image.fromarray(image.cpu().numpy()).save(path, format="PNG", pnginfo=chunks)


def image_grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Uint8 images [N, H, W, C] as one [H', W', C], row by row, `gap` white pixels between them and no frame.

    Raises `InputError` if there are no images or no columns.
    """
    if images.ndim != 4 or len(images) == 0 or columns < 1:
        raise InputError(
            f"images are {tuple(images.shape)}, columns {columns}: must be [at least 1, H, W, C] and 1 or more"
        )
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    grid = torch.full(shape, 255, dtype=images.dtype, device=images.device)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid
