"""Every task beside the stock pipeline that does the same, with the same weights and noise; and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from stock import stock_pipeline

from ldm.autoencoder import IdentityAutoencoder, IdentityConfig
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.errors import ConfigError, GenerationError, InputError
from ldm.generate import (
    LatentDiffusion,
    Sizes,
    cascade,
    conditions_to_image,
    image_to_image,
    image_variations,
    inpaint,
    text_to_image,
    upscale,
)
from ldm.guidance import Guidance
from ldm.interchange import load_model
from ldm.sampling import seeded_noise
from ldm.unet import UNet2DCondition

PROMPTS = ["a red apple", "two boats"]
STEPS = 8
SIZE = {"height": 16, "width": 16}


def random_images(count: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, side, side, 3), generator=random, dtype=torch.uint8)


def without_draw(pipeline: Any) -> Any:
    """The pipeline with a posterior so narrow that drawing from it is its mean."""
    with torch.no_grad():
        latent = pipeline.vae.config.latent_channels
        pipeline.vae.quant_conv.weight[latent:] = 0
        pipeline.vae.quant_conv.bias[latent:] = -60
    return pipeline


def ours_of(pipeline: Any, folder: Path) -> LatentDiffusion:
    pipeline.save_pretrained(folder)
    return load_model(folder)


def unit(images: torch.Tensor) -> torch.Tensor:
    """As the stock pipelines take them: [N, 3, H, W] in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


def assert_alike(ours: torch.Tensor, theirs: Any) -> None:
    """Equal to a level of 255, but for a pixel in a thousand."""
    difference = (torch.from_numpy((theirs * 255).round()).int() - ours.int()).abs()
    assert float((difference <= 1).float().mean()) >= 0.999
    assert float(ours.float().std()) > 1


@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_image_to_image(strength: float, tmp_path: Path) -> None:
    text = without_draw(stock_pipeline("StableDiffusionPipeline"))
    model = ours_of(text, tmp_path)
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**text.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    images = random_images(2)
    theirs = pipeline(
        PROMPTS,
        image=unit(images),
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="np",
    ).images
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    draws = [[torch.randn(4, 8, 8, generator=generator) for _ in range(2)] for generator in generators]
    noise = torch.stack([second for _, second in draws])  # the first is the draw from the posterior
    ours = image_to_image(model, PROMPTS, images, strength=strength, noise=noise, steps=STEPS, guidance_scale=4)
    assert_alike(ours, theirs)


def test_strength_says_how_much_of_the_image_is_left(model: LatentDiffusion) -> None:
    images = random_images(1, 32)
    made = [
        image_to_image(model, ["a dog"], images, strength=strength, seeds=[1], steps=20) for strength in (0.05, 0.4, 1)
    ]
    away = [float((each.float() - made[0].float()).abs().mean()) for each in made]
    assert 0 == away[0] < away[1] < away[2]


@pytest.mark.parametrize("kind", ["StableDiffusionInpaintPipeline", "StableDiffusionPipeline"])
def test_inpainting_with_a_network_for_it_and_with_any(kind: str, tmp_path: Path) -> None:
    stock = without_draw(stock_pipeline(kind))
    model = ours_of(stock, tmp_path)
    pipeline = diffusers.StableDiffusionInpaintPipeline(**stock.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    images, noise = random_images(2), seeded_noise([1, 2], (4, 8, 8))
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, 4:12, 2:10] = True
    masks[1, :, 8:] = True
    theirs = pipeline(
        PROMPTS,
        image=unit(images),
        mask_image=masks[:, None].float(),
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="np",
        **SIZE,
    ).images
    assert_alike(inpaint(model, PROMPTS, images, masks, noise=noise, steps=STEPS, guidance_scale=4), theirs)


def test_what_is_not_masked_stays(model: LatentDiffusion) -> None:
    """To the bit where latents are pixels; the U-Net is the tests' with three channels."""
    torch.manual_seed(0)
    config = dataclasses.replace(model.unet.config, in_channels=3, out_channels=3)
    pixels = LatentDiffusion(
        UNet2DCondition(config).eval(), IdentityAutoencoder(IdentityConfig()), model.text_encoder, model.diffusion
    )
    images = random_images(1, 16)
    masks = torch.zeros(1, 16, 16, dtype=torch.bool)
    masks[:, :, 8:] = True
    made = inpaint(pixels, ["a dog"], images, masks, seeds=[1], steps=4)
    assert torch.equal(made[:, :, :8], images[:, :, :8])
    assert not torch.equal(made[:, :, 8:], images[:, :, 8:])


