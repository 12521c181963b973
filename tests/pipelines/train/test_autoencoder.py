"""What is measured of an autoencoder at the end of its training, beside PSNR."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.features import load_extractor
from ldm.interchange import load_network
from ldm.latents import pixels_from_uint8, pixels_to_uint8
from ldm.metrics import frechet_distance_of_features
from pipelines.train.autoencoder import AutoencoderTraining

NAME = "held_out_fd_efficientnet_lite0_128px"


def finish(job: Any, folder: Path) -> tuple[AutoencoderTraining, dict[str, float]]:
    folder.mkdir()
    trainable = AutoencoderTraining(job, torch.device("cpu"))
    preview = trainable.finish(trainable.module.state_dict(), folder)
    return trainable, {**preview.metrics, **preview.beside}


def test_reconstructions_are_held_against_held_out_images(autoencoder_job: Any, tmp_path: Path) -> None:
    trainable, metrics = finish(autoencoder_job, tmp_path / "first")
    network = load_network(type(trainable.module), tmp_path / "first" / "vae").eval()
    images = trainable._held_out.rows(range(len(trainable._held_out)))
    with torch.no_grad():
        reconstructions, _ = network(pixels_from_uint8(images))
    extract = load_extractor("efficientnet_lite0")
    expected = frechet_distance_of_features(extract(pixels_to_uint8(reconstructions)), extract(images))
    assert metrics[NAME] == pytest.approx(expected, rel=1e-3)
    assert metrics[NAME] > 0
    assert "held_out_psnr_db" in metrics


def test_without_extractor_or_package_there_is_psnr_alone(
    autoencoder_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without = autoencoder_job.execution.model_copy(update={"extractor": None})
    _, metrics = finish(replace(autoencoder_job, execution=without), tmp_path / "first")
    assert set(metrics) == {"held_out_psnr_db", "latents_std"}
    assert not caplog.records
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    _, metrics = finish(autoencoder_job, tmp_path / "second")
    assert set(metrics) == {"held_out_psnr_db", "latents_std"}
    assert "measured by PSNR alone" in caplog.text
