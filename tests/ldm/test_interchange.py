from __future__ import annotations

import dataclasses
import json
import string
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ldm.autoencoder import AutoencoderKL
from ldm.conditioning.text import TransformersTextEncoder, load_text_encoder, resolve_text_encoder
from ldm.diffusion import Diffusion, DiffusionConfig, Prediction
from ldm.errors import ConfigError, FolderError
from ldm.generate import LatentDiffusion, text_to_image
from ldm.interchange import (
    load_model,
    load_network,
    model_hash,
    save_model,
    save_network,
)
from ldm.sampling import seeded_noise
from ldm.unet import UNet2DCondition

# diffusers hands tensors to np.array: NumPy 2 would like torch to take its `copy` keyword.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

PROMPTS = ["a red apple", "flag of France, noto style"]


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> TransformersTextEncoder:
    """A tiny BERT that reads letters, as wide as MiniLM, whose 90 MB needn't be in every folder."""
    folder = tmp_path_factory.mktemp("letters")
    letters = string.ascii_letters + string.punctuation
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(tokens), hidden_size=384, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return load_text_encoder(folder, 24)


@pytest.fixture
def folder(model: LatentDiffusion, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("prediction", ["flow", "eps", "v"])
def test_stock_pipeline_makes_the_same_images(
    model: LatentDiffusion,
    minilm: TransformersTextEncoder,
    prediction: Prediction,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = dataclasses.replace(model, text_encoder=minilm, diffusion=Diffusion(DiffusionConfig(prediction)))
    save_model(model, tmp_path)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    noise = seeded_noise([1, 2], (4, 8, 8))
    for guidance_scale in (1.0, 3.0):
        theirs = pipeline(
            PROMPTS, latents=noise, num_inference_steps=12, guidance_scale=guidance_scale, output_type="np"
        ).images
        ours = text_to_image(model, PROMPTS, noise=noise, steps=12, guidance_scale=guidance_scale)
        difference = (torch.from_numpy((theirs * 255).round()).int() - ours.int()).abs()
        assert float((difference <= 1).float().mean()) >= 0.999
        assert float(ours.float().std()) > 1
    assert not [record for record in caplog.records if "steps_offset" in record.getMessage()]


def test_folders_of_the_stock_pipeline_load_here(model: LatentDiffusion, folder: Path, tmp_path: Path) -> None:
    diffusers.StableDiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs")
    assert again.diffusion.config.prediction == "flow"
    arguments: dict[str, Any] = {"seeds": [3, 4], "steps": 4}
    images, expected = (text_to_image(each, PROMPTS, **arguments) for each in (again, model))
    # Weights lie elsewhere in memory, which a CPU's kernels may choose by: a level of 255.
    assert int((images.int() - expected.int()).abs().max()) <= 1


def test_prompts_have_the_context_of_the_stock_pipeline(
    model: LatentDiffusion, minilm: TransformersTextEncoder, tmp_path: Path
) -> None:
    save_model(dataclasses.replace(model, text_encoder=minilm), tmp_path)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    prompts = [*PROMPTS, "word " * 40]
    theirs, empty = pipeline.encode_prompt(prompts, "cpu", 1, True)
    torch.testing.assert_close(minilm.encode(prompts).context, theirs)
    torch.testing.assert_close(minilm.null(3).context, empty, rtol=1e-4, atol=1e-5)


def test_a_loaded_model_is_the_saved_one(model: LatentDiffusion, folder: Path, tmp_path: Path) -> None:
    again = load_model(folder)
    assert again.unet.config == model.unet.config
    assert again.autoencoder.config == model.autoencoder.config
    assert again.diffusion == model.diffusion
    assert again.text_encoder.identity.split("@")[1] == model.text_encoder.identity.split("@")[1]
    save_model(again, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    assert model_hash(tmp_path / "again") == model_hash(folder)
    save_model(again, folder)  # over the files that its weights are mapped from
    assert model_hash(folder) == model_hash(tmp_path / "again")


def test_hash_is_of_the_models_files_alone(folder: Path) -> None:
    before = model_hash(folder)
    (folder / "README.md").write_text("A model.")
    assert model_hash(folder) == before
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert model_hash(folder) != before
    with pytest.raises(FolderError, match="not a model folder"):
        model_hash(folder / "unet")


@pytest.mark.parametrize(
    "path",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_absent_and_corrupt_files_are_named(folder: Path, path: str) -> None:
    file = folder / path
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(FolderError, match=path):
        load_model(folder)
    file.unlink()
    with pytest.raises(FolderError, match=f"{path} is absent"):
        load_model(folder)


def test_absent_text_encoder_is_named(folder: Path) -> None:
    (folder / "text_encoder").rename(folder / "elsewhere")
    with pytest.raises(FolderError, match="text_encoder"):
        load_model(folder)


def test_absent_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer").rename(folder / "elsewhere")
    with pytest.raises(FolderError, match="tokenizer is absent: give the folder of a transformers BertTokenizer"):
        load_model(folder)


def test_pickles_are_refused(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(FolderError, match=r"diffusion_pytorch_model.bin is a pickle, and refused"):
        load_model(folder)
    weights.with_suffix(".bin").rename(weights)
    text = folder / "text_encoder" / "model.safetensors"
    text.rename(text.with_name("pytorch_model.bin"))
    with pytest.raises(FolderError, match=r"text_encoder has no \*.safetensors: .* never from pickles"):
        load_model(folder, allow_pickle=True)


def test_a_language_models_variant_is_read(model: LatentDiffusion, folder: Path) -> None:
    text = folder / "text_encoder" / "model.safetensors"
    half = {name: value.half() for name, value in load_file(text).items()}
    save_file(half, text.with_name("model.fp16.safetensors"), metadata={"format": "pt"})
    name = "embeddings.word_embeddings.weight"
    for variant, expected in (
        ("fp16", half[name].float()),
        ("bf16", load_file(text)[name]),
        (None, load_file(text)[name]),
    ):
        encoder: Any = load_model(folder, variant=variant).text_encoder
        assert torch.equal(encoder.network.state_dict()[name], expected)
    text.unlink()
    assert load_model(folder, variant="fp16").text_encoder.width == model.text_encoder.width
    with pytest.raises(FolderError, match=r"text_encoder"):
        load_model(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("scaling_factor", "x"), ("scaling_factor", None), ("latents_mean", ["x"]), ("layers_per_block", 1.5)],
)
def test_values_of_a_wrong_type_are_named(autoencoder: AutoencoderKL, key: str, value: Any, tmp_path: Path) -> None:
    save_network(autoencoder, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=rf"config.json: AutoencoderKL: {key} = .*: must be of type"):
        load_network(AutoencoderKL, tmp_path)


def test_wrong_types_in_the_schedulers_file_and_the_index_are_named(folder: Path) -> None:
    for path, key in (("scheduler/scheduler_config.json", "flow_shift"), ("model_index.json", "max_noise_level")):
        file = folder / path
        before = file.read_text()
        file.write_text(json.dumps(json.loads(before) | {key: "x"}))
        with pytest.raises(ConfigError, match=f"{path}: {key} = 'x'"):
            load_model(folder)
        file.write_text(before)


@pytest.mark.parametrize("spacing", ["trailing", "karras", None])
def test_spacing_is_saved_and_loaded(model: LatentDiffusion, spacing: Any, tmp_path: Path) -> None:
    model.diffusion, model.spacing = Diffusion(DiffusionConfig("v")), spacing
    save_model(model, tmp_path)
    assert load_model(tmp_path).spacing == spacing
    if spacing is not None:
        model.diffusion = Diffusion(DiffusionConfig("flow"))
        with pytest.raises(ConfigError, match=f"spacing = '{spacing}' with prediction = 'flow'"):
            save_model(model, tmp_path)


def test_other_pipelines_are_refused(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(FolderError, match="'FluxPipeline', only StableDiffusionPipeline"):
        load_model(folder)


def test_weights_must_fit_their_configuration(
    unet: UNet2DCondition, autoencoder: AutoencoderKL, tmp_path: Path
) -> None:
    save_network(unet, tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"cross_attention_dim": 16}))
    with pytest.raises(FolderError, match=r"attn2.to_k.weight is \(32, 384\), its config.json asks for \(32, 16\)"):
        load_network(UNet2DCondition, tmp_path)
    path.write_text(json.dumps(values | {"layers_per_block": 2}))
    with pytest.raises(FolderError, match=r"lacks \d+ parameters"):
        load_network(UNet2DCondition, tmp_path)
    with pytest.raises(ConfigError, match=r"config.json: _class_name is 'UNet2DConditionModel'"):
        load_network(AutoencoderKL, tmp_path)
    save_network(autoencoder, tmp_path)
    path.write_text(json.dumps(autoencoder.config.to_dict() | {"use_quant_conv": False}))
    with pytest.raises(FolderError, match=r"has unknown \d parameters for its config.json, such as quant_conv"):
        load_network(AutoencoderKL, tmp_path)


def test_networks_load_in_the_dtype_asked_for(unet: UNet2DCondition, tmp_path: Path) -> None:
    save_network(unet.to(torch.bfloat16), tmp_path)
    loaded = load_network(UNet2DCondition, tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(loaded.conv_in.weight, unet.conv_in.weight.float())


@pytest.mark.parametrize(
    "values", [{"shift_factor": 0.2}, {"latents_mean": (0.1, 0.2, 0.3, 0.4), "latents_std": (1.0, 1.0, 1.0, 1.0)}]
)
def test_shifted_latents_are_not_exported(model: LatentDiffusion, values: dict[str, Any], tmp_path: Path) -> None:
    model.autoencoder = AutoencoderKL(dataclasses.replace(model.autoencoder.config, **values))
    with pytest.raises(FolderError, match=rf"{min(values)} = .*takes no notice of"):
        save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_packaged_encoder_is_left_as_it_is() -> None:
    source = resolve_text_encoder("minilm")
    before = (source / "config.json").read_bytes(), (source / "tokenizer_config.json").read_bytes()
    load_text_encoder("minilm").encode(["a red apple"])
    assert ((source / "config.json").read_bytes(), (source / "tokenizer_config.json").read_bytes()) == before
