"""CLIP's vision tower and its preprocessing, held against transformers; the tower is tiny and random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from ldm.conditioning.image import CLIP_MEAN, CLIP_STD, PREPROCESSOR, ImagePreprocessing, load_image_encoder
from ldm.errors import ConfigError, FolderError, InputError

SIDE = 16


def pictures(height: int, width: int, count: int = 2) -> torch.Tensor:
    """Coarse random shapes with sharp edges, which resizing overshoots at."""
    coarse = torch.randint(0, 256, (count, 3, 7, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (height, width)).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=4,
        projection_dim=12,
        initializer_range=0.5,
    )
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("size", [(40, 61), (64, 37), (16, 16), (9, 12), (33, 16)])
@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "CLIPImageProcessorPil"])
def test_preprocessing_is_that_of_transformers(folder: Path, size: tuple[int, int], kind: str) -> None:
    """Each side rounds twice to whole numbers of 256, but not from the same last digit: one step, seldom."""
    images = pictures(*size)
    processor = getattr(transformers, kind).from_pretrained(folder)
    theirs = processor([Image.fromarray(image.numpy()) for image in images], return_tensors="pt")["pixel_values"]
    ours = ImagePreprocessing.from_dict(json.loads((folder / PREPROCESSOR).read_text()))(images)
    difference = (ours - theirs).abs() * torch.tensor(CLIP_STD).view(3, 1, 1) * 255
    assert difference.max() < 1.01
    assert difference.mean() < 0.02


def test_embedding_is_one_token(folder: Path) -> None:
    encoder = load_image_encoder(folder)
    images = pictures(40, 61)
    with torch.no_grad():
        theirs = encoder.network(encoder.preprocessing(images)).image_embeds
    conditioning = encoder.encode(images)
    assert conditioning.context.shape == (2, encoder.length, encoder.width) == (2, 1, 12)
    assert not conditioning.context.is_inference()
    torch.testing.assert_close(conditioning.context[:, 0], theirs, rtol=1e-5, atol=1e-5)
    assert (conditioning.context[0] - conditioning.context[1]).abs().max() > 0.1


def test_patches_are_the_penultimate_states(folder: Path) -> None:
    encoder = load_image_encoder(folder, "patches")
    images = pictures(20, 20)
    with torch.no_grad():
        states = encoder.network(encoder.preprocessing(images), output_hidden_states=True).hidden_states
    conditioning = encoder.encode(images)
    assert conditioning.context.shape == (2, encoder.length, encoder.width) == (2, 17, 16)
    torch.testing.assert_close(conditioning.context, states[2], rtol=1e-5, atol=1e-5)
    assert (states[2] - states[3]).abs().max() > 0.1


def test_null_is_zeros_of_the_same_shape(folder: Path) -> None:
    for form in ("embedding", "patches"):
        encoder = load_image_encoder(folder, form)
        assert encoder.null(2).context.shape == encoder.encode(pictures(16, 16)).context.shape
        assert not encoder.null(2).context.any()
    assert load_image_encoder(folder).identity != load_image_encoder(folder, "patches").identity


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 16, 16, 3), torch.zeros(16, 16, 3).byte(), torch.zeros(0, 16, 16, 3).byte()]
)
def test_other_images_are_refused(folder: Path, images: torch.Tensor) -> None:
    with pytest.raises(InputError, match="images are"):
        load_image_encoder(folder).encode(images)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_center_crop": False}, "do_center_crop = False"),
        ({"resample": 2}, "resample = 2: only 3"),
        ({"rescale_factor": 1.0}, "rescale_factor = 1.0"),
        ({"size": {"height": 8, "width": 8}, "crop_size": 16}, "equal to crop_size"),
        ({"size": 8, "crop_size": 16}, "must not be larger"),
    ],
)
def test_other_preprocessing_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImagePreprocessing.from_dict(values)


def test_older_files_have_plain_numbers() -> None:
    plain = ImagePreprocessing.from_dict({"size": 224, "crop_size": 224, "image_mean": CLIP_MEAN})
    named = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    assert plain == ImagePreprocessing.from_dict(named) == ImagePreprocessing()
    squashed = {"size": {"height": 16, "width": 16}, "crop_size": 16}
    assert ImagePreprocessing.from_dict(squashed)(pictures(20, 40)).shape == (2, 3, 16, 16)


def test_absent_corrupt_and_unfitting_folders_are_named(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match="form = 'pixels'"):
        load_image_encoder(tmp_path, "pixels")  # type: ignore[arg-type]
    preprocessor = tmp_path / PREPROCESSOR
    kept = preprocessor.read_text()
    preprocessor.write_text(json.dumps({"size": 224, "crop_size": 224}))
    with pytest.raises(ConfigError, match="this tower reads images of 16 by 16"):
        load_image_encoder(tmp_path)
    preprocessor.write_text(json.dumps({"crop_size": {"side": 224}}))
    with pytest.raises(
        ConfigError, match=r"preprocessor_config.json: crop_size = {'side': 224}: must be a number of pixels"
    ):
        load_image_encoder(tmp_path)
    preprocessor.write_text(kept[:20])
    with pytest.raises(FolderError, match=PREPROCESSOR):
        load_image_encoder(tmp_path)
    preprocessor.write_text(kept)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(FolderError, match="can't be read"):
        load_image_encoder(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FolderError, match="never from pickles"):
        load_image_encoder(tmp_path)