def test_upscaling(tmp_path: Path) -> None:
    pipeline = stock_pipeline("StableDiffusionUpscalePipeline")
    model = ours_of(pipeline, tmp_path)
    images, noise = random_images(2, 8), seeded_noise([1, 2], (4, 8, 8))
    theirs = pipeline(
        PROMPTS,
        image=unit(images),
        latents=noise,
        noise_level=100,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="np",
    ).images
    ours = upscale(
        model,
        PROMPTS,
        images,
        noise_level=100,
        noise=noise,
        low_res_noise=seeded_noise([5, 6], (3, 8, 8)),
        steps=STEPS,
        guidance_scale=4,
    )
    assert ours.shape == (2, 16, 16, 3)
    assert_alike(ours, theirs)
    seeded = [upscale(model, PROMPTS, images, seeds=[1, 2], steps=2, batch_size=size).int() for size in (1, 2)]
    assert int((seeded[0] - seeded[1]).abs().max()) <= 1


def test_image_variations(tmp_path: Path) -> None:
    pipeline = stock_pipeline("StableDiffusionImageVariationPipeline")
    model = ours_of(pipeline, tmp_path)
    images, noise = random_images(2, 32), seeded_noise([1, 2], (4, 8, 8))
    theirs = pipeline(
        pipeline.feature_extractor(images=list(images.numpy()), return_tensors="pt").pixel_values,
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        output_type="np",
        **SIZE,
    ).images
    assert_alike(image_variations(model, images, noise=noise, steps=STEPS, guidance_scale=4), theirs)


def test_a_refiner_takes_over(tmp_path: Path) -> None:
    base, refiner = stock_pipeline("StableDiffusionXLPipeline"), stock_pipeline("StableDiffusionXLImg2ImgPipeline")
    models = [ours_of(pipeline, tmp_path / str(index)) for index, pipeline in enumerate((base, refiner))]
    noise = seeded_noise([1, 2], (4, 8, 8))
    common = {"num_inference_steps": STEPS, "guidance_scale": 4.0}
    latents = base(PROMPTS, latents=noise, denoising_end=0.75, output_type="latent", **common, **SIZE).images
    # It takes size for that of the latents' image only in pixels.
    theirs = refiner(
        PROMPTS,
        image=latents,
        denoising_start=0.75,
        output_type="np",
        **common,
        original_size=(16, 16),
        target_size=(16, 16),
    ).images
    ours = text_to_image(
        models[0], PROMPTS, noise=noise, refiner=models[1], refine_from=0.75, steps=STEPS, guidance_scale=4
    )
    assert_alike(ours, theirs)


def test_sizes_reach_the_network(tmp_path: Path) -> None:
    pipeline = stock_pipeline("StableDiffusionXLPipeline")
    model = ours_of(pipeline, tmp_path)
    noise = seeded_noise([1, 2], (4, 8, 8))
    theirs = pipeline(
        PROMPTS,
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        original_size=(64, 48),
        crops_coords_top_left=(3, 5),
        target_size=(16, 16),
        output_type="np",
        **SIZE,
    ).images
    sizes = Sizes(original=(64, 48), crop=(3, 5))
    ours = text_to_image(model, PROMPTS, noise=noise, steps=STEPS, guidance_scale=4, sizes=sizes)
    assert_alike(ours, theirs)
    assert not torch.equal(ours, text_to_image(model, PROMPTS, noise=noise, steps=STEPS, guidance_scale=4))


def test_negative_prompts_and_rescaled_guidance(tmp_path: Path) -> None:
    pipeline = stock_pipeline("StableDiffusionPipeline")
    model = ours_of(pipeline, tmp_path)
    noise = seeded_noise([1, 2], (4, 8, 8))
    negative = ["blurred", "three boats"]
    theirs = pipeline(
        PROMPTS,
        negative_prompt=negative,
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=7.0,
        guidance_rescale=0.7,
        output_type="np",
        **SIZE,
    ).images
    ours = text_to_image(
        model, PROMPTS, negative_prompts=negative, noise=noise, steps=STEPS, guidance=Guidance(7, rescale=0.7)
    )
    assert_alike(ours, theirs)


def test_a_cascade_makes_the_first_ones_pictures_larger(tmp_path: Path) -> None:
    base = ours_of(stock_pipeline("StableDiffusionPipeline"), tmp_path / "base")
    larger = ours_of(stock_pipeline("StableDiffusionUpscalePipeline"), tmp_path / "larger")
    calls: list[tuple[int, int]] = []
    images = cascade(
        [base, larger, larger], PROMPTS, seeds=[1, 2], steps=2, progress=lambda *counts: calls.append(counts)
    )
    assert images.shape == (2, 64, 64, 3)
    assert calls == [(done, 6) for done in range(1, 7)]
    first = text_to_image(base, PROMPTS, seeds=[1, 2], steps=2)
    second = upscale(larger, PROMPTS, first, seeds=[1, 2], steps=2)
    assert torch.equal(images, upscale(larger, PROMPTS, second, seeds=[1, 2], steps=2))


