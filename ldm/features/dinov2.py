"""DINOv2, of a folder that transformers saved."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ldm.features.extractor import in_passes, safetensors_hash, squashed
from ldm.features.vision import load_vision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's pixels in [0, 1], by channel, which it was trained with."""


class Dinov2:
    """DINOv2 (Oquab et al. 2023): the class token after the last normalisation, which Stein et al. (2023) found closer
    to people's judgement of generated images than Inception's features.

    Images are resized to 224 px squares (bicubic, antialiased), as theirs are, not cropped. `sha256` is of the files of
    weights.
    """

    size_px = 224

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Raises `ExtractorMissing` without transformers, `FolderError` if the folder holds no such model."""
        self.sha256 = safetensors_hash(folder)
        self._network = load_vision(folder, "Dinov2Model", ("dinov2",), device)
        self.width = int(self._network.config.hidden_size)
        self.name = f"dinov2_{self.sha256[:8]}_{self.size_px}px"
        self._device = device

    @torch.inference_mode()
    def __call__(self, images_BHWC: Tensor) -> Tensor:
        """See `FeatureExtractor`. Raises `InputError` for another type or shape."""
        return in_passes(images_BHWC, self.width, self._features)

    def _features(self, images_BCHW: Tensor) -> Tensor:
        pixels = squashed(images_BCHW.to(self._device), self.size_px) / 255
        mean, std = (torch.tensor(values, device=self._device).view(1, 3, 1, 1) for values in (MEAN, STD))
        features: Tensor = self._network((pixels - mean) / std).pooler_output
        return features
