"""CLIP's image embeddings as features, of an open_clip folder or of one that transformers saved."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ldm.clip import CONFIG, load_clip
from ldm.features.extractor import FeatureExtractor, in_passes, safetensors_hash
from ldm.features.vision import image_processor, load_vision


class ClipImages:
    """Embeddings of length 1, as `ldm.clip` has them: squared distances are from 0 to 4, and so a Frechet distance is
    small.

    `sha256` is of the weights' names, types, shapes and values.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        """The CLIP of an open_clip folder. Raises `FolderError`."""
        self._clip = load_clip(folder, device)
        self.sha256 = self._clip.identity.rpartition("sha256:")[2]
        self.name = f"clip_{self.sha256[:8]}_{self._clip.image_size}px"
        self.width = self._clip.images(torch.zeros(1, 8, 8, 3, dtype=torch.uint8)).shape[1]

    def __call__(self, images_BHWC: Tensor) -> Tensor:
        """See `FeatureExtractor`. Raises `InputError` for another type or shape."""
        return in_passes(images_BHWC, self.width, lambda images: self._clip.images(images.permute(0, 2, 3, 1)))


class TransformersClipImages:
    """Embeddings like those of `ClipImages`, of a folder that transformers saved: a CLIPModel, or its vision half with
    the projection. Images are resized, cropped and normalised as the folder's `preprocessor_config.json` has it.

    `sha256` is of the files of weights.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Raises `ExtractorMissing` without transformers, `FolderError` if the folder holds no such model."""
        self.sha256 = safetensors_hash(folder)
        self._processor = image_processor(folder)
        self._network = load_vision(folder, "CLIPVisionModelWithProjection", ("clip", "clip_vision_model"), device)
        self.width = int(self._network.config.projection_dim)
        self.name = f"clip_{self.sha256[:8]}_{self._network.config.image_size}px"
        self._device = device

    @torch.inference_mode()
    def __call__(self, images_BHWC: Tensor) -> Tensor:
        """See `FeatureExtractor`. Raises `InputError` for another type or shape."""
        return in_passes(images_BHWC, self.width, self._features)

    def _features(self, images_BCHW: Tensor) -> Tensor:
        pixels = self._processor(images_BCHW.to(self._device), return_tensors="pt")["pixel_values"]
        return torch.nn.functional.normalize(self._network(pixels).image_embeds.float(), dim=-1)


def load_clip_images(folder: Path, device: torch.device) -> FeatureExtractor:
    """Either, by the files in the folder. Raises `ExtractorMissing` or `FolderError`."""
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        return TransformersClipImages(folder, device)
    return ClipImages(folder, device)
