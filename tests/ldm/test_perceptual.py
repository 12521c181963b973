from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import InputError
from ldm.features import ExtractorMissing
from ldm.perceptual import BLOCKS, MEAN, STD, Perceptual, load_perceptual

SMALL = ((4, 4), (6,))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def vgg16() -> dict[str, Tensor]:
    """Random weights under torchvision's names, at the scale that keeps activations alive."""
    with torch.device("meta"):
        shapes = {
            f"features.{name}": value.shape for name, value in torchvision.models.vgg16().features.state_dict().items()
        }
    draw = seeded()
    return {
        name: torch.randn(shape, generator=draw) * ((2 / shape[1:].numel()) ** 0.5 if len(shape) == 4 else 0.1)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.rand(2, 2, 3, 32, 40, generator=seeded()) * 2 - 1


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_features_are_those_of_torchvision(
    tmp_path: Path, vgg16: dict[str, Tensor], pixels: Tensor, suffix: str
) -> None:
    path = tmp_path / f"vgg16{suffix}"
    save_file(vgg16, path) if suffix == ".safetensors" else torch.save(vgg16, path)
    network = load_perceptual(path)
    with torch.device("meta"):
        theirs = torchvision.models.vgg16().features
    theirs.load_state_dict({name.removeprefix("features."): value for name, value in vgg16.items()}, assign=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    hidden = (pixels[0] / 2 + 0.5 - mean) / std
    expected = []
    for index, layer in enumerate(theirs):
        hidden = layer(hidden)
        if index in (3, 8, 15, 22, 29):
            expected.append(hidden.clone())
    found = network.features(pixels[0])
    assert [features.shape[1] for features in found] == [widths[-1] for widths in BLOCKS]
    for actual, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4 * float(reference.detach().abs().max()))


def test_distance_is_the_papers_equation(pixels: Tensor) -> None:
    """Zhang et al. 2018, eq. 1, position by position."""
    torch.manual_seed(0)
    network = Perceptual(SMALL)
    for weight in network.channel_weights:
        weight.copy_(torch.rand(weight.shape, generator=seeded()))
    one, other = pixels[:, :, :, :6, :8]
    expected = torch.zeros(2)
    for layer, weight in enumerate(network.channel_weights):
        first, second = network.features(one)[layer], network.features(other)[layer]
        height, width = first.shape[2:]
        for row in range(height):
            for column in range(width):
                units = [
                    part[:, :, row, column] / part[:, :, row, column].norm(dim=1, keepdim=True).clamp(min=1e-10)
                    for part in (first, second)
                ]
                expected += ((units[0] - units[1]) ** 2 * weight.flatten()).sum(dim=1) / (height * width)
    torch.testing.assert_close(network(one, other), expected)
    # Both go through the network as one batch, whose rows a kernel may round differently.
    assert network(one, one).tolist() == pytest.approx([0, 0], abs=1e-9)


def test_gradients_reach_the_images_and_are_finite_where_nothing_is_active(pixels: Tensor) -> None:
    torch.manual_seed(0)
    network = Perceptual(SMALL)
    with torch.no_grad():
        network.convolutions[2].bias.fill_(-100.0)
    image = pixels[0].clone().requires_grad_()
    network(image, pixels[1]).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert float(image.grad.abs().max()) > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_blurred_poolings_tolerate_a_shift() -> None:
    """What the shift-tolerant variant is for: an image moved by one pixel is nearer to itself than with maxima."""
    torch.manual_seed(0)
    plain, tolerant = Perceptual(), Perceptual(shift_tolerant=True)
    tolerant.load_state_dict(plain.state_dict())
    image = torch.rand(1, 3, 65, 65, generator=seeded()) * 2 - 1
    still, moved = image[..., :64, :64], image[..., 1:, 1:]
    assert float(tolerant(still, moved)) < float(plain(still, moved))


def test_learned_weights_come_from_a_second_file(tmp_path: Path, vgg16: dict[str, Tensor], pixels: Tensor) -> None:
    torch.save(vgg16, tmp_path / "vgg16.pth")
    learned = {
        f"lin{index}.model.1.weight": torch.full((1, widths[-1], 1, 1), 0.5) for index, widths in enumerate(BLOCKS)
    }
    torch.save(learned, tmp_path / "vgg.pth")
    uniform = load_perceptual(tmp_path / "vgg16.pth")
    halved = load_perceptual(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    torch.testing.assert_close(halved(*pixels), uniform(*pixels) / 2)
    with pytest.raises(ExtractorMissing, match=r"lin0.model.1.weight is absent"):
        load_perceptual(tmp_path / "vgg16.pth", tmp_path / "vgg16.pth")


def test_weights_that_are_not_there_are_one_clear_error(
    tmp_path: Path, vgg16: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExtractorMissing, match="can't be read"):
        load_perceptual(tmp_path / "absent.pth")
    torch.save({"features.0.weight": vgg16["features.0.weight"]}, tmp_path / "part.pth")
    with pytest.raises(ExtractorMissing, match="has 1 convolutions, VGG16 13"):
        load_perceptual(tmp_path / "part.pth")
    torch.save(vgg16 | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, tmp_path / "grey.pth")
    with pytest.raises(ExtractorMissing, match=r"features.0.weight is \(64, 1, 3, 3\)"):
        load_perceptual(tmp_path / "grey.pth")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExtractorMissing, match="pip install stlpips-pytorch"):
        load_perceptual()


def test_packaged_weights_order_distortions(pixels: Tensor) -> None:
    network = load_perceptual()
    image = pixels[:1, 0]
    noise = torch.randn(image.shape, generator=seeded())
    distances = [float(network(image, image + strength * noise)) for strength in (0.0, 0.05, 0.2, 0.8)]
    assert distances == sorted(distances)
    assert distances[0] == pytest.approx(0, abs=1e-6)


def test_statistics_are_those_of_imagenet_in_our_range() -> None:
    assert [2 * value - 1 for value in (0.485, 0.456, 0.406)] == pytest.approx(MEAN)
    assert [2 * value for value in (0.229, 0.224, 0.225)] == pytest.approx(STD)


def test_images_that_do_not_fit_are_refused() -> None:
    network = Perceptual(SMALL)
    with pytest.raises(InputError, match=r"\(1, 3, 8, 8\) and \(1, 3, 8, 9\)"):
        network(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(InputError, match="sides of 4 or more"):
        network(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
