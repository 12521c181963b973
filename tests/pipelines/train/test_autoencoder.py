"""What an autoencoder is trained towards beside pixels, and measured by at the end beside PSNR."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_weights import own_extractor

from ldm.features import load_extractor
from ldm.interchange import load_network
from ldm.latents import pixels_from_uint8, pixels_to_uint8
from ldm.metrics import frechet_distance_of_features
from ldm.perceptual import load_perceptual
from pipelines.train.autoencoder import AutoencoderTraining
from pipelines.train.errors import TrainError
from pipelines.train.order import Sample

NAME = "frechet_distance/held_out/efficientnet_lite0_128px"


def finish(job: Any, folder: Path) -> tuple[AutoencoderTraining, dict[str, float]]:
    folder.mkdir()
    trainable = AutoencoderTraining(job, torch.device("cpu"))
    weights = trainable.module.state_dict()
    written, preview = trainable.write(weights, folder), trainable.measure(weights)
    return trainable, {figure.label: figure for figure in (*preview.figures, *preview.beside, *written)}


def test_reconstructions_are_held_against_held_out_images(autoencoder_job: Any, tmp_path: Path) -> None:
    trainable, metrics = finish(autoencoder_job, tmp_path / "first")
    network = load_network(type(trainable.module), tmp_path / "first" / "vae").eval()
    images = trainable._held_out.rows(range(len(trainable._held_out)))
    with torch.no_grad():
        reconstructions, _ = network(pixels_from_uint8(images))
    extract = load_extractor("efficientnet_lite0")
    expected = frechet_distance_of_features(extract(pixels_to_uint8(reconstructions)), extract(images))
    assert metrics[NAME].value == pytest.approx(expected, rel=1e-3)
    assert metrics[NAME].value > 0
    assert metrics["psnr/held_out"].count == metrics[NAME].count > 1


def test_without_extractor_or_package_there_is_psnr_alone(
    autoencoder_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without = autoencoder_job.execution.model_copy(update={"extractor": None})
    _, metrics = finish(replace(autoencoder_job, execution=without), tmp_path / "first")
    assert set(metrics) == {"psnr/held_out", "latents_std/train"}
    assert not caplog.records
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    _, metrics = finish(autoencoder_job, tmp_path / "second")
    assert set(metrics) == {"psnr/held_out", "latents_std/train"}
    assert "measured by PSNR alone" in caplog.text


def judged(job: Any, weight: float) -> Any:
    loss = job.model.loss.model_copy(update={"perceptual": weight})
    return replace(job, model=job.model.model_copy(update={"loss": loss}))


def test_a_perceptual_term_is_the_packaged_networks_distance(autoencoder_job: Any, pictures: Any) -> None:
    acquire, select = pictures(size_px=32)
    job = replace(autoencoder_job, inputs={"acquire": acquire, "select": select})
    plain, with_judge = (AutoencoderTraining(each, torch.device("cpu")) for each in (job, judged(job, 0.5)))
    batch = with_judge.batch([Sample(row, 0) for row in (0, 3, 7)])
    pixels = pixels_from_uint8(batch["images"])
    reconstruction, _ = with_judge.module(pixels, batch["noise"])
    distance = load_perceptual()(reconstruction, pixels).mean()
    loss, terms = with_judge.loss(with_judge.module, batch)
    without, _ = plain.loss(plain.module, batch)
    torch.testing.assert_close(terms["perceptual"], distance.detach())
    torch.testing.assert_close(loss, without + 0.5 * distance)
    gradients = [
        torch.autograd.grad(total, trainable.module.get_parameter("decoder.conv_out.weight"))[0]
        for total, trainable in ((loss, with_judge), (without, plain))
    ]
    assert not torch.allclose(*gradients)


def test_a_judge_that_is_absent_or_too_large_is_one_message(
    autoencoder_job: Any, pictures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainError, match=r"loss.perceptual = 1.0 with images of 16 px: VGG16 takes 32 or more"):
        AutoencoderTraining(judged(autoencoder_job, 1.0), torch.device("cpu"))
    acquire, select = pictures(size_px=32)
    job = replace(autoencoder_job, inputs={"acquire": acquire, "select": select})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainError, match=r"loss.perceptual = 1.0: .*pip install stlpips-pytorch"):
        AutoencoderTraining(judged(job, 1.0), torch.device("cpu"))


def test_reconstructions_are_measured_with_weights_of_ones_own(autoencoder_job: Any, tmp_path: Path) -> None:
    extractor = own_extractor("clip", tmp_path)
    execution = autoencoder_job.execution.model_copy(update={"extractor": extractor})
    _, metrics = finish(replace(autoencoder_job, execution=execution), tmp_path / "own")
    assert any(label.startswith("frechet_distance/held_out/clip_") for label in metrics)
