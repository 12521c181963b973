"""Every key of the networks' and encoders' configurations is honoured, as diffusers does it, or refused by name."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from PIL import Image
from stock import stock_pipeline

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL, IdentityConfig
from ldm.conditioning.image import ImagePreprocessing
from ldm.errors import ConfigError, FolderError, LdmError
from ldm.interchange import load_model, load_network
from ldm.unet import UNet2DCondition, UNetConfig

Change = tuple[str, Any]
NAN, INFINITE, ABSURD = float("nan"), float("inf"), 10**30

UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
}
UNET_VALUES: dict[str, list[Any]] = {
    "sample_size": [16, None, (8, 16), 0, ABSURD],
    "in_channels": [9, 0, -1, ABSURD],
    "out_channels": [8, 0],
    "center_input_sample": [True],
    "flip_sin_to_cos": [False],
    "freq_shift": [1, 0.5, 4, -1],
    "down_block_types": [("CrossAttnDownBlock2D",) * 2, ("AttnDownBlock2D", "DownBlock2D"), ("CrossAttnDownBlock2D",)],
    "mid_block_type": ["UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn", None],
    "up_block_types": [("CrossAttnUpBlock2D",) * 2, ("SimpleCrossAttnUpBlock2D",) * 2],
    "only_cross_attention": [True, (True, False)],
    "block_out_channels": [(8, 24), (), (8, ABSURD), (8,) * 17],
    "layers_per_block": [2, (1, 2), 0, 10**9],
    "downsample_padding": [0],
    "mid_block_scale_factor": [2, 0.5],
    "dropout": [0.5],
    "act_fn": ["swish", "gelu", "mish", "relu"],
    "norm_num_groups": [2, 1, None, 0],
    "norm_eps": [1e-3, 0.0, NAN, INFINITE],
    "cross_attention_dim": [16, (8, 16), -8],
    "transformer_layers_per_block": [2, (1, 2), ((1,), (1,)), 10**9],
    "reverse_transformer_layers_per_block": [(2, 1)],
    "encoder_hid_dim": [12],
    "encoder_hid_dim_type": ["text_proj", "image_proj"],
    "attention_head_dim": [4, (2, 4), 3],
    "num_attention_heads": [2, (2, 4)],
    "dual_cross_attention": [True],
    "use_linear_projection": [True],
    "class_embed_type": ["timestep", "identity", "projection", "simple_projection"],
    "addition_embed_type": ["text", "text_image", "image"],
    "addition_time_embed_dim": [4],
    "num_class_embeds": [10, 0],
    "upcast_attention": [True, None],
    "resnet_time_scale_shift": ["scale_shift"],
    "resnet_skip_time_act": [True],
    "resnet_out_scale_factor": [2.0],
    "time_embedding_type": ["fourier"],
    "time_embedding_dim": [16],
    "time_embedding_act_fn": ["silu", "gelu"],
    "timestep_post_act": ["silu"],
    "time_cond_proj_dim": [8],
    "conv_in_kernel": [1],
    "conv_out_kernel": [5],
    "projection_class_embeddings_input_dim": [12],
    "attention_type": ["gated"],
    "class_embeddings_concat": [True],
    "mid_block_only_cross_attention": [True],
    "cross_attention_norm": ["layer_norm"],
    "addition_embed_type_num_heads": [8],
}
VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
    "sample_size": 16,
}
VAE_VALUES: dict[str, list[Any]] = {
    "in_channels": [1, 0, -1],
    "out_channels": [1, 4, 0],
    "down_block_types": [("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), "x", None],
    "up_block_types": [("UpDecoderBlock2D", "AttnUpDecoderBlock2D"), ("UpDecoderBlock2D",)],
    "block_out_channels": [(8, 24), (), (0, 8), (-8, 8), (ABSURD, 8)],
    "layers_per_block": [2, 0, -1, 10**9],
    "act_fn": ["swish", "gelu"],
    "latent_channels": [8, 0, -4, ABSURD],
    "norm_num_groups": [2, 0, -4, None],
    "sample_size": [32, 0, -1, None],
    "scaling_factor": [0.3, 1, 0, -1.0, NAN, INFINITE],
    "shift_factor": [0.1, 0, NAN],
    "latents_mean": [(NAN,) * 4, (0.0,)],
    "latents_std": [(0.0,) * 4, (1.0,)],
    "force_upcast": [False, None, "x"],
    "use_quant_conv": [False],
    "use_post_quant_conv": [False],
    "mid_block_add_attention": [False],
    "quantization_config": [{"load_in_8bit": True}],
}


def changes(values: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param((key, value), id=f"{key}={value!r:.30}") for key, each in values.items() for value in each]


def buildable(change: Change) -> bool:
    """Whether it is safe to try it in diffusers, which allocates what it is told to."""
    numbers = change[1] if isinstance(change[1], tuple) else (change[1],)
    return all(not isinstance(number, int) or isinstance(number, bool) or 0 < number < 10**6 for number in numbers)


def written(cls: Any, base: dict[str, Any], change: Change, folder: Path) -> Any:
    """diffusers' network with this change, in a folder; or, where it can't be built, None, and a changed file."""
    torch.manual_seed(0)
    try:
        network = cls(**base | dict([change])).eval() if buildable(change) else None
    except (TypeError, ValueError, AttributeError, NotImplementedError, LookupError):
        network = None
    (network or cls(**base)).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict([change])))
    return network


def test_all_keys_of_diffusers_are_tried() -> None:
    for cls, values in ((diffusers.UNet2DConditionModel, UNET_VALUES), (diffusers.AutoencoderKL, VAE_VALUES)):
        assert set(inspect.signature(cls.__init__).parameters) - {"self"} <= set(values)


@pytest.mark.parametrize("change", changes(UNET_VALUES))
@torch.no_grad()
def test_a_key_of_the_u_net_is_honoured_or_refused(change: Change, tmp_path: Path) -> None:
    theirs = written(diffusers.UNet2DConditionModel, UNET, change, tmp_path)
    try:
        ours = load_network(UNet2DCondition, tmp_path).eval()
    except ConfigError as error:
        assert change[0] in str(error)  # noqa: PT017
        return
    assert theirs is not None
    config = ours.config
    latents, context = torch.randn(2, config.in_channels, 8, 8), torch.randn(2, 5, config.cross_attention_dim)
    times = torch.tensor([3, 700])
    labels = torch.tensor([1, 2]) if config.num_class_embeds else None
    expected = theirs(latents, times, context, class_labels=labels).sample
    torch.testing.assert_close(ours(latents, times, context, noise_level_B=labels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", changes(VAE_VALUES))
@torch.no_grad()
def test_a_key_of_the_autoencoder_is_honoured_or_refused(change: Change, tmp_path: Path) -> None:
    theirs = written(diffusers.AutoencoderKL, VAE, change, tmp_path)
    try:
        ours = load_network(AutoencoderKL, tmp_path).eval()
    except ConfigError as error:
        assert change[0] in str(error)  # noqa: PT017
        return
    assert theirs is not None or change == ("shift_factor", 0)
    theirs = theirs or diffusers.AutoencoderKL.from_pretrained(tmp_path)
    pixels, latents = torch.randn(2, ours.config.in_channels, 16, 16), torch.randn(2, ours.config.latent_channels, 8, 8)
    moments = theirs.encode(pixels).latent_dist.parameters
    torch.testing.assert_close(ours.encode(pixels), moments, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents).sample, rtol=1e-5, atol=1e-5)
    assert ours.config.scaling_factor == theirs.config.scaling_factor


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: AutoencoderConfig(scaling_factor=0), "scaling_factor"),
        (lambda: AutoencoderConfig(latents_mean=(0.0,) * 4, latents_std=(1.0, 1.0, 0.0, 1.0)), "latents_std"),
        (lambda: AutoencoderConfig(shift_factor=INFINITE), "shift_factor"),
        (lambda: IdentityConfig(scaling_factor=NAN), "scaling_factor"),
        (lambda: IdentityConfig(latent_channels=0), "latent_channels"),
        (lambda: UNetConfig(norm_eps=-1.0), "norm_eps"),
        (lambda: UNetConfig(freq_shift=160), "freq_shift"),
        (lambda: UNetConfig(layers_per_block=10**9), "layers_per_block"),
    ],
)
def test_numbers_that_no_network_has_are_refused_at_construction(build: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        build()


# -- encoders ----------------------------------------------------------------------------------------------------------

SD, XL, VARIATION = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusionImageVariationPipeline"
NEUTRAL = {
    "attention_dropout": 0.5,
    "dropout": 0.5,
    "output_hidden_states": True,
    "output_attentions": True,
    "torch_dtype": "float16",
    "initializer_factor": 3.0,
    "initializer_range": 1.0,
    "bos_token_id": 77,
    "pad_token_id": 0,
    "is_decoder": True,
    "tie_word_embeddings": True,
    "architectures": ["X"],
    "_attn_implementation": "eager",
}
HONOURED: list[dict[str, Any]] = [
    {"hidden_act": "gelu", "layer_norm_eps": 1e-2, "num_attention_heads": 2},
    {"use_attention_mask": True},
    {"eos_token_id": 2},
    {"eos_token_id": 5},
    NEUTRAL,
]
REFUSED: list[tuple[str, Any, str]] = [
    ("hidden_act", "nope", "'nope'"),
    ("layer_norm_eps", NAN, "layer_norm_eps = nan"),
    ("num_attention_heads", 3, r"attention heads \(3\)"),
    ("num_hidden_layers", 1, "has unknown"),
    ("num_hidden_layers", 9, "lacks"),
    ("hidden_size", 128, "asks for"),
    ("intermediate_size", 4, "asks for"),
    ("quantization_config", {"load_in_8bit": True}, "quantization_config = {'load_in_8bit': True}"),
    ("transformers_weights", "x.safetensors", "transformers_weights = 'x.safetensors'"),
    ("attn_implementation", "flash_attention_2", "FlashAttention2"),
]
OF_TEXT: list[tuple[str, Any, str]] = [
    ("vocab_size", 50, r"token_embedding.weight is \(190, \d+\), its \w+ asks for \(50, \d+\)"),
    ("max_position_embeddings", 30, r"position_embedding.weight is \(77, \d+\), its \w+ asks for \(30, \d+\)"),
]
OF_IMAGES: list[tuple[str, Any, str]] = [
    ("image_size", 64, "asks for"),
    ("patch_size", 8, "asks for"),
    ("num_channels", 1, "asks for"),
    ("projection_dim", 12, "asks for"),
]
PARTS = [(SD, "text_encoder"), (XL, "text_encoder"), (XL, "text_encoder_2"), (VARIATION, "image_encoder")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("keys")
    for kind in (SD, XL, VARIATION):
        stock_pipeline(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in (SD, XL, VARIATION)}


def changed(folder: Path, part: str, to: Path, **values: Any) -> Path:
    """The same folder by links, but for one configuration."""
    for path in folder.rglob("*"):
        copy = to / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            copy.symlink_to(path)
    file = to / part
    before = json.loads(file.read_text())
    file.unlink()
    file.write_text(json.dumps(before | values))
    return to


@pytest.mark.parametrize("change", [pytest.param(change, id=", ".join(change)[:40]) for change in HONOURED])
@pytest.mark.parametrize(("kind", "part"), PARTS)
@torch.no_grad()
def test_a_key_of_an_encoder_is_honoured(
    kind: str, part: str, change: dict[str, Any], saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(saved[kind], f"{part}/config.json", tmp_path, **change)
    encoder, theirs = load_model(folder), getattr(diffusers, kind).from_pretrained(folder)
    if kind == VARIATION:
        pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        assert encoder.image_encoder is not None
        ours = encoder.image_encoder.encode(pixels[None]).context
        expected = theirs._encode_image(Image.fromarray(pixels.numpy()), "cpu", 1, False)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        return
    prompts = ["a red apple", "wow! " * 40]
    states = theirs.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    read = encoder.text_encoder.encode(prompts)
    torch.testing.assert_close(read.context, states[0], rtol=1e-5, atol=1e-5)
    if kind == XL:
        assert read.pooled is not None
        torch.testing.assert_close(read.pooled, states[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_a_key_of_an_encoder_is_refused(kind: str, part: str, saved: dict[str, Path], tmp_path: Path) -> None:
    for at, (key, value, message) in enumerate(REFUSED + (OF_IMAGES if kind == VARIATION else OF_TEXT)):
        heads = 5 if key == "num_attention_heads" else value  # divides none of the widths
        folder = changed(saved[kind], f"{part}/config.json", tmp_path / str(at), **{key: heads})
        with pytest.raises(LdmError, match=message.replace("3", "5") if heads != value else message) as caught:
            load_model(folder)
        assert part in str(caught.value)


PREPROCESSOR_VALUES: dict[str, list[Any]] = {
    **{key: [True, False, None] for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")},
    "size": [
        *(36, 0, 10**9, "x", {}, [40, 40], {"shortest_edge": 40}, {"shortest_edge": 20}),
        *({"height": 32, "width": 32}, {"height": 40, "width": 40}),
        *({"shortest_edge": 35, "longest_edge": 36}, {"max_height": 40, "max_width": 40}),
    ],
    "crop_size": [30, {"height": 30, "width": 28}, {"shortest_edge": 32}, [32, 32], {"height": "x", "width": 3}, 0],
    "resample": [3, 2, 0],
    "rescale_factor": [1 / 255, 1 / 127.5, 1, "x"],
    "image_mean": [[0.5, 0.5, 0.5], [0.5], 0.5, [NAN, 0, 0], "x"],
    "image_std": [[0.5, 0.5, 0.5], [0, 1, 1]],
    "do_convert_rgb": [False, True],
    "do_pad": [True, False],
    "pad_size": [{"height": 40, "width": 40}],
    "default_to_square": [True, False],
    "use_square_size": [True],
    "input_data_format": ["channels_first"],
    "image_processor_type": ["ViTImageProcessor"],
    "crop_pct": [0.5],
}


@pytest.mark.parametrize("change", changes(PREPROCESSOR_VALUES))
def test_a_key_of_preprocessing_is_honoured_or_refused(change: Change, tmp_path: Path) -> None:
    plain = transformers.CLIPImageProcessor(size={"shortest_edge": 35}, crop_size={"height": 32, "width": 32})
    plain.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    values = json.loads(path.read_text()) | dict([change])
    path.write_text(json.dumps(values))
    pixels = torch.randint(0, 256, (40, 52, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        ours = ImagePreprocessing.from_dict(values)(pixels[None])
    except ConfigError as error:
        assert change[0] in str(error)  # noqa: PT017
        return
    theirs = transformers.CLIPImageProcessor.from_pretrained(tmp_path)
    expected = theirs(images=Image.fromarray(pixels.numpy()), return_tensors="pt").pixel_values
    # Pillow rounds between the two axes, torchvision in the end: a level of 255, over a deviation.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1.1 / 255 / 0.26)


def test_wrong_folders_are_not_taken_for_these(saved: dict[str, Path], tmp_path: Path) -> None:
    for at, (part, entry, message) in enumerate(
        [
            ("unet", ["diffusers", "UNet2DModel"], "unet is a UNet2DModel: only UNet2DConditionModel"),
            ("vae", ["diffusers", "AutoencoderTiny"], "vae is a AutoencoderTiny: only AutoencoderKL"),
            ("vae", [None, None], r"vae = \[null, null\]"),
            ("unet", "UNet2DConditionModel", "unet = 'UNet2DConditionModel': must be a list"),
            (
                "text_encoder",
                ["transformers", "CLIPTextModelWithProjection"],
                "text_encoder is a CLIPTextModelWithProj.*only CLIPTextModel",
            ),
            ("tokenizer", ["transformers", "CLIPTextModel"], "tokenizer is a CLIPTextModel: transformers has no such"),
        ]
    ):
        folder = changed(saved[SD], "model_index.json", tmp_path / str(at), **{part: entry})
        with pytest.raises((FolderError, ConfigError), match=rf"model_index.json: {message}"):
            load_model(folder)
    for key in ("force_zeros_for_empty_prompt",):
        folder = changed(saved[XL], "model_index.json", tmp_path / key, **{key: "false"})
        with pytest.raises(ConfigError, match=rf"model_index.json: {key} = 'false': must be true or false"):
            load_model(folder)
