"""Original checkpoints: names against diffusers' converters and open_clip, and models there and back to the bit."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import diffusers
import open_clip
import pytest
import torch
from diffusers.loaders import single_file_utils as stock_converter
from safetensors.torch import load_file, save_file
from stock import stock_pipeline, text_tower, tokenizer
from torch import Tensor

from ldm import shapes
from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.conditioning.clip_text import SDXL_FIRST, SDXL_SECOND, ClipTextEncoder, PairedTextEncoder
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.errors import ConfigError, FolderError
from ldm.generate import LatentDiffusion, text_to_image
from ldm.interchange import LAYOUTS, Layout, layout_of, load_model, load_single_file, save_model, save_single_file
from ldm.interchange.keys import autoencoder_keys, ema_key, open_clip_keys, unet_keys
from ldm.interchange.single_file import AUTOENCODER, UNET, V_PREDICTION, X4_AUTOENCODER, ZERO_SNR, detect
from ldm.interchange.towers import tower_from_original, tower_to_original
from ldm.unet import UNet2DCondition, UNetConfig

KINDS = {
    "sd1": "StableDiffusionPipeline",
    "sd1-inpaint": "StableDiffusionInpaintPipeline",
    "sd2": "StableDiffusionPipeline",
    "sd2-inpaint": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-inpaint": "StableDiffusionXLInpaintPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "x4-upscaler": "StableDiffusionUpscalePipeline",
}
FULL_SIZE = {name: value for name, value in vars(shapes).items() if isinstance(value, UNetConfig)}
TINY_UNET = UNetConfig(
    block_out_channels=(8, 16, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 1),
    layers_per_block=3,
    attention_head_dim=2,
    norm_num_groups=4,
)
TINY_AUTOENCODER = AutoencoderConfig(block_out_channels=(4, 8), layers_per_block=3, norm_num_groups=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LatentDiffusion]:
    """A tiny random model of each layout."""
    root, made = tmp_path_factory.mktemp("models"), {}
    for name, kind in KINDS.items():
        linear = {"use_linear_projection": True} if name.startswith("sd2") else {}
        pipeline = stock_pipeline(kind, **linear)
        if name.startswith("sd2") or name == "x4-upscaler":
            pipeline.register_modules(text_encoder=text_tower(act="gelu"), tokenizer=tokenizer("!"))
        pipeline.save_pretrained(root / name)
        made[name] = load_model(root / name)
    return made


def weights_of(model: LatentDiffusion) -> dict[str, Tensor]:
    encoder: Any = model.text_encoder
    towers = [encoder.first, encoder.second] if isinstance(encoder, PairedTextEncoder) else [encoder]
    networks = [model.unet, model.autoencoder, *(tower.network for tower in towers)]
    return {
        f"{at}.{name}": value for at, network in enumerate(networks) for name, value in network.state_dict().items()
    }


def assert_same_weights(ours: LatentDiffusion, others: LatentDiffusion) -> None:
    mine, theirs = weights_of(ours), weights_of(others)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


# diffusers hands tensors to np.array: NumPy 2 would like torch to take its `copy` keyword.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*FULL_SIZE.values(), TINY_UNET], ids=[*FULL_SIZE, "tiny"])
def test_names_of_the_unet_are_those_of_diffusers_converter(config: UNetConfig) -> None:
    with torch.device("meta"):
        ours = UNet2DCondition(config).state_dict()
    keys = unet_keys(config)
    assert keys.keys() == ours.keys()
    theirs = stock_converter.convert_ldm_unet_checkpoint(
        {UNET + keys[name]: value for name, value in ours.items()}, config.to_dict()
    )
    assert theirs.keys() == ours.keys()
    assert all(theirs[name] is value for name, value in ours.items())


@pytest.mark.parametrize("config", [AutoencoderConfig(), X4_AUTOENCODER, TINY_AUTOENCODER])
def test_names_of_the_autoencoder_are_those_of_diffusers_converter(config: AutoencoderConfig) -> None:
    with torch.device("meta"):
        ours = AutoencoderKL(config).state_dict()
    keys = autoencoder_keys(config)
    assert keys.keys() == ours.keys()
    theirs = stock_converter.convert_ldm_vae_checkpoint(
        {AUTOENCODER + keys[name]: value for name, value in ours.items()}, config.to_dict()
    )
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        # The converter copies attention out of convolutions, which linear layers already are here.
        assert theirs[name] is value or ".attentions." in name
        assert theirs[name].shape == value.shape


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_towers_are_those_of_open_clip_and_of_diffusers_converter(name: str) -> None:
    tower = LAYOUTS[name].towers[-1]
    network = text_tower(projected=tower.projected, act="gelu", layers=2)
    original = tower_to_original(tower, network)
    converted = stock_converter.convert_open_clip_checkpoint(network, original, prefix=tower.prefix)
    ours = {key.removeprefix("text_model."): value for key, value in network.state_dict().items()}
    theirs = {key.removeprefix("text_model."): value for key, value in converted.items() if ".layers.2." not in key}
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], value) for key, value in ours.items())
    again = tower_from_original(tower, original, Path("x.safetensors"), torch.float32).state_dict()
    assert all(torch.equal(again[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize(("name", "width", "layers"), [("sd2", 1024, 24), ("sdxl", 1280, 32)])
def test_names_of_full_size_towers_are_those_of_open_clip(name: str, width: int, layers: int) -> None:
    with torch.device("meta"):
        settings = open_clip.model.CLIPTextCfg(width=width, heads=width // 64, layers=layers)
        vision = {"image_size": 28, "patch_size": 14, "width": 64, "layers": 1}
        theirs = open_clip.model.CLIP(width, vision, settings).state_dict()
    text = {key for key in theirs if not key.startswith("visual.")} - {"logit_scale", "text_projection"}
    assert set(open_clip_keys(layers)) == text


def test_states_of_a_tower_are_open_clips() -> None:
    tower = LAYOUTS["sd2"].towers[0]
    network = text_tower(act="gelu", layers=2)
    config = network.config
    ratio = config.intermediate_size / config.hidden_size
    settings = open_clip.model.CLIPTextCfg(
        width=config.hidden_size, heads=1, layers=3, vocab_size=config.vocab_size, mlp_ratio=ratio
    )
    theirs = open_clip.model.CLIP(
        8, {"image_size": 16, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32}, settings
    ).eval()
    state = {name.removeprefix(tower.prefix): value for name, value in tower_to_original(tower, network).items()}
    report = theirs.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    tokens = tokenizer("!")(["a red apple"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = theirs.token_embedding(tokens) + theirs.positional_embedding
        for block in theirs.transformer.resblocks[:-1]:
            hidden = block(hidden, attn_mask=theirs.attn_mask)
        torch.testing.assert_close(theirs.ln_final(hidden), network(tokens)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs.transformer.resblocks[-1](hidden, attn_mask=theirs.attn_mask), hidden)


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_model_comes_back_to_the_bit(name: str, models: dict[str, LatentDiffusion], tmp_path: Path) -> None:
    model, path = models[name], tmp_path / "model.safetensors"
    save_single_file(model, path)
    layout = layout_of(model)
    assert layout.towers == LAYOUTS[name].towers
    assert (layout.zeros, layout.aesthetics_score) == (LAYOUTS[name].zeros, LAYOUTS[name].aesthetics_score)
    again = load_single_file(path, layout=layout)
    assert_same_weights(again, model)
    assert again.diffusion == model.diffusion
    assert again.low_res_diffusion == model.low_res_diffusion
    assert again.max_noise_level == model.max_noise_level
    assert (again.unet.config, again.autoencoder.config) == (model.unet.config, model.autoencoder.config)
    save_single_file(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_stock_converters_read_what_is_written(name: str, models: dict[str, LatentDiffusion], tmp_path: Path) -> None:
    model = models[name]
    save_single_file(model, tmp_path / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    unet = stock_converter.convert_ldm_unet_checkpoint(dict(written), model.unet.config.to_dict())
    autoencoder = stock_converter.convert_ldm_vae_checkpoint(dict(written), model.autoencoder.config.to_dict())
    for theirs, ours in ((unet, model.unet), (autoencoder, model.autoencoder)):
        assert theirs.keys() == ours.state_dict().keys()
        assert all(torch.equal(theirs[key], value) for key, value in ours.state_dict().items())
    encoder: Any = model.text_encoder
    first = encoder.first if isinstance(encoder, PairedTextEncoder) else encoder
    text = stock_converter.convert_ldm_clip_checkpoint(dict(written))
    ours = {f"text_model.{key}": value for key, value in first.network.state_dict().items()}
    assert text.keys() == ours.keys()
    assert all(torch.equal(text[key], value) for key, value in ours.items())


@pytest.mark.parametrize("name", ["sd1", "sdxl", "x4-upscaler"])
def test_stock_pipelines_load_what_is_written(name: str, models: dict[str, LatentDiffusion], tmp_path: Path) -> None:
    model = models[name]
    save_single_file(model, tmp_path / "model.safetensors")
    save_model(model, tmp_path / "config")
    pipeline = getattr(diffusers, KINDS[name]).from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "config"), local_files_only=True
    )
    theirs = [pipeline.unet, pipeline.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    stock = {
        f"{at}.{key}": value
        for at, network in enumerate(theirs)
        if network is not None
        for key, value in network.state_dict().items()
    }
    ours = weights_of(model)
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[key], value) for key, value in ours.items())


def test_a_file_makes_the_images_of_the_stock_pipeline(models: dict[str, LatentDiffusion], tmp_path: Path) -> None:
    model = models["sd1"]
    whole = text_tower(vocabulary=49408, end=49407)
    encoder = ClipTextEncoder(whole, tokenizer(), name="text_encoder")
    save_single_file(dataclasses.replace(model, text_encoder=encoder), tmp_path / "model.safetensors")
    loaded = load_single_file(tmp_path / "model.safetensors", layout=layout_of(model))
    save_model(loaded, tmp_path / "folder")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt = "a red apple, on a table"
    expected = pipeline(prompt, latents=noise, num_inference_steps=4, guidance_scale=5.0, output_type="np").images
    ours = text_to_image(loaded, [prompt], noise=noise, steps=4, guidance_scale=5.0)
    difference = (torch.from_numpy((expected * 255).round()).int() - ours.int()).abs()
    assert float((difference <= 1).float().mean()) >= 0.999


def test_tokens_are_those_of_open_clip(models: dict[str, LatentDiffusion], tmp_path: Path) -> None:
    save_single_file(models["sdxl"], tmp_path / "model.safetensors")
    encoder = load_single_file(tmp_path / "model.safetensors", layout=layout_of(models["sdxl"])).text_encoder
    assert isinstance(encoder, PairedTextEncoder)
    prompts = ["a red apple, on a table", "Ein Café; 3 km weit (naïve)", ""]
    theirs = open_clip.SimpleTokenizer()(prompts)
    for tower, layer, pad in ((encoder.first, SDXL_FIRST, 49407), (encoder.second, SDXL_SECOND, 0)):
        assert isinstance(tower, ClipTextEncoder)
        assert tower.layer == layer
        tokens = tower.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        after_end = theirs.eq(49407).cumsum(1) - theirs.eq(49407).long() > 0
        assert torch.equal(tokens, theirs.masked_fill(after_end, pad))


# -- what a file tells -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_shapes_are_told_from_their_parameters(name: str) -> None:
    config = LAYOUTS[name].unet
    keys = unet_keys(config)
    with torch.device("meta"):
        state = UNet2DCondition(config).state_dict()
    assert detect({UNET + keys[key]: value for key, value in state.items()}, Path("x.safetensors")) == name


def test_unknown_shapes_are_told(models: dict[str, LatentDiffusion], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_single_file(models["sd1"], path)
    with pytest.raises(FolderError, match=r"unknown shape: its U-Net takes 4 channels, contexts 64 wide, vectors None"):
        load_single_file(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(FolderError, match="is not an original checkpoint"):
        load_single_file(path)
    save_file({"edm_mean": torch.zeros(1)}, path)
    with pytest.raises(FolderError, match="has edm_mean: it was trained in a way that is not known here"):
        load_single_file(path)


def published(monkeypatch: pytest.MonkeyPatch, name: str, model: LatentDiffusion) -> None:
    """Let the tiny model be what the published one of this name is."""
    layout = dataclasses.replace(layout_of(model), diffusion=LAYOUTS[name].diffusion)
    monkeypatch.setattr("ldm.interchange.single_file.LAYOUTS", {name: layout})


def test_stable_diffusion_2_needs_its_prediction(
    models: dict[str, LatentDiffusion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_single_file(models["sd2"], path)
    published(monkeypatch, "sd2", models["sd2"])
    with pytest.raises(ConfigError, match=r"model.safetensors doesn't tell what it predicts: give prediction"):
        load_single_file(path)
    assert load_single_file(path, prediction="v").diffusion.config == DiffusionConfig("v")
    assert load_single_file(path, prediction="eps").diffusion.config == DiffusionConfig("eps")


def test_predictions_that_a_file_tells_are_kept(
    models: dict[str, LatentDiffusion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    trained = DiffusionConfig("v", zero_terminal_snr=True)
    save_single_file(dataclasses.replace(models["sdxl"], diffusion=Diffusion(trained)), path)
    assert {V_PREDICTION, ZERO_SNR} <= load_file(path).keys()
    published(monkeypatch, "sdxl", models["sdxl"])
    assert load_single_file(path).diffusion.config == trained
    save_single_file(models["sdxl"], path)
    assert load_single_file(path).diffusion.config == DiffusionConfig("eps")


def test_moving_averages_are_read_when_asked_for(models: dict[str, LatentDiffusion], tmp_path: Path) -> None:
    model, path = models["sd1"], tmp_path / "model.safetensors"
    save_single_file(model, path)
    with pytest.raises(FolderError, match=r"has no model_ema\.\*"):
        load_single_file(path, layout=layout_of(model), ema=True)
    weights = load_file(path)
    names = [name.removeprefix(UNET) for name in weights if name.startswith(UNET)]
    weights |= {ema_key(name): weights[UNET + name] + 1 for name in names}
    assert "model_ema.diffusion_modelinput_blocks00weight" in weights
    stock = stock_converter.convert_ldm_unet_checkpoint(dict(weights), model.unet.config.to_dict(), extract_ema=True)
    save_file(weights, path)
    plain, averaged = (load_single_file(path, layout=layout_of(model), ema=ema).unet for ema in (False, True))
    assert torch.equal(plain.conv_in.weight, model.unet.conv_in.weight)
    assert all(torch.equal(value, stock[name]) for name, value in averaged.state_dict().items())


def test_other_entries_of_published_files_do_no_harm(models: dict[str, LatentDiffusion], tmp_path: Path) -> None:
    model, path = models["sd2"], tmp_path / "model.safetensors"
    save_single_file(model, path)
    more = ("alphas_cumprod", "first_stage_model.loss.logvar", "cond_stage_model.model.logit_scale")
    more += ("cond_stage_model.model.text_projection", "model_ema.decay", "cond_stage_model.model.attn_mask")
    save_file(load_file(path) | {name: torch.zeros(2, 2) for name in more}, path)
    assert_same_weights(load_single_file(path, layout=layout_of(model)), model)
    sd1 = models["sd1"]
    save_single_file(sd1, path)
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    save_file(load_file(path) | {ids: torch.arange(77)[None]}, path)
    assert_same_weights(load_single_file(path, layout=layout_of(sd1)), sd1)


def test_weights_are_in_the_dtype_asked_for(models: dict[str, LatentDiffusion], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_single_file(models["sdxl"], path)
    half = load_single_file(path, layout=layout_of(models["sdxl"]), dtype=torch.bfloat16)
    assert {value.dtype for value in weights_of(half).values()} == {torch.bfloat16}
    save_single_file(half, path)
    kept = {value.dtype for name, value in load_file(path).items() if name.startswith((UNET, "conditioner."))}
    assert kept == {torch.bfloat16}
    upcast = load_single_file(path, layout=layout_of(models["sdxl"]), dtype=torch.float16)
    assert upcast.unet.conv_in.weight.dtype == torch.float16
    assert upcast.autoencoder.decoder.conv_in.weight.dtype == torch.float32
    save_single_file(models["sd1"], path)
    plain = load_single_file(path, layout=layout_of(models["sd1"]), dtype=torch.float16)
    assert plain.autoencoder.decoder.conv_in.weight.dtype == torch.float16


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_pickles_are_read_only_when_asked_for(models: dict[str, LatentDiffusion], tmp_path: Path) -> None:
    model, path = models["sd1"], tmp_path / "model.ckpt"
    save_single_file(model, tmp_path / "model.safetensors")
    torch.save({"state_dict": load_file(tmp_path / "model.safetensors"), "global_step": 3}, path)
    with pytest.raises(FolderError, match=r"model.ckpt is a pickle, and refused: allow_pickle=True"):
        load_single_file(path, layout=layout_of(model))
    assert_same_weights(load_single_file(path, layout=layout_of(model), allow_pickle=True), model)
    torch.save({"state_dict": Path("harm")}, path)
    with pytest.raises(FolderError, match=r"model.ckpt is corrupt, or holds more than tensors"):
        load_single_file(path, allow_pickle=True)


def test_absent_and_corrupt_files_are_named(models: dict[str, LatentDiffusion], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(FolderError, match=r"model.safetensors is absent"):
        load_single_file(path)
    save_single_file(models["sd1"], path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FolderError, match=r"model.safetensors is corrupt or can't be read"):
        load_single_file(path)


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("first_stage_model.", r"has no first_stage_model\.\*"),
        ("cond_stage_model.", r"has no cond_stage_model.transformer.\*: it is without the text encoder"),
        ("model.diffusion_model.out.2.bias", "lacks 1 parameters for its layout, such as conv_out.bias"),
        ("first_stage_model.quant_conv.bias", "lacks 1 parameters for its layout, such as quant_conv.bias"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", r"lacks 1 weights of its CLIPTextModel"),
    ],
)
def test_files_that_lack_parameters_are_refused(
    dropped: str, message: str, models: dict[str, LatentDiffusion], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_single_file(models["sd1"], path)
    save_file({name: value for name, value in load_file(path).items() if not name.startswith(dropped)}, path)
    with pytest.raises(FolderError, match=message):
        load_single_file(path, layout=layout_of(models["sd1"]))


def test_parameters_must_be_those_of_the_layout(models: dict[str, LatentDiffusion], tmp_path: Path) -> None:
    model, path = models["sd2"], tmp_path / "model.safetensors"
    save_single_file(model, path)
    layout: Layout = layout_of(model)
    wider = dataclasses.replace(layout.unet, in_channels=9)
    with pytest.raises(FolderError, match=r"conv_in.weight is \(32, 4, 3, 3\), its layout asks for \(32, 9, 3, 3\)"):
        load_single_file(path, layout=dataclasses.replace(layout, unet=wider))
    for name in ("cond_stage_model.model.ln_final.bias", UNET + "surplus"):
        weights = load_file(path)
        weights[name + ".more"] = torch.zeros(1)
        save_file(weights, tmp_path / "more.safetensors")
        with pytest.raises(FolderError, match=r"has unknown"):
            load_single_file(tmp_path / "more.safetensors", layout=layout)


def test_encoders_without_a_place_are_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="BertModel has no place in an original checkpoint"):
        save_single_file(model, tmp_path / "model.safetensors")
    with pytest.raises(FolderError, match=r"are written as \.safetensors only"):
        save_single_file(model, tmp_path / "model.ckpt")


@pytest.fixture
def like_sd1() -> LatentDiffusion:
    """What load_single_file makes of a file, by the layout of tiny shapes that SD 1's parameters tell."""
    config = dataclasses.replace(
        shapes.SD1_UNET, block_out_channels=(8, 8, 8, 8), attention_head_dim=2, layers_per_block=1, norm_num_groups=4
    )
    return LatentDiffusion(
        UNet2DCondition(config).eval(),
        AutoencoderKL(AutoencoderConfig(block_out_channels=(8,), norm_num_groups=8, layers_per_block=1)).eval(),
        ClipTextEncoder(text_tower(), tokenizer(), name="text_encoder"),
        Diffusion(DiffusionConfig("eps")),
    )