def test_memory_of_decoding_is_bounded(model: LatentDiffusion) -> None:
    decoded: list[int] = []
    model.autoencoder.decoder.register_forward_hook(
        lambda _, __, pixels: decoded.append(len(pixels) * pixels.shape[-2] * pixels.shape[-1])
    )
    for size, count in (((64, 64), 1), ((16, 16), 9)):
        images = text_to_image(model, ["a dog"] * count, seeds=range(count), steps=1, size=size, max_pixels=32 * 32)
        assert images.shape == (count, *size, 3)
    assert max(decoded) == 32 * 32
    assert len(decoded) >= 4 + 3


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (lambda m: image_to_image(m, PROMPTS, random_images(3, 32), seeds=[1, 2]), InputError, "3 images for 2"),
        (lambda m: image_to_image(m, PROMPTS, random_images(2, 30), seeds=[1, 2]), InputError, "multiples of 4"),
        (lambda m: image_to_image(m, PROMPTS, torch.zeros(2, 32, 32, 3), seeds=[1, 2]), InputError, "must be uint8"),
        (lambda m: image_to_image(m, ["a"], random_images(1, 32), seeds=[1], strength=1.5), ConfigError, "strength"),
        (lambda m: inpaint(m, ["a"], random_images(1, 32), torch.zeros(1, 32, 32), seeds=[1]), InputError, "be bool"),
        (
            lambda m: inpaint(m, ["a"], random_images(1, 32), torch.zeros(1, 16, 32, dtype=torch.bool), seeds=[1]),
            InputError,
            "masks are",
        ),
        (lambda m: image_variations(m, random_images(1), seeds=[1]), ConfigError, "no image encoder"),
        (lambda m: upscale(m, ["a"], random_images(1), seeds=[1]), ConfigError, "no upscaler"),
        (lambda m: cascade([], ["a"], seeds=[1]), ConfigError, "no models"),
        (lambda m: text_to_image(m, ["a"], seeds=[1], refiner=m, refine_from=1.5), ConfigError, "1.5"),
        (lambda m: text_to_image(m, ["a"], seeds=[1], max_pixels=10), InputError, "max_pixels = 10"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(model: LatentDiffusion, task: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        task(model)


def test_conditions_of_any_encoder_and_a_scale_for_each(model: LatentDiffusion) -> None:
    """A prompt's condition gives the prompt's picture; two scales of one condition add up."""
    encoded, empty = model.text_encoder.encode(PROMPTS), model.text_encoder.null(1)
    common = {"seeds": [1, 2], "steps": 3}
    expected = text_to_image(model, PROMPTS, guidance_scale=3.0, **common)
    alike = conditions_to_image(model, encoded, empty, guidance_scale=3.0, **common)
    # Two ways to one picture: a level of 255 in rounding.
    assert int((alike.int() - expected.int()).abs().max()) <= 1
    both = conditions_to_image(model, [encoded, encoded], empty, guidance=Guidance((2.0, 1.0)), **common)
    assert int((both.int() - expected.int()).abs().max()) <= 1
    with pytest.raises(InputError, match=r"conditions of \[2, 1\] rows"):
        conditions_to_image(model, [encoded, encoded[:1]], empty, guidance=Guidance((2.0, 1.0)), **common)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"diffusion": Diffusion(DiffusionConfig(prediction="eps"))}, "kind flow .refiner discrete."),
        ({"diffusion": Diffusion(DiffusionConfig(prediction="flow", flow_shift=3.0))}, r"flow_shift 1.0 .refiner 3.0."),
    ],
)
def test_a_refiner_of_another_process_is_refused(model: LatentDiffusion, change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        text_to_image(model, ["a"], seeds=[1], refiner=dataclasses.replace(model, **change))


def test_pixels_that_are_not_numbers_are_an_error(model: LatentDiffusion) -> None:
    with torch.no_grad():
        model.autoencoder.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(GenerationError, match="pixels that are not numbers"):
        text_to_image(model, ["a"], seeds=[1], steps=1)


def test_a_string_is_no_list_of_prompts(model: LatentDiffusion) -> None:
    with pytest.raises(InputError, match="must be a list"):
        text_to_image(model, "ab", seeds=[1, 2], steps=1)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "unipc"])
def test_kept_latents_end_without_noise(model: LatentDiffusion, sampler: str) -> None:
    model.diffusion = Diffusion(DiffusionConfig(prediction="eps"))
    images = random_images(1, 32)
    masks = torch.zeros(1, 32, 32, dtype=torch.bool)
    kept = inpaint(model, ["a dog"], images, masks, seeds=[1], steps=4, sampler=sampler)
    again = inpaint(model, ["a dog"], images, masks, seeds=[2], steps=4, sampler=sampler)
    assert int((kept.int() - again.int()).abs().max()) <= 1
