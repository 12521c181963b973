"""CLIP folders and embeddings against stock open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from ldm.clip import CONFIG, WEIGHTS, Clip, build_clip, load_clip, normalised, save_clip, tokenizer_of
from ldm.errors import FolderError, InputError

SHAPE: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEXTS = ["a red heart", "flag: Côte d’Ivoire", "", "keycap 7 " * 20]


def written(folder: Path, seed: int = 0, **preprocess: Any) -> Path:
    torch.manual_seed(seed)
    save_clip(build_clip(SHAPE).state_dict(), SHAPE, folder)
    config = json.loads((folder / CONFIG).read_text())
    config["preprocess_cfg"] |= preprocess
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "clip")


def picture(height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(height).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.asarray(coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width])


def stock(folder: Path) -> tuple[Any, Any, Any]:
    """Model, preprocessing and tokenizer as anyone loads them."""
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


@torch.no_grad()
def test_stock_open_clip_loads_the_folder_and_has_the_same_embeddings(folder: Path) -> None:
    clip = load_clip(folder)
    model, preprocess, tokenizer = stock(folder)
    torch.manual_seed(0)
    initial = build_clip(SHAPE).state_dict()
    assert all(torch.equal(value, initial[name]) for name, value in model.state_dict().items())

    texts = clip.texts(TEXTS)
    torch.testing.assert_close(texts, normalize(model.encode_text(tokenizer(TEXTS)), dim=-1))
    image = picture(32, 32)
    images = clip.images(torch.from_numpy(image)[None])
    expected = model.encode_image(preprocess(Image.fromarray(image))[None])
    torch.testing.assert_close(images, normalize(expected, dim=-1))
    for embedded, rows in ((texts, 4), (images, 1)):
        assert (embedded.shape, embedded.dtype, embedded.device.type) == ((rows, 16), torch.float32, "cpu")
        torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(rows))
    assert clip.image_size == 32


@torch.no_grad()
@pytest.mark.parametrize("resize_mode", ["squash", "shortest"])
def test_images_of_any_size_are_prepared_as_open_clip_does(tmp_path: Path, resize_mode: str) -> None:
    """But for rounding, which PIL does elsewhere in resampling than torch: few grey levels, at hard edges alone."""
    clip = load_clip(written(tmp_path, resize_mode=resize_mode, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3]))
    _, preprocess, _ = stock(tmp_path)
    seen: list[torch.Tensor] = []
    clip.model.visual.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
    for size in ((32, 32), (64, 64), (20, 20), (50, 90), (77, 41)):
        image = picture(*size)
        clip.images(torch.from_numpy(image)[None])
        expected = preprocess(Image.fromarray(image))[None]
        assert seen[-1].shape == expected.shape
        levels = (seen[-1] - expected).abs() * 255 * torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
        assert levels.mean() < (0.25 if size != (32, 32) else 1e-3), size
        assert levels.max() < (10 if size != (32, 32) else 1e-2), size


def test_an_images_embedding_is_its_own(folder: Path) -> None:
    clip = load_clip(folder)
    images = torch.from_numpy(np.stack([picture(40 + n, 64)[:40] for n in range(0, 160, 8)]))
    whole = clip.images(images)
    for at in (0, 7, 19):
        torch.testing.assert_close(clip.images(images[at : at + 1])[0], whole[at])
    assert (whole[0] - whole[1]).norm() > 0.01


def test_identity_is_of_weights_and_configuration_not_of_the_folder(tmp_path: Path) -> None:
    first, again = load_clip(written(tmp_path / "a")), load_clip(written(tmp_path / "b"))
    assert first.identity == again.identity
    assert first.identity != load_clip(written(tmp_path / "c", seed=1)).identity
    assert first.identity != load_clip(written(tmp_path / "d", resize_mode="shortest")).identity


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        assert (written(tmp_path / "a") / name).read_bytes() == (written(tmp_path / "b") / name).read_bytes()


def test_captions_are_cut_at_the_context(folder: Path) -> None:
    tokens = tokenizer_of(SHAPE)(TEXTS)
    assert tokens.shape == (4, 12)
    assert torch.equal(tokens, stock(folder)[2](TEXTS))
    clip = load_clip(folder)
    torch.testing.assert_close(clip.texts(["sun " * 30]), clip.texts(["sun " * 40]))


def test_pixels_are_normalised_by_channel() -> None:
    pixels = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    found = normalised(pixels, (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    assert torch.equal(found[:, :, 0, 0], torch.tensor([[-1.0, 1.0, 0.5]] * 2))


def test_what_is_no_image_is_refused(folder: Path) -> None:
    clip = load_clip(folder)
    image = torch.from_numpy(picture(32, 32))
    for wrong in (image, image[None].float(), image[None].permute(0, 3, 1, 2)):
        with pytest.raises(InputError, match="must be uint8"):
            clip.images(wrong)


def test_a_folder_that_lacks_something_is_an_error_that_says_what(folder: Path, tmp_path: Path) -> None:
    """And nothing is looked for on a hub: the network is blocked here."""
    with pytest.raises(FolderError, match=rf"no CLIP at '.*nowhere' .*no {CONFIG}"):
        load_clip(tmp_path / "nowhere")
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(FolderError, match=r"no CLIP at '.*clip'"):
        load_clip(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FolderError, match=f"no {WEIGHTS}"):
        load_clip(folder)
    (folder / CONFIG).write_text("{}")
    (folder / WEIGHTS).write_bytes(weights)
    with pytest.raises(FolderError, match="missing 'model_cfg'"):
        load_clip(folder)


def test_padding_is_not_done_here(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match='"longest" is not supported'):
        load_clip(written(tmp_path, resize_mode="longest"))


def test_a_tag_that_open_clip_does_not_know_is_an_error() -> None:
    with pytest.raises(FolderError, match=r"no CLIP at 'hub:ViT-B-32/nothing' .*give a folder"):
        load_clip("hub:ViT-B-32/nothing")


def test_a_shape_that_open_clip_does_not_know_is_an_error() -> None:
    with pytest.raises(FolderError, match="open_clip can't build"):
        build_clip({**SHAPE, "depth": 3})


def test_a_model_in_training_can_be_looked_at() -> None:
    """`Clip` takes a model that lies in no folder."""
    torch.manual_seed(0)
    preprocess = {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    clip = Clip(build_clip(SHAPE), tokenizer_of(SHAPE), preprocess, "in training")
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    assert clip.images(torch.from_numpy(picture(32, 32))[None]).shape == (1, 16)