def test_shapes_that_a_file_can_not_tell_are_refused(like_sd1: LatentDiffusion, tmp_path: Path) -> None:
    with pytest.raises(
        FolderError, match=r"can't tell unet.block_out_channels = \[8, 8, 8, 8\] \(loaded as \[320, 640"
    ):
        save_single_file(like_sd1, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    save_single_file(like_sd1, tmp_path / "model.safetensors", layout_kept=True)
    again = load_single_file(tmp_path / "model.safetensors", layout=layout_of(like_sd1))
    assert_same_weights(again, like_sd1)


def test_a_process_that_a_file_can_tell_is_kept(
    like_sd1: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(monkeypatch, "sd1", like_sd1)
    save_single_file(like_sd1, tmp_path / "model.safetensors")
    assert load_single_file(tmp_path / "model.safetensors").diffusion == like_sd1.diffusion


@pytest.mark.parametrize(
    ("config", "autoencoder", "message"),
    [
        (DiffusionConfig("flow"), {}, "diffusion.prediction = 'flow' (loaded as 'eps')"),
        (DiffusionConfig("x0"), {}, "diffusion.prediction = 'x0' (loaded as 'eps')"),
        (DiffusionConfig("edm"), {}, "diffusion.prediction = 'edm' (loaded as 'eps')"),
        (DiffusionConfig("x0", zero_terminal_snr=True), {}, "diffusion.prediction = 'x0' (loaded as 'eps')"),
        (DiffusionConfig("eps", "linear"), {}, "diffusion.schedule = 'linear' (loaded as 'scaled_linear')"),
        (DiffusionConfig("v", beta_end=0.02), {}, "diffusion.betas = (0.00085, 0.02) (loaded as (0.00085, 0.012))"),
        (DiffusionConfig("eps"), {"scaling_factor": 0.2}, "autoencoder.scaling_factor = 0.2 (loaded as 0.18215)"),
        (DiffusionConfig("eps"), {"shift_factor": 0.1}, "autoencoder.shift_factor = 0.1 (loaded as None)"),
    ],
)
def test_processes_that_a_file_can_not_tell_are_refused(
    config: DiffusionConfig,
    autoencoder: dict[str, Any],
    message: str,
    like_sd1: LatentDiffusion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "model.safetensors"
    published(monkeypatch, "sd1", like_sd1)
    changed = AutoencoderKL(dataclasses.replace(like_sd1.autoencoder.config, **autoencoder)).eval()
    model = dataclasses.replace(like_sd1, diffusion=Diffusion(config), autoencoder=changed)
    with pytest.raises(FolderError, match=re.escape(message)):
        save_single_file(model, path)
    save_single_file(model, path, layout_kept=True)
    again = load_single_file(path, layout=layout_of(model))
    assert (again.diffusion, again.autoencoder.config) == (model.diffusion, model.autoencoder.config)


def test_other_noise_levels_and_towers_are_refused(
    models: dict[str, LatentDiffusion], like_sd1: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    published(monkeypatch, "x4-upscaler", models["x4-upscaler"])
    with pytest.raises(FolderError, match=r"max_noise_level = 300 \(loaded as 250\)"):
        save_single_file(dataclasses.replace(models["x4-upscaler"], max_noise_level=300), path)
    encoder: Any = like_sd1.text_encoder
    encoder.network.config.num_attention_heads = 2
    with pytest.raises(FolderError, match=r"num_attention_heads = 2: .* is read with 1; save a folder"):
        save_single_file(like_sd1, path, layout_kept=True)
