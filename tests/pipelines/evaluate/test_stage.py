"""`evaluate` as a stage: pictures of the recipe's prompts with what was trained."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infra.storage import Store
from ldm.errors import LdmError
from ldm.generate import text_to_image
from pipelines.artifacts import Artifact, artifact_key
from pipelines.dataset.models import load_trained
from pipelines.evaluate import stage
from pipelines.recipe import Execution, TextToImageModel
from pipelines.recipe.networks import reading

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def inputs(published: Any) -> dict[str, Artifact]:
    return {"train.base": published.unet(), "train.autoencoder": published.autoencoder()}


def evaluate(inputs: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any) -> Artifact:
    return stage.evaluate("base", model, inputs, store, report, Execution(device="cpu"))


def picture(store: Store, artifact: Artifact, name: str) -> Image.Image:
    return Image.open(io.BytesIO(store.read_bytes(artifact.units[0].path(name))))


def sampling(model: TextToImageModel, **changes: Any) -> TextToImageModel:
    return model.model_copy(update={"sampling": model.sampling.model_copy(update=changes)})


def test_each_prompt_is_a_row_with_a_picture_a_seed(
    inputs: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    artifact = evaluate(inputs, store, model, report)
    assert artifact.counts.total == artifact.counts.kept == 4
    described = json.loads(store.read_bytes(artifact.units[0].path("samples.json")))
    assert [(s["prompt"], s["seed"]) for s in described["samples"]] == [
        ("flag of France", 7),
        ("flag of France", 9),
        ("red heart", 8),
        ("red heart", 10),
    ]
    (unet,), (vae,) = inputs["train.base"].units, inputs["train.autoencoder"].units
    expected = text_to_image(
        load_trained(store, unet, vae, *reading(model)),
        [s["prompt"] for s in described["samples"]],
        seeds=[s["seed"] for s in described["samples"]],
        guidance_scale=3.0,
        sampler="dpmpp_2m",
        steps=3,
    )
    grid = np.asarray(picture(store, artifact, "grid.png"))
    assert grid.shape == (2 * 16 + 2, 2 * 16 + 2, 3)
    for number, described_sample in enumerate(described["samples"]):
        image = picture(store, artifact, described_sample["file"])
        assert image.info["prompt"] == described_sample["prompt"]
        assert json.loads(image.info["seed"]) == described_sample["seed"]
        assert image.info["sampler"] == "dpmpp_2m"
        pixels = np.asarray(image)
        np.testing.assert_array_equal(pixels, expected[number].numpy())
        top, left = 18 * (number // 2), 18 * (number % 2)
        np.testing.assert_array_equal(grid[top : top + 16, left : left + 16], pixels)
    assert report.figures == {"grid.png": store.read_bytes(artifact.units[0].path("grid.png"))}
    assert report.steps[-1][:3] == (4, 4, "images")


def test_many_prompts_get_one_picture_each(
    inputs: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    prompts = tuple(f"number {n % 9}" for n in range(17))
    artifact = evaluate(inputs, store, sampling(model, prompts=prompts, steps=1), report)
    described = json.loads(store.read_bytes(artifact.units[0].path("samples.json")))["samples"]
    assert [(s["prompt"], s["seed"]) for s in described] == [(prompt, 7 + n) for n, prompt in enumerate(prompts)]
    assert picture(store, artifact, "grid.png").size == (8 * 18 - 2, 3 * 18 - 2)


def test_pictures_follow_what_is_asked_for(
    inputs: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any, published: Any
) -> None:
    first = evaluate(inputs, store, model, report)
    for name, changed in (
        ("seed", sampling(model, seed=8)),
        ("guidance", sampling(model, guidance_scale=1.0)),
        ("sampler", sampling(model, sampler="euler")),
    ):
        other = evaluate(inputs, store, changed, report)
        assert other.key != first.key, name
        assert other.revision != first.revision, name
    trained_longer = inputs | {"train.base": published.unet(seed=1)}
    assert evaluate(trained_longer, store, model, report).revision != first.revision
    for unit in inputs["train.base"].units:  # the first answer needs no weights
        store.delete(f"{unit.stage}/units/{unit.key}")
    assert evaluate(inputs, store, model, report) == first
    content = stage.identity(model).content
    assert first.key == artifact_key("evaluate.base", stage.FORMAT_VERSION, content, inputs)


def test_a_model_that_makes_no_numbers_publishes_nothing(
    inputs: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any, published: Any
) -> None:
    def spoil(network: Any) -> None:
        with torch.no_grad():
            network.conv_out.bias.fill_(float("nan"))

    broken = inputs | {"train.base": published.unet(change=spoil)}
    with pytest.raises(LdmError, match="not numbers"):
        evaluate(broken, store, model, report)
    assert store.listdir("evaluate.base/units") == []
    assert store.listdir("evaluate.base/revisions") == []
