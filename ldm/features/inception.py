"""The network of FID: Inception v3 as TensorFlow's graph of 2015 has it, by torch-fidelity."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import FolderError
from ldm.features.extractor import in_passes, package


class Inception:
    """Inception v3 (Szegedy et al. 2016) with the graph's own pooling and resizing: the averages over all positions of
    its last block, 2048 numbers. What published FIDs were measured with, given the weights
    `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity's releases.

    `sha256` is of the file of weights.
    """

    width = 2048

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Raises `ExtractorMissing` without torch-fidelity, `FolderError` if the weights can't be read or are of
        another network."""
        module = package("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
        try:
            content = weights.read_bytes()
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise FolderError(f"Inception's weights {weights} can't be read: {_first_line(error)}") from error
        network = _network(module, state, weights)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.name = f"inception_{self.sha256[:8]}_{network.INPUT_IMAGE_SIZE}px"
        self._network = network.to(device)
        self._device = device

    @torch.inference_mode()
    def __call__(self, images_BHWC: Tensor) -> Tensor:
        """See `FeatureExtractor`. Raises `InputError` for another type or shape."""
        return in_passes(images_BHWC, self.width, self._features)

    def _features(self, images_BCHW: Tensor) -> Tensor:
        features: Tensor = self._network(images_BCHW.to(self._device))[0]
        return features


def _network(module: Any, state: Any, weights: Path) -> Any:
    """torch-fidelity's class loads weights only as it is built, and unpickles them without restraint: it is given a
    file written here, of tensors that were read with restraint."""
    if not isinstance(state, dict):
        raise FolderError(f"{weights} has a {type(state).__name__}: must be Inception's weights by name")
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        return module.FeatureExtractorInceptionV3(
            "inception-v3-compat", [str(Inception.width)], feature_extractor_weights_path=file
        )
    except RuntimeError as error:
        raise FolderError(
            f"{weights} doesn't fit torch-fidelity's Inception ({_first_line(error)}):"
            " give weights-inception-2015-12-05-6726825d.pth of its releases"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
