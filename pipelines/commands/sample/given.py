"""What `ldm sample` is given beside a model: the pictures asked for, one by one, and images and LoRAs read early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.artifacts import file_sha256
from pipelines.commands.sample.prompts import Row, read_prompts
from pipelines.commands.sample.request import LARGEST_SEED, Lora, Request, option_of
from pipelines.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

OPAQUE = 127
"""Grey levels of a mask above this are made anew."""


@dataclass(frozen=True)
class Picture:
    """One picture to be made. `image` and `mask` are the number of those given that is its own."""

    number: int
    seed: int
    prompt: str | None = None
    negative_prompt: str | None = None
    image: int | None = None
    mask: int | None = None


@dataclass(frozen=True)
class Given:
    """All that the pictures are made from."""

    pictures: Sequence[Picture]
    images: Tensor | None
    """uint8 [I, H, W, 3]."""
    masks: Tensor | None
    """bool [M, H, W], true where to make anew."""
    image_hashes: Sequence[str] = ()
    """sha256 of the files of images and masks as they were read: a picture may take the place of one."""
    mask_hashes: Sequence[str] = ()

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the images, in pixels."""
        return None if self.images is None else (self.images.shape[1], self.images.shape[2])

    def batches(self, size: int) -> Iterator[list[Picture]]:
        """The pictures in their order, at most `size` of them at a time; with and without a negative prompt apart, as
        the empty prompt of some models is not that of no words."""
        for _, alike in groupby(self.pictures, key=lambda picture: picture.negative_prompt is None):
            pictures = list(alike)
            yield from (pictures[start : start + size] for start in range(0, len(pictures), size))


def read_given(request: Request) -> Given:
    """Raises `UsageError` naming the option and the file for what can't be read, or doesn't fit the rest."""
    rows = [Row(prompt) for prompt in request.prompts]
    if request.prompts_file is not None:
        rows = read_prompts(request.prompts_file, request.tell)
    for lora in request.loras:
        _check_lora(lora)
    images, masks = _read("images", request.images, "RGB"), _read("masks", request.masks, "L")
    if images is not None and masks is not None and images.shape[1:3] != masks.shape[1:3]:
        sizes = [f"{each.shape[2]}x{each.shape[1]}" for each in (masks, images)]
        raise UsageError(f"--mask {request.masks[0]}: is {sizes[0]}, and --image {sizes[1]}: must be of one size")
    return Given(
        _pictures(request, rows),
        images,
        None if masks is None else masks[..., 0] > OPAQUE,
        [file_sha256(file) for file in request.images],
        [file_sha256(file) for file in request.masks],
    )


def _pictures(request: Request, rows: Sequence[Row]) -> list[Picture]:
    count = max(len(rows), len(request.images))
    if min(len(rows), len(request.images)) > 1 and len(rows) != len(request.images):
        raise UsageError(
            f"--image: {len(request.images)} of them and {len(rows)} prompts: give one for each prompt, or one for all"
        )
    negatives = request.negative_prompts
    for name, given in (("negative_prompts", negatives), ("masks", request.masks)):
        if len(given) not in (0, 1, count):
            raise UsageError(f"{option_of(name)}: {len(given)} of them for {count}: give one for all, or one for each")

    def own(many: int, place: int) -> int | None:
        return None if many == 0 else place % many

    pictures: list[Picture] = []
    for place in range(count):
        row = rows[place % len(rows)] if rows else None
        negative = own(len(negatives), place)
        for turn in range(request.count):
            number = len(pictures)
            seed = request.seed + number if row is None or row.seed is None else row.seed + turn
            if seed >= LARGEST_SEED:
                raise UsageError(f"--seed {request.seed}: picture {number} would have {seed}: must be below 2^63")
            words = None if row is None else row.negative_prompt
            if words is None and negative is not None:
                words = negatives[negative]
            pictures.append(
                Picture(
                    number,
                    seed,
                    None if row is None else row.prompt,
                    words,
                    own(len(request.images), place),
                    own(len(request.masks), place),
                )
            )
    return pictures


def _read(name: str, files: Sequence[Path], mode: str) -> Tensor | None:
    """Uint8 [N, H, W, 1 or 3]; None for no files."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    images = []
    for file in files:
        where = f"{option_of(name)} {file}"
        try:
            with Image.open(file) as image:
                if image.mode.startswith(("I", "F")):  # Pillow would cut them off at 255
                    raise UsageError(f"{where}: has more than 8 bits a channel: give it with 8")
                upright = ImageOps.exif_transpose(image)
                images.append(torch.from_numpy(np.array(upright.convert(mode))))
        # Pillow's readers raise what they like for a damaged file.
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise UsageError(f"{where}: can't be read as an image: {error}") from error
        if images[-1].shape != images[0].shape:
            sizes = [f"{each.shape[1]}x{each.shape[0]}" for each in (images[-1], images[0])]
            raise UsageError(f"{where}: is {sizes[0]}, and {files[0]} {sizes[1]}: must be of one size")
    if not images:
        return None
    stacked = torch.stack(images)
    return stacked if stacked.ndim == 4 else stacked[..., None]


def _check_lora(lora: Lora) -> None:
    """That it is a file with tensors. Whether they fit is known when the model is loaded."""
    from safetensors import SafetensorError, safe_open

    from ldm.interchange.lora import WEIGHTS

    path = lora.file / WEIGHTS if lora.file.is_dir() else lora.file
    try:
        with safe_open(path, framework="pt") as opened:
            if opened.keys():
                return
        reason = "has no tensors"
    except (OSError, SafetensorError) as error:
        reason = f"{'is absent' if isinstance(error, FileNotFoundError) else f'is no safetensors: {error}'}"
    raise UsageError(f"--lora {path}: {reason}")
