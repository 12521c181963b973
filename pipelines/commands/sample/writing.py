"""The pictures' files: where they may lie, what they tell of their making, and how they get there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.commands.sample.request import Request
from pipelines.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.commands.sample.given import Given, Picture
    from pipelines.commands.sample.plan import Plan, Way

SHOWN = (
    *("guidance_rescale", "guidance_interval", "eta", "threshold"),
    *("original_size", "crop", "aesthetic_score", "long_prompts", "variant", "prediction"),
)
"""What a picture's file tells of its request, where it was given."""


def file_of(request: Request, number: int) -> Path:
    """The file of one picture, by its number."""
    return request.out / f"{number:05d}.png"


def check_places(request: Request, count: int) -> None:
    """Raises `UsageError` if the pictures can't be written, or would take the place of files."""
    out, grid = request.out, request.grid
    files = [("--out", file_of(request, number)) for number in range(count)]
    if grid is not None:
        if grid.suffix.lower() != ".png":
            raise UsageError(f"--grid {grid}: must end in .png")
        if grid.resolve() in {file.resolve() for _, file in files}:
            raise UsageError(f"--grid {grid}: is the place of a picture, choose another")
        files.append(("--grid", grid))
    for option, folder in (("--out", out), ("--grid", None if grid is None else grid.parent)):
        if folder is not None:
            _check_folder(option, folder)
    for option, file in files:
        if file.is_dir():
            raise UsageError(f"{option}: {file} is a folder, and no place for a picture")
    taken = [(option, file) for option, file in files if file.exists() or file.is_symlink()]
    if taken and not request.overwrite:
        more = f", and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise UsageError(f"{taken[0][0]}: {taken[0][1]} is there already{more}: give another place, or --overwrite")


def _check_folder(option: str, folder: Path) -> None:
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists() or each.is_symlink())
    if not existing.is_dir():
        raise UsageError(f"{option}: {existing} is no folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{option}: {existing} can't be written")


def write(image: Tensor, file: Path, facts: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write a picture, uint8 [H, W, 3]: the file is there whole, or not at all.

    Raises `UsageError` if a file has come there meanwhile, `OSError` if there is no room.
    """
    from ldm.images import save_png

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".ldm-sample-", dir=file.parent) as folder:
            part = Path(folder) / file.name
            save_png(image, part, facts)
            if not overwrite and file.exists():
                raise UsageError(f"{file} has been written by another meanwhile: give another place, or --overwrite")
            part.replace(file)
    except (PermissionError, NotADirectoryError) as error:
        raise UsageError(f"{file} can't be written: {error}") from error


def facts_of(request: Request, plan: Plan, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What all pictures are made with, by the hash of each model."""
    facts: dict[str, Any] = {"model": hashes[request.model]} | _sampling(plan.ways[request.model])
    facts |= {"steps": plan.steps, "guidance_scale": plan.guidance_scale, "dtype": request.dtype}
    facts |= {name: getattr(plan, name) for name in ("strength", "noise_level") if getattr(plan, name) is not None}
    facts |= {name: getattr(request, name) for name in SHOWN if getattr(request, name) is not None}
    if request.loras:
        facts["loras"] = [{"sha256": hashes[str(lora.file)], "scale": lora.scale} for lora in request.loras]
    if request.weak is not None:
        facts["weak"] = hashes[request.weak]
    if request.refiner is not None:
        facts["refiner"] = {"model": hashes[request.refiner]} | _sampling(plan.ways[request.refiner])
        facts["refine_from"] = plan.refine_from
    if request.upscalers:
        facts["upscalers"] = [{"model": hashes[name]} | _sampling(plan.ways[name]) for name in request.upscalers]
    return facts


def facts_of_picture(given: Given, picture: Picture) -> dict[str, Any]:
    """What one picture has for itself."""
    facts: dict[str, Any] = {"seed": picture.seed}
    if picture.prompt is not None:
        facts["prompt"] = picture.prompt
    if picture.negative_prompt is not None:
        facts["negative_prompt"] = picture.negative_prompt
    for name, hashes, place in (
        ("image", given.image_hashes, picture.image),
        ("mask", given.mask_hashes, picture.mask),
    ):
        if place is not None:
            facts[f"{name}_sha256"] = hashes[place]
    return facts


def _sampling(way: Way) -> dict[str, Any]:
    facts: dict[str, Any] = {"sampler": way.sampler}
    if way.spacing is not None:
        facts["spacing"] = way.spacing
    usual = asdict(type(way.options)())
    finer = {name: value for name, value in asdict(way.options).items() if value != usual[name]}
    return facts | ({"sampler_options": finer} if finer else {})
