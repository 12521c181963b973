"""A model without its weights, by which `ldm sample` checks a request."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plugged import no_plugins_left, plugin_at
from safetensors.torch import save_file
from sampled import KINDS, write_models

from ldm.interchange import LAYOUTS, load_model
from pipelines.commands.sample.given import read_given
from pipelines.commands.sample.models import Found, RecipeSampling
from pipelines.commands.sample.outline import outline_of_file, outline_of_folder
from pipelines.commands.sample.plan import apply_recipe, planned
from pipelines.commands.sample.request import Request
from pipelines.errors import UsageError
from pipelines.recipe.plugins import plugin_of, use_plugins


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def test_a_plugin_s_sampler_that_is_not_there_asks_for_the_recipe(models: Path, tmp_path: Path) -> None:
    request, outlines = Request("text", tmp_path, prompts=["a"]), {"text": outline_of_folder(models / "text")}
    found = {"text": Found(models / "text", RecipeSampling("swirl", 3, 2.0))}
    apply_recipe(outlines["text"].model, found["text"].sampling)
    with pytest.raises(UsageError, match="--sampler is missing: the recipe's is 'swirl', of a plugin"):
        planned(request, read_given(request), outlines, found)


def test_a_plugin_s_sampler_of_another_text_than_the_release_s_must_be_asked_for(models: Path, tmp_path: Path) -> None:
    outlines = {"text": outline_of_folder(models / "text")}

    def plan_of(sha256: str | None, sampler: str | None = None) -> None:
        found = {"text": Found(models / "text", RecipeSampling("own_euler", 3, 2.0, sha256))}
        request = Request("text", tmp_path, prompts=["a"], sampler=sampler)
        apply_recipe(outlines["text"].model, found["text"].sampling)
        planned(request, read_given(request), outlines, found)

    with no_plugins_left():
        use_plugins([plugin_at(tmp_path)])
        plugin = plugin_of("sampler", "own_euler")
        assert plugin is not None
        plan_of(plugin.sha256)
        for other in ("0" * 64, None):
            with pytest.raises(UsageError, match="'own_euler' of a plugin that has another text by now"):
                plan_of(other)
            plan_of(other, sampler="own_euler")


def test_a_recipe_without_guidance_refuses_what_only_guidance_reads(models: Path, tmp_path: Path) -> None:
    request = Request("text", tmp_path, prompts=["a"], negative_prompts=["b"])
    outlines = {"text": outline_of_folder(models / "text")}
    found = {"text": Found(models / "text", RecipeSampling("ddim", 3, 1.0))}
    with pytest.raises(
        UsageError, match=r"--negative-prompt: leave it out, nothing is guided .*, as the recipe has it"
    ):
        planned(request, read_given(request), outlines, found)


@pytest.mark.parametrize("name", [*KINDS, "ancestral"])
def test_an_outline_is_the_model_without_its_weights(models: Path, name: str) -> None:
    outline, model = outline_of_folder(models / name), load_model(models / name)
    told = (*("sampler", "spacing", "sampler_options", "max_noise_level", "aesthetics_score"), "latent_channels")
    assert [getattr(outline.model, key) for key in told] == [getattr(model, key) for key in told]
    for part in ("unet", "autoencoder", "diffusion", "low_res_diffusion"):
        ours, theirs = getattr(outline.model, part), getattr(model, part)
        assert (ours and ours.config) == (theirs and theirs.config), part
    assert outline.varies == (model.image_encoder is not None)
    assert {weight.device.type for weight in outline.model.unet.parameters()} == {"meta"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_outline_of_a_single_file_is_of_its_header(tmp_path: Path, name: str) -> None:
    config = LAYOUTS[name].unet
    shapes: dict[str, tuple[int, ...]] = {
        "input_blocks.0.0.weight": (1, config.in_channels),
        "input_blocks.1.1.attn2.to_k.weight": (1, config.cross_attention_dim),
    }
    if config.num_class_embeds:
        shapes["label_emb.weight"] = (config.num_class_embeds,)
    if config.projection_class_embeddings_input_dim:
        shapes["label_emb.0.0.weight"] = (1, config.projection_class_embeddings_input_dim)
    weights = {f"model.diffusion_model.{key}": torch.zeros(shape) for key, shape in shapes.items()}
    save_file(weights, tmp_path / "file.safetensors")
    outline = outline_of_file(tmp_path / "file.safetensors", "v")
    assert outline.model.unet.config == config
    assert outline.model.diffusion.config.prediction == "v"
    assert outline.upscales == (name == "x4-upscaler")
