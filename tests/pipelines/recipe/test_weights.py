"""Weights to start from: given ones are taken over, count by content, and are refused where they don't fit."""

from __future__ import annotations

import json
from importlib import resources
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.interchange import load_network, save_network
from ldm.latents import pixels_from_uint8
from ldm.metrics import psnr
from pipelines.dataset.split import unit_interval
from pipelines.gallery.links import Gallery
from pipelines.recipe.errors import RecipeError
from pipelines.recipe.weights import load_autoencoder, shipped_weights, weights_sha256


def _network(seed: int, channels: tuple[int, ...] = (8, 16)) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        AutoencoderConfig(
            block_out_channels=channels, layers_per_block=1, latent_channels=2, norm_num_groups=4, sample_size=16
        )
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_network(_network(1).half(), tmp_path / "vae")
    return tmp_path / "vae"


def test_weights_of_a_folder_are_taken_over_in_full_precision(folder: Path) -> None:
    network = _network(2)
    load_autoencoder(network, str(folder))
    expected = _network(1).half().float().state_dict()
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name


def test_what_counts_is_the_content(folder: Path, tmp_path: Path) -> None:
    save_network(_network(1).half(), tmp_path / "copy")
    save_network(_network(3).half(), tmp_path / "other")
    first = weights_sha256(str(folder))
    assert first == weights_sha256(str(tmp_path / "copy")) != weights_sha256(str(tmp_path / "other"))
    assert weights_sha256("scratch") is None


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"block_out_channels \[8, 16\] \(here \[8, 24\]\)"):
        load_autoencoder(_network(1, (8, 24)), str(folder))


def test_absent_weights_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"can't be read there.*which come with the package"):
        weights_sha256(str(tmp_path / "nowhere"))


@pytest.fixture(scope="module")
def held_out_drawings() -> torch.Tensor:
    """16 drawings of names that the shipped recipes hold out, on white, uint8 [16, 64, 64, 3]."""
    names_held_out = (one for one in Gallery(8377).emojis() if unit_interval("split", one.name) < 0.1)
    return torch.stack([_drawing(one.file) for one in islice(names_held_out, 16)])


def _drawing(path: Path) -> torch.Tensor:
    image = Image.open(path).convert("RGBA").resize((64, 64), Image.Resampling.BICUBIC)
    return torch.from_numpy(
        np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    )


@pytest.mark.parametrize("name", shipped_weights())
def test_shipped_weights_are_those_of_their_manifest_and_reconstruct_what_they_have_not_seen(
    name: str, held_out_drawings: torch.Tensor
) -> None:
    folder = Path(str(resources.files("configs"))) / "weights" / name
    manifest = json.loads((folder / "manifest.json").read_text())
    assert weights_sha256(name) == manifest["sha256"]
    assert (folder / "diffusion_pytorch_model.safetensors").stat().st_size <= 5_000_000
    network = load_network(AutoencoderKL, folder).float().eval()
    pixels = pixels_from_uint8(held_out_drawings)
    with torch.no_grad():
        found = psnr(network(pixels)[0], pixels).mean()
    psnr_held_out = next(figure["value"] for figure in manifest["figures"] if figure["name"] == "psnr")
    assert found > psnr_held_out - 3 > 20


def test_the_quickstart_has_weights_to_start_from() -> None:
    assert "emoji_f8" in shipped_weights()
