"""What is read from files is what they say, as in the stock pipelines, or it is refused with the file's name."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from stock import stock_pipeline
from torch import Tensor

from ldm.conditioning.text import load_text_encoder, resolve_text_encoder
from ldm.errors import ConfigError, FolderError, InputError, LdmError
from ldm.generate import text_to_image
from ldm.interchange import layout_of, load_model, load_single_file, merge_lora, save_model, save_single_file
from ldm.interchange.files import read_pickle, read_weights

SD, XL, VARIATION = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusionImageVariationPipeline"
XL_INPAINT, REFINER, UPSCALE = (
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionUpscalePipeline",
)
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    for kind in (SD, XL, VARIATION, XL_INPAINT, UPSCALE):
        stock_pipeline(kind).save_pretrained(root / kind)
    return {folder.name: folder for folder in root.iterdir()}


def edited(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edited_weights(path: Path, change: dict[str, Tensor], without: str | None = None) -> None:
    weights = {name: value.clone() for name, value in load_file(path).items() if name != without}
    save_file(weights | change, path, metadata={"format": "pt"})


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("kind", "file", "name"),
    [
        (SD, UNET_FILE, "conv_in.weight"),
        (SD, "vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.bias"),
        (SD, "text_encoder/model.safetensors", "encoder.layers.0.mlp.fc1.weight"),
        (VARIATION, "image_encoder/model.safetensors", "visual_projection.weight"),
    ],
)
def test_a_quantised_weight_is_refused(
    kind: str, file: str, name: str, dtype: torch.dtype, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved[kind], tmp_path / "model")
    weight = load_file(folder / file)[name]
    edited_weights(folder / file, {name: (weight * 100).to(dtype)})
    with pytest.raises(FolderError, match=rf"{file}: {name} is {dtype}: quantised"):
        load_model(folder)


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.out.2", "first_stage_model.decoder.conv_out", "cond_stage_model"]
)
def test_a_quantised_weight_of_a_single_file_is_refused(prefix: str, saved: dict[str, Path], tmp_path: Path) -> None:
    model, path = load_model(saved[SD]), tmp_path / "model.safetensors"
    save_single_file(model, path)
    name = max(name for name in load_file(path) if name.startswith(prefix) and name.endswith("weight"))
    # Positions are a buffer, and published files have them.
    buffer = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    edited_weights(path, buffer)
    load_single_file(path, layout=layout_of(model))
    edited_weights(path, {name: (load_file(path)[name] * 100).to(torch.int8)})
    with pytest.raises(FolderError, match=rf"model.safetensors: {name} is torch.int8: quantised"):
        load_single_file(path, layout=layout_of(model))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_a_quantised_weight_of_a_language_model_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = shutil.copytree(resolve_text_encoder("minilm"), tmp_path / "model")
    name = "embeddings.LayerNorm.weight"
    edited_weights(folder / "model.safetensors", {name: torch.ones(384).to(dtype)})
    with pytest.raises(FolderError, match=rf"model.safetensors: {name} is .*: quantised"):
        load_text_encoder(folder)
    edited(folder / "config.json", quantization_config={"load_in_8bit": True})
    with pytest.raises(FolderError, match=r"config.json: quantization_config"):
        load_text_encoder(folder)


def test_weights_of_several_types_are_read_as_diffusers_does(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved[SD], tmp_path / "model")
    file = folder / UNET_FILE
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.float32)
    save_file({name: value.to(kinds[at % 4]) for at, (name, value) in enumerate(load_file(file).items())}, file)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in load_model(folder).unet.state_dict().items())


def test_where_a_folder_has_shards_and_a_whole_file_it_is_read_as_diffusers_does(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved[SD], tmp_path / "model")
    weights = load_file(folder / UNET_FILE)
    shard = {name: value + 1 for name, value in weights.items()}
    save_file(shard, folder / "unet" / "shard.safetensors")
    index = folder / f"{UNET_FILE}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "shard.safetensors")}))
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").conv_in.weight
    assert torch.equal(load_model(folder).unet.conv_in.weight, theirs)
    assert torch.equal(theirs, weights["conv_in.weight"] + 1)
    # transformers, the other way round
    text = folder / "text_encoder"
    towers = load_file(text / "model.safetensors")
    save_file({name: value + 1 for name, value in towers.items()}, text / "shard.safetensors")
    (text / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(towers, "shard.safetensors")})
    )
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    encoder: Any = load_model(folder).text_encoder
    for name, value in encoder.network.state_dict().items():
        assert torch.equal(value, pipeline.text_encoder.state_dict()[name])


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    path, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    places: dict[str, Any]
    for places, message in (
        ({"a": "one.safetensors", "b": "two.safetensors"}, "a is in one.safetensors and in two.safetensors"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "shards lack 1 parameters, such as b"),
        ({"a": "three.safetensors"}, "three.safetensors is absent"),
        ({"a": 1}, "has no weight_map"),
        ({"a": None}, "has no weight_map"),
        ({}, "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(FolderError, match=message):
            read_weights(path)


class Harm:
    """What a pickle could hold."""


def test_pickles_that_hold_more_than_tensors_are_refused_in_our_words(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    weights = {"a.weight": torch.ones(2)}
    # as Lightning writes it
    torch.save({"epoch": 3, "global_step": 7, "state_dict": weights, "lr_schedulers": [], "loops": {"x": {}}}, path)
    assert read_pickle(path).keys() == weights.keys()
    torch.save({"state_dict": {"state_dict": weights, "step": 1}}, path)
    assert read_pickle(path).keys() == weights.keys()
    torch.save({"state_dict": weights, "callbacks": {Path: 1}}, path)
    with pytest.raises(
        FolderError, match=r"model.ckpt is corrupt, or holds more than tensors: it has an object of pathlib"
    ):
        read_pickle(path)
    whole = path.read_bytes()
    for content in (
        b"",
        b"no pickle",
        whole[:200],
        whole[:-100],
        pickle.dumps({"a": 1}, 2),
        pickle.dumps([1, 2], 2),
        b"\x80\x02K.",
    ):
        path.write_bytes(content)
        with pytest.raises(FolderError, match=r"model.ckpt (is corrupt|holds no tensors)"):
            read_pickle(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}q\x00.")
    with pytest.raises(FolderError, match=r"model.ckpt"):
        read_pickle(path)
    for values in ({"state_dict": [1]}, {"state_dict": None}, [weights], {"a": 1}):
        torch.save(values, path)
        with pytest.raises(FolderError, match="holds no tensors by name"):
            read_pickle(path)
    torch.save(weights, path)
    with pytest.raises(FolderError, match="is a pickle, and refused"):
        load_single_file(path)


def test_weights_that_are_not_numbers_are_told_of_when_they_are_used(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved[SD], tmp_path / "model")
    edited_weights(folder / UNET_FILE, {"conv_in.bias": torch.full((32,), torch.nan)})
    with pytest.raises(LdmError, match=r"not (finite|numbers)|NaN"):
        text_to_image(load_model(folder), ["a red apple"], seeds=[1], steps=2)


# -- text --------------------------------------------------------------------------------------------------------------


def stock_states(folder: Path, kind: str, prompts: list[str]) -> tuple[Tensor, ...]:
    pipeline = getattr(diffusers, kind).from_pretrained(folder)
    states: tuple[Tensor, ...] = pipeline.encode_prompt(
        prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    return states


@pytest.mark.parametrize("kind", [SD, XL])
@torch.no_grad()
def test_a_tokenizer_says_how_many_tokens_are_read(kind: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved[kind], tmp_path / "model")
    prompts = ["a red apple", "wow! " * 40]
    files = [
        folder / part / "tokenizer_config.json" for part in ("tokenizer", "tokenizer_2") if (folder / part).exists()
    ]
    for file in files:
        edited(file, model_max_length=32)
    states, encoder = stock_states(folder, kind, prompts), load_model(folder).text_encoder
    assert encoder.length == states[0].shape[1] == 32
    torch.testing.assert_close(encoder.encode(prompts).context, states[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.null(2).context, states[1], rtol=1e-5, atol=1e-5)
    save_model(load_model(folder), tmp_path / "again")
    assert load_model(tmp_path / "again").text_encoder.length == 32
    for length in (2, 0, -1, 78, 200):
        for file in files:
            edited(file, model_max_length=length)
        with pytest.raises(ConfigError, match=rf"tokenizer.*: model_max_length = {length}: .*from 3 to 77 tokens"):
            load_model(folder)


@pytest.mark.parametrize("kind", [SD, XL])
@torch.no_grad()
def test_learned_tokens_of_several_vectors_are_written_out(kind: str, tmp_path: Path) -> None:
    pipeline = stock_pipeline(kind)
    for number in ("", "_2")[: 1 + (kind == XL)]:
        tokenizer, tower = getattr(pipeline, f"tokenizer{number}"), getattr(pipeline, f"text_encoder{number}")
        tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>"])
        tower.resize_token_embeddings(len(tokenizer))
        torch.nn.init.normal_(tower.get_input_embeddings().weight)
    pipeline.save_pretrained(tmp_path)
    prompts = ["a <cat> on a mat, <cat>", "a <dog>", "a mat"]
    states, encoder = stock_states(tmp_path, kind, prompts), load_model(tmp_path).text_encoder
    torch.testing.assert_close(encoder.encode(prompts).context, states[0], rtol=1e-5, atol=1e-5)
    if kind == SD:
        assert not torch.equal(states[0][0], stock_states(tmp_path, kind, ["a mat"])[0][0])
        counted: Any = encoder
        assert counted.num_tokens(prompts)[0] > counted.num_tokens(["a <dog> on a mat, <dog>"])[0]


def test_a_token_without_an_embedding_is_named(tmp_path: Path) -> None:
    pipeline = stock_pipeline(SD)
    pipeline.tokenizer.add_tokens(["<cat>"])
    pipeline.save_pretrained(tmp_path)
    encoder = load_model(tmp_path).text_encoder
    encoder.encode(["a mat"])
    with pytest.raises(InputError, match="token '<cat>' has number 190, the text encoder only 190 embeddings"):
        encoder.encode(["a <cat>"])


# -- what stock pipelines take no notice of ----------------------------------------------------------------------------

CHANNELS = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [0.9, 1.1, 1.2, 0.8]}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (SD, {"shift_factor": 0.2}, "shift_factor = 0.2"),
        (XL, {"shift_factor": 0.2}, "shift_factor = 0.2"),
        (SD, CHANNELS, r"latents_mean = \(0.1"),
        (UPSCALE, CHANNELS, r"latents_mean = \(0.1"),
        (VARIATION, CHANNELS, r"latents_mean = \(0.1"),
        (XL_INPAINT, CHANNELS, r"latents_mean = \(0.1"),
    ],
)
def test_a_distribution_of_latents_that_the_stock_pipeline_ignores_is_refused(
    kind: str, values: dict[str, Any], message: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved[kind], tmp_path / "model")
    edited(folder / "vae" / "config.json", **values)
    with pytest.raises(FolderError, match=rf"vae/config.json: {message}.*{kind} takes no notice"):
        load_model(folder)
    edited(folder / "vae" / "config.json", shift_factor=0.0, latents_mean=None, latents_std=None)
    load_model(folder)


def test_means_and_deviations_of_xls_latents_are_read(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved[XL], tmp_path / "model")
    edited(folder / "vae" / "config.json", **CHANNELS)
    assert load_model(folder).autoencoder.config.latents_mean == tuple(CHANNELS["latents_mean"])


@pytest.mark.filterwarnings("ignore:The configuration file of the unet has set the default `sample_size`:FutureWarning")
@pytest.mark.parametrize(("kind", "version", "size"), [(SD, "0.8.0", 64), (SD, "0.10.0", 8), (XL, "0.8.0", 8)])
def test_a_small_size_of_an_old_file_is_what_the_stock_pipeline_takes_it_for(
    kind: str, version: str, size: int, saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved[kind], tmp_path / "model")
    edited(folder / "unet" / "config.json", _diffusers_version=version)
    assert load_model(folder).unet.config.sample_size == size
    assert getattr(diffusers, kind).from_pretrained(folder).unet.config.sample_size == size


def test_an_aesthetics_score_is_asked_for_where_the_stock_pipeline_has_one(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(saved[XL], tmp_path / "model")
    edited(folder / "model_index.json", requires_aesthetics_score=True)
    assert not load_model(folder).aesthetics_score
    edited(folder / "model_index.json", _class_name=REFINER)
    assert load_model(folder).aesthetics_score
    edited(folder / "model_index.json", requires_aesthetics_score="no")
    with pytest.raises(ConfigError, match=r"model_index.json: requires_aesthetics_score = 'no': must be true or false"):
        load_model(folder)


def test_a_merged_model_is_saved_merged(saved: dict[str, Path], tmp_path: Path) -> None:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    parts = {f"unet.{layer}.lora_A.weight": torch.ones(1, 64), f"unet.{layer}.lora_B.weight": torch.ones(64, 1)}
    save_file(parts, tmp_path / "lora.safetensors")
    model = load_model(saved[SD])
    merge_lora(model, tmp_path / "lora.safetensors", 0.5)
    save_model(model, tmp_path / "model")
    before, after = (load_file(folder / UNET_FILE)[f"{layer}.weight"] for folder in (saved[SD], tmp_path / "model"))
    torch.testing.assert_close(after, before + 0.5, rtol=0, atol=1e-6)  # one rounding
