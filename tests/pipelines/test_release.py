"""`release`: the model folder that is published, and the card that says what it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.storage import Store
from ldm.errors import FolderError
from ldm.generate import seeded_noise, text_to_image
from ldm.interchange import load_model, model_hash
from pipelines import release as stage
from pipelines.artifacts import Artifact, artifact_key, fetch_unit
from pipelines.encode.stage import encode
from pipelines.evaluate.generate import load_trained
from pipelines.evaluate.stage import evaluate
from pipelines.model_card import licences
from pipelines.recipe import Execution, ReleaseSpec, TextToImageModel
from pipelines.release import ReleaseError, check_same

HOW = Execution(device="cpu")
SPEC = ReleaseSpec(model="base")
pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def nodes(published: Any, store: Store, model: TextToImageModel, report: Any) -> dict[str, Artifact]:
    """All that a released model is made from, as the stages make it; but for the networks, which are random."""
    made = {"acquire": published.acquire(), "train.autoencoder": published.autoencoder()}
    made["select"] = published.select(made["acquire"])
    made["encode.base"] = encode("base", model, made, store, report, HOW)
    made["train.base"] = published.unet({name: made[name] for name in ("encode.base", "train.autoencoder")})
    trained = {name: made[name] for name in ("train.base", "train.autoencoder")}
    made["evaluate.base"] = evaluate("base", model, trained, store, report, HOW)
    return made


def release(nodes: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any) -> Artifact:
    inputs = {name: nodes[name] for name in ("evaluate.base", "train.base", "train.autoencoder")}
    return stage.release(SPEC, model, inputs, store, report, HOW)


def test_the_folder_is_the_model(
    nodes: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    artifact = release(nodes, store, model, report)
    folder = fetch_unit(store, artifact.units[0])
    assert artifact.info == {"model_hash": model_hash(folder)}
    assert not [path for path in folder.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]
    (unet,), (vae,) = nodes["train.base"].units, nodes["train.autoencoder"].units
    settings: Any = {"seeds": [3, 4], "steps": 3}
    prompts = ["red heart", "a sun with a very long caption that does not fit into twelve tokens"]
    expected = text_to_image(load_trained(store, unet, vae, model), prompts, **settings)
    assert torch.equal(text_to_image(load_model(folder), prompts, **settings), expected)
    assert report.steps[-1] == (4, 4, "steps", "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_stock_pipeline_makes_the_same_picture(
    nodes: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    from diffusers import StableDiffusionPipeline

    folder = fetch_unit(store, release(nodes, store, model, report).units[0])
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = seeded_noise([5], (2, 4, 4))
    theirs = pipeline(
        "red heart", latents=noise, guidance_scale=3.0, num_inference_steps=4, height=16, width=16, output_type="np"
    ).images[0]
    ours = text_to_image(load_model(folder), ["red heart"], noise=noise, guidance_scale=3.0, steps=4)[0].numpy()
    assert np.abs(np.round(theirs * 255) - ours).max() <= 1


def test_card_says_what_it_was_made_from(
    nodes: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    artifact = release(nodes, store, model, report)
    folder = fetch_unit(store, artifact.units[0])
    card = (folder / "README.md").read_text(encoding="utf-8")
    selected = nodes["select"]
    assert card.startswith("---\nlibrary_name: diffusers\n")
    for text in (
        "| acquire | in |  | 32 URLs |",
        "|  | failed | timeout | 8 |",
        f"| select | in |  | {selected.counts.total} pairs |",
        f"{selected.info['train']} to train on, {selected.info['held_out']} held out",
        "Source: gallery.",
        f"| train.base | 12 | 20 | `{nodes['train.base'].revision}` |",
        "torch ",
        'pipeline("flag of France", height=16, width=16, guidance_scale=3.0)',
    ):
        assert text in card
    stated = licences(nodes["acquire"], selected, store)
    assert sum(stated.values()) == selected.counts.kept
    for name in ("Apache-2.0", "CC-BY-4.0"):
        assert f"| {name} | {stated[name]} |" in card
        assert stated[name] > 0
    assert (folder / "grid.png").read_bytes() == store.read_bytes(nodes["evaluate.base"].units[0].path("grid.png"))


def test_the_same_model_is_the_same_bytes_and_answered_from_the_manifest(
    nodes: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    first = release(nodes, store, model, report)
    store.delete(f"release/units/{first.units[0].key}")
    store.delete(f"release/keys/{first.key}.json")
    assert release(nodes, store, model, report).revision == first.revision
    for unit in nodes["train.base"].units:
        store.delete(f"{unit.stage}/units/{unit.key}")
    again = release(nodes, store, model, report)
    assert again.revision == first.revision
    inputs = {name: nodes[name].revision for name in ("evaluate.base", "train.base", "train.autoencoder")}
    assert again.key == artifact_key("release", stage.FORMAT_VERSION, stage.identity(SPEC, model), inputs)


def test_everything_works_in_an_object_store_too(
    s3_url: str, published: Any, tmp_path: Path, model: TextToImageModel, report: Any
) -> None:
    remote = Store(s3_url)
    elsewhere = type(published)(remote, tmp_path / "remote-networks")
    made = {"acquire": elsewhere.acquire((8, 4)), "train.autoencoder": elsewhere.autoencoder()}
    made["select"] = elsewhere.select(made["acquire"])
    made["encode.base"] = encode("base", model, made, remote, report, HOW)
    made["train.base"] = elsewhere.unet({name: made[name] for name in ("encode.base", "train.autoencoder")})
    trained = {name: made[name] for name in ("train.base", "train.autoencoder")}
    made["evaluate.base"] = evaluate("base", model, trained, remote, report, HOW)
    folder = fetch_unit(remote, release(made, remote, model, report).units[0])
    assert text_to_image(load_model(folder), ["red heart"], seeds=[1], steps=1).shape == (1, 16, 16, 3)


def test_damaged_weights_release_nothing(
    nodes: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    path = store.fetch(nodes["train.base"].units[0].only(".safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FolderError, match="unet"):
        release(nodes, store, model, report)
    assert store.listdir("release/units") == []
    assert store.listdir("release/revisions") == []


def test_a_folder_that_is_another_model_is_noticed(published: Any, store: Store, model: TextToImageModel) -> None:
    (unet,), (other), (vae,) = published.unet().units, published.unet(seed=1).units[0], published.autoencoder().units
    first = load_trained(store, unet, vae, model)
    check_same(first, load_trained(store, unet, vae, model), Path("folder"))
    with pytest.raises(ReleaseError, match="unet of folder"):
        check_same(first, load_trained(store, other, vae, model), Path("folder"))
    shorter = model.model_copy(update={"text": model.text.model_copy(update={"tokens": 11})})
    with pytest.raises(ReleaseError, match="text_encoder"):
        check_same(first, load_trained(store, unet, vae, shorter), Path("folder"))
    eps = model.model_copy(update={"diffusion": model.diffusion.model_copy(update={"prediction": "eps"})})
    with pytest.raises(ReleaseError, match="scheduler"):
        check_same(first, load_trained(store, unet, vae, eps), Path("folder"))
