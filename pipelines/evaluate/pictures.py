"""What of the pictures is published: those of the recipe's prompts, one by one and as a grid, and some beside the real
images of their captions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.images import image_grid, save_png
from pipelines.evaluate.generate import Shot
from pipelines.evaluate.pairs import Pair

Files = dict[str, Path | bytes]


def write_samples(folder: Path, images: Tensor, shots: Sequence[Shot], columns: int, facts: Mapping[str, Any]) -> Files:
    """`images/00000.png`... and `grid.png`, uint8 [N, H, W, 3]; `facts` is what all pictures have in common."""
    files: Files = {}
    for number, (image, shot) in enumerate(zip(images, shots, strict=True)):
        path = folder / f"{number:05d}.png"
        save_png(image, path, {**facts, "prompt": shot.prompt, "seed": shot.seed})
        files[f"images/{path.name}"] = path
    files["grid.png"] = folder / "grid.png"
    save_png(image_grid(images, columns), folder / "grid.png", facts)
    return files


def write_pairs(folder: Path, sides: Sequence[tuple[Tensor, Tensor]], facts: Mapping[str, Any]) -> Files:
    """`pairs.png`: for each side a row of real images and below it the pictures of their captions, in the same order.

    A side is (real, pictures), both uint8 [n, H, W, 3].
    """
    columns = max(len(real) for real, _ in sides)
    rows = [_padded(images, columns) for side in sides for images in side]
    save_png(image_grid(torch.cat(rows), columns), folder / "pairs.png", facts)
    return {"pairs.png": folder / "pairs.png"}


def describe(shots: Sequence[Shot], shown: Sequence[Sequence[Pair]], facts: Mapping[str, Any]) -> bytes:
    """`samples.json`: prompts and seeds of the pictures, and the captions of each side of `pairs.png`, if there is one,
    from left to right."""
    samples = [
        {"file": f"images/{number:05d}.png", "prompt": shot.prompt, "seed": shot.seed}
        for number, shot in enumerate(shots)
    ]
    described: dict[str, Any] = {**facts, "samples": samples}
    if shown:
        described["pairs"] = [
            [{"prompt": pair.caption, "uid": pair.uid, "split": pair.split} for pair in side] for side in shown
        ]
    return (json.dumps(described, indent=2, ensure_ascii=False) + "\n").encode()


def _padded(images: Tensor, count: int) -> Tensor:
    """Followed by white ones."""
    white = torch.full((count - len(images), *images.shape[1:]), 255, dtype=images.dtype)
    return torch.cat([images, white])
