"""Model folders of every kind of stock pipeline: theirs read here, and ours read there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from stock import KINDS, POOLED, stock_pipeline

from ldm.autoencoder import IdentityAutoencoder, IdentityConfig
from ldm.conditioning import Conditioning
from ldm.conditioning.clip_text import ClipLayer, PairedTextEncoder
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.errors import ConfigError, FolderError, InputError
from ldm.generate import LatentDiffusion, Sizes, text_to_image
from ldm.guidance import predict
from ldm.interchange import load_model, model_hash, pipeline_of, save_model, save_single_file
from ldm.interchange.files import read_safetensors
from ldm.latents import unscale_latents

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning",
    "ignore:.*local_dir_use_symlinks:UserWarning",
)

PROMPTS = ["a red apple", "flag of France"]
STABLE_DIFFUSION, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
REFINER = "StableDiffusionXLImg2ImgPipeline"


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    """Each kind's pipeline, made once."""
    return {kind: stock_pipeline(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folders(theirs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each kind's folder as diffusers writes it."""
    root = tmp_path_factory.mktemp("stock")
    for kind, pipeline in theirs.items():
        pipeline.save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stock_images(pipeline: Any, kind: str) -> np.ndarray[Any, Any]:
    """What the stock pipeline makes of fixed noise, [B, H, W, 3] in [0, 1]."""
    image = Image.fromarray((noise(16, 16, 3, seed=5).sigmoid() * 255).byte().numpy())
    arguments: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}
    if kind == "StableDiffusionImageVariationPipeline":
        return pipeline(image, height=16, width=16, latents=noise(1, 4, 8, 8), **arguments).images
    arguments |= {"prompt": PROMPTS[0], "generator": torch.Generator().manual_seed(0)}
    if kind == REFINER:
        return pipeline(image=image, strength=0.9, **arguments).images
    if "Inpaint" in kind:
        mask = Image.fromarray(np.eye(16, dtype=np.uint8) * 255)
        return pipeline(image=image, mask_image=mask, height=16, width=16, strength=1.0, **arguments).images
    if kind == "StableDiffusionUpscalePipeline":
        return pipeline(image=image, noise_level=20, **arguments).images
    return pipeline(height=16, width=16, latents=noise(1, 4, 8, 8), **arguments).images


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_saved_here_is_the_stock_pipelines(
    kind: str, theirs: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model(folders[kind])
    assert pipeline_of(model) == kind
    save_model(model, tmp_path / "ours")
    again = getattr(diffusers, kind).from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(stock_images(again, kind), stock_images(theirs[kind], kind), atol=1e-5)
    settings = ("requires_aesthetics_score", "force_zeros_for_empty_prompt", "max_noise_level")
    for name in settings:
        assert again.config.get(name) == theirs[kind].config.get(name)
    save_model(load_model(tmp_path / "ours"), tmp_path / "again")
    assert model_hash(tmp_path / "again") == model_hash(tmp_path / "ours")


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_folder_has_the_same_networks_here(kind: str, theirs: dict[str, Any], folders: dict[str, Path]) -> None:
    stock, model = theirs[kind], load_model(folders[kind])
    config = model.unet.config
    latents, times = noise(2, config.in_channels, 8, 8), torch.tensor([10, 900])
    conditioning = Conditioning(
        noise(2, 5, config.cross_attention_dim, seed=1),
        pooled=noise(2, POOLED, seed=2) if config.takes_pooled else None,
        sizes=torch.arange(10.0).view(2, 5)
        if kind == REFINER
        else torch.arange(12.0).view(2, 6)
        if config.takes_pooled
        else None,
        noise_level=torch.tensor([3, 250]) if config.num_class_embeds else None,
    )
    with torch.no_grad():
        added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.sizes}
        expected = stock.unet(
            latents, times, conditioning.context, class_labels=conditioning.noise_level, added_cond_kwargs=added
        ).sample
        torch.testing.assert_close(predict(model.unet, latents, times, conditioning), expected, rtol=1e-5, atol=1e-5)
        pixels = noise(2, 3, 16, 16)
        moments = stock.vae.encode(pixels).latent_dist.parameters
        torch.testing.assert_close(model.autoencoder.encode(pixels), moments, rtol=1e-5, atol=1e-5)
        decoded = stock.vae.decode(noise(2, 4, 8, 8) / stock.vae.config.scaling_factor).sample
        ours = model.autoencoder.decode(unscale_latents(noise(2, 4, 8, 8), model.autoencoder.config))
        torch.testing.assert_close(ours, decoded, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.diffusion.alphas_cumprod, stock.scheduler.alphas_cumprod)
    if kind == "StableDiffusionUpscalePipeline":
        assert model.low_res_diffusion is not None
        torch.testing.assert_close(model.low_res_diffusion.alphas_cumprod, stock.low_res_scheduler.alphas_cumprod)
        assert model.max_noise_level == 250


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "Variation" not in kind])
def test_a_stock_folder_has_the_same_text_states_here(
    kind: str, theirs: dict[str, Any], folders: dict[str, Path]
) -> None:
    encoder = load_model(folders[kind]).text_encoder
    prompts = [*PROMPTS, "wow! " * 40]
    with torch.no_grad():
        states = theirs[kind].encode_prompt(
            prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    ours, empty = encoder.encode(prompts), encoder.null(3)
    torch.testing.assert_close(ours.context, states[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(empty.context, states[1], rtol=1e-5, atol=1e-5)
    if "XL" in kind:
        assert ours.pooled is not None
        assert empty.pooled is not None
        torch.testing.assert_close(ours.pooled, states[2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(empty.pooled, states[3], rtol=1e-5, atol=1e-5)


def test_image_variations_read_the_same_image_states(theirs: dict[str, Any], folders: dict[str, Path]) -> None:
    kind = "StableDiffusionImageVariationPipeline"
    model = load_model(folders[kind])
    image = (noise(40, 48, 3).sigmoid() * 255).byte()
    with torch.no_grad():
        both = theirs[kind]._encode_image(Image.fromarray(image.numpy()), "cpu", 1, True)
    assert model.image_encoder is not None
    torch.testing.assert_close(model.image_encoder.null(1).context, both[:1])
    # Resizing in PIL rounds otherwise than here, by a level.
    torch.testing.assert_close(model.image_encoder.encode(image[None]).context, both[1:], rtol=1e-2, atol=1e-2)
    with pytest.raises(InputError, match="reads images and no text"):
        text_to_image(model, ["a red apple"], seeds=[1])


def test_images_of_stable_diffusion_are_the_stock_pipelines(theirs: dict[str, Any], folders: dict[str, Path]) -> None:
    start = noise(2, 4, 8, 8)
    for scale in (1.0, 5.0):
        expected = theirs[STABLE_DIFFUSION](
            PROMPTS, latents=start, num_inference_steps=6, guidance_scale=scale, output_type="np", height=16, width=16
        ).images
        ours = text_to_image(load_model(folders[STABLE_DIFFUSION]), PROMPTS, noise=start, steps=6, guidance_scale=scale)
        assert_same_images(ours, expected)


def test_images_of_xl_are_the_stock_pipelines(theirs: dict[str, Any], folders: dict[str, Path]) -> None:
    start, model = noise(2, 4, 8, 8), load_model(folders[XL])
    expected = theirs[XL](
        PROMPTS,
        latents=start,
        num_inference_steps=6,
        guidance_scale=5.0,
        output_type="np",
        height=16,
        width=16,
        crops_coords_top_left=(2, 4),
    ).images
    sizes = Sizes(crop=(2, 4))
    ours = text_to_image(model, PROMPTS, noise=start, steps=6, guidance_scale=5.0, sizes=sizes)
    assert_same_images(ours, expected)


def assert_same_images(ours: torch.Tensor, theirs: np.ndarray[Any, Any]) -> None:
    difference = (torch.from_numpy((theirs * 255).round()).int() - ours.int()).abs()
    assert float((difference <= 1).float().mean()) >= 0.999
    assert float(ours.float().std()) > 1


# -- what folders have in other forms ----------------------------------------------------------------------------------


def weights_of(model: LatentDiffusion) -> dict[str, torch.Tensor]:
    assert hasattr(model.text_encoder, "network")
    parts = {"unet": model.unet, "vae": model.autoencoder, "text": model.text_encoder.network}
    return {f"{part}.{name}": value for part, network in parts.items() for name, value in network.state_dict().items()}


def assert_same_weights(ours: LatentDiffusion, theirs: LatentDiffusion) -> None:
    mine, others = weights_of(ours), weights_of(theirs)
    assert mine.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in mine.items())


def test_shards_are_put_together(theirs: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    theirs[STABLE_DIFFUSION].save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 2
    assert_same_weights(load_model(tmp_path), load_model(folders[STABLE_DIFFUSION]))
    shard = next((tmp_path / "unet").glob("*-00002-of-*"))
    shard.unlink()
    with pytest.raises(FolderError, match=rf"{shard.name} is absent"):
        load_model(tmp_path)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}}))
    with pytest.raises(FolderError, match="is not a file beside it"):
        load_model(tmp_path)


@pytest.mark.parametrize("max_shard_size", ["10GB", "100KB"])
def test_variants_are_read_in_the_dtype_asked_for(max_shard_size: str, tmp_path: Path) -> None:
    stock_pipeline(STABLE_DIFFUSION).to(torch.float16).save_pretrained(
        tmp_path, variant="fp16", max_shard_size=max_shard_size
    )
    with pytest.raises(FolderError, match=r"fp16.*is there: give its variant"):
        load_model(tmp_path)
    half = load_model(tmp_path, torch.float16, variant="fp16")
    assert {value.dtype for value in weights_of(half).values()} == {torch.float16}
    single = load_model(tmp_path, variant="fp16")
    assert {value.dtype for value in weights_of(single).values()} == {torch.float32}
    torch.testing.assert_close(single.unet.conv_in.weight, half.unet.conv_in.weight.float(), rtol=0, atol=0)


def test_autoencoder_of_xl_stays_in_float32(folders: dict[str, Path]) -> None:
    model = load_model(folders[XL], torch.float16)
    assert model.unet.conv_in.weight.dtype == torch.float16
    assert model.autoencoder.decoder.conv_in.weight.dtype == torch.float32
    assert load_model(folders[XL], torch.bfloat16).autoencoder.decoder.conv_in.weight.dtype == torch.bfloat16


def test_pickles_are_read_only_when_asked_for(theirs: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    theirs[STABLE_DIFFUSION].save_pretrained(tmp_path, safe_serialization=False)
    for path in tmp_path.rglob("*.safetensors"):  # transformers writes no other
        torch.save(read_safetensors(path), path.with_name("pytorch_model.bin"))
        path.unlink()
    with pytest.raises(FolderError, match=r"diffusion_pytorch_model.bin is a pickle, and refused: allow_pickle=True"):
        load_model(tmp_path)
    assert_same_weights(load_model(tmp_path, allow_pickle=True), load_model(folders[STABLE_DIFFUSION]))
    torch.save({"conv_in.weight": Path("harm")}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(FolderError, match=r"diffusion_pytorch_model.bin is corrupt, or holds more than tensors"):
        load_model(tmp_path, allow_pickle=True)


def test_old_names_and_old_configurations_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(folders[STABLE_DIFFUSION])
    save_model(model, tmp_path)
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = read_safetensors(path)
    for today, before in old.items():
        weights = {name.replace(today, before): value.clone() for name, value in weights.items()}
    save_file(weights, path)
    for part, kept in (("vae", ("down_block_types",)), ("unet", ("up_block_types",))):
        file = tmp_path / part / "config.json"
        values = json.loads(file.read_text())
        absent = ("scaling_factor", "use_quant_conv", "upcast_attention", "num_class_embeds", "use_linear_projection")
        file.write_text(json.dumps({key: value for key, value in values.items() if key not in absent or key in kept}))
    again = load_model(tmp_path)
    assert_same_weights(again, model)
    assert again.autoencoder.config.scaling_factor == 0.18215
    assert diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").config.scaling_factor == 0.18215


@pytest.mark.parametrize("kind", [STABLE_DIFFUSION, XL])
def test_a_model_made_ready_for_inference_is_saved_as_it_was(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    save_model(load_model(folders[kind]), tmp_path / "before")
    save_model(load_model(folders[kind]).for_inference(), tmp_path / "after")
    assert model_hash(tmp_path / "after") == model_hash(tmp_path / "before")
    for name in ("before", "after"):
        model = load_model(folders[kind])
        save_single_file(model if name == "before" else model.for_inference(), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "after.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()


def test_a_key_that_is_absent_is_what_diffusers_takes_it_for(folders: dict[str, Path], tmp_path: Path) -> None:
    save_model(load_model(folders[STABLE_DIFFUSION]), tmp_path)
    file = tmp_path / "unet" / "config.json"
    values = json.loads(file.read_text())
    del values["cross_attention_dim"]
    file.write_text(json.dumps(values))
    with pytest.raises(FolderError, match=r"its config.json asks for \(32, 1280\)"):
        load_model(tmp_path)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (XL, "text_encoder_2/model.safetensors"),
        (XL, "text_encoder/config.json"),
        ("StableDiffusionUpscalePipeline", "low_res_scheduler/scheduler_config.json"),
        ("StableDiffusionImageVariationPipeline", "image_encoder/model.safetensors"),
        ("StableDiffusionImageVariationPipeline", "feature_extractor/preprocessor_config.json"),
    ],
)
def test_absent_and_corrupt_files_of_components_are_named(
    kind: str, path: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    save_model(load_model(folders[kind]), tmp_path)
    file = tmp_path / path
    before = model_hash(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    assert model_hash(tmp_path) != before
    with pytest.raises(FolderError, match=path):
        load_model(tmp_path)
    file.unlink()
    with pytest.raises(FolderError, match=f"{path} is absent"):
        load_model(tmp_path)


def test_text_weights_must_fit_their_configuration(folders: dict[str, Path], tmp_path: Path) -> None:
    save_model(load_model(folders[STABLE_DIFFUSION]), tmp_path)
    file = tmp_path / "text_encoder" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"num_hidden_layers": 3}))
    with pytest.raises(FolderError, match=r"text_encoder/model.safetensors lacks \d+ weights"):
        load_model(tmp_path)
    file.write_text(json.dumps(values | {"num_hidden_layers": 1}))
    with pytest.raises(FolderError, match=r"text_encoder/model.safetensors has unknown \d+ weights"):
        load_model(tmp_path)
    file.write_text(json.dumps(values | {"hidden_size": 32}))
    with pytest.raises(
        FolderError, match=r"position_embedding.weight is .77, 64., its CLIPTextModel asks for .77, 32."
    ):
        load_model(tmp_path)


def test_what_the_stock_pipeline_would_do_otherwise_is_not_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(folders[STABLE_DIFFUSION])
    assert hasattr(model.text_encoder, "layer")
    model.text_encoder.layer = ClipLayer(skipped=1)
    with pytest.raises(FolderError, match="the stock pipeline"):
        save_model(model, tmp_path)
    model.text_encoder.layer = ClipLayer()
    assert hasattr(model.text_encoder, "long_prompts")
    model.text_encoder.long_prompts = "chunks"
    with pytest.raises(FolderError, match="long_prompts = 'chunks'"):
        save_model(model, tmp_path)
    upscaler = load_model(folders["StableDiffusionUpscalePipeline"])
    upscaler.low_res_diffusion = Diffusion(DiffusionConfig("flow"))
    with pytest.raises(FolderError, match="low_res_diffusion is 'flow'"):
        save_model(upscaler, tmp_path)
    pixels = IdentityAutoencoder(IdentityConfig(latent_channels=4))
    with pytest.raises(FolderError, match="a model of pixels has no stock pipeline"):
        save_model(dataclasses.replace(load_model(folders[STABLE_DIFFUSION]), autoencoder=pixels), tmp_path)
    xl = load_model(folders[XL])
    assert isinstance(xl.text_encoder, PairedTextEncoder)
    xl.text_encoder.first, xl.text_encoder.second = xl.text_encoder.second, xl.text_encoder.first
    with pytest.raises(FolderError, match="the stock pipeline"):
        save_model(xl, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_refiner_with_zeros_for_the_empty_prompt_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    save_model(load_model(folders[REFINER]), tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"force_zeros_for_empty_prompt": True}))
    with pytest.raises(ConfigError, match=r"model_index.json: force_zeros_for_empty_prompt = true"):
        load_model(tmp_path)
