"""Every task's images on a GPU are the CPU's, of the same weights, seeds and noise; and what they are made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stock import stock_pipeline
from torch import Tensor

from ldm.ema import EmaHorizons, Power
from ldm.features import load_extractor
from ldm.generate import (
    LatentDiffusion,
    Sizes,
    image_to_image,
    image_variations,
    inpaint,
    text_to_image,
    upscale,
)
from ldm.guidance import Guidance
from ldm.interchange import load_model

TEXT, XL, REFINER = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"
INPAINT, UPSCALE = "StableDiffusionInpaintPipeline", "StableDiffusionUpscalePipeline"
VARIATIONS = "StableDiffusionImageVariationPipeline"
PROMPTS, SEEDS = ["a red apple", "two boats"], [1, 2]

Load = Callable[[str], LatentDiffusion]
"""A model of this kind, on the device that a task is to run on."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind of model, tiny and random."""
    root = tmp_path_factory.mktemp("models")
    for kind in (TEXT, XL, REFINER, INPAINT, UPSCALE, VARIATIONS):
        stock_pipeline(kind).save_pretrained(root / kind)
    return root


def pictures(side: int) -> Tensor:
    return torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def masks() -> Tensor:
    return torch.ones(2, 16, 16, dtype=torch.bool).triu()


TASKS: dict[str, Callable[[Load], Tensor]] = {
    **{
        sampler: lambda load, sampler=sampler: text_to_image(load(TEXT), PROMPTS, seeds=SEEDS, steps=6, sampler=sampler)
        for sampler in ("ddim", "plms", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
    },
    "guidance": lambda load: text_to_image(
        load(TEXT),
        PROMPTS,
        seeds=SEEDS,
        steps=6,
        negative_prompts=["blurred", "pale"],
        guidance=Guidance(5.0, rescale=0.7, interval=(0.2, 0.9)),
        threshold=(0.95, 1.5),
    ),
    "weak": lambda load: text_to_image(
        load(TEXT), PROMPTS, seeds=SEEDS, steps=4, guidance=Guidance(2.0, weak=load(TEXT).unet)
    ),
    "image to image": lambda load: image_to_image(
        load(TEXT), PROMPTS, pictures(16), strength=0.6, seeds=SEEDS, steps=6
    ),
    "inpainting": lambda load: inpaint(load(INPAINT), PROMPTS, pictures(16), masks(), seeds=SEEDS, steps=4),
    "inpainting by any": lambda load: inpaint(load(TEXT), PROMPTS, pictures(16), masks(), seeds=SEEDS, steps=4),
    "upscaling": lambda load: upscale(load(UPSCALE), PROMPTS, pictures(8), seeds=SEEDS, steps=4),
    "variations": lambda load: image_variations(load(VARIATIONS), pictures(32), seeds=SEEDS, steps=4),
    "xl and its refiner": lambda load: text_to_image(
        load(XL), PROMPTS, seeds=SEEDS, steps=8, sizes=Sizes(crop=(2, 4)), refiner=load(REFINER), refine_from=0.75
    ),
    "in batches and tiles": lambda load: text_to_image(
        load(TEXT), PROMPTS, seeds=SEEDS, steps=2, size=(32, 24), batch_size=1, max_pixels=16 * 16
    ),
}


def assert_alike(found: Tensor, expected: Tensor) -> None:
    """Equal to a level of 255, but for a value in a thousand: all that orders of sums make of rounding."""
    assert found.device.type == "cpu"
    difference = (found.int() - expected.int()).abs()
    assert float((difference <= 1).float().mean()) >= 0.999
    assert float(expected.float().std()) > 1


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_images_are_the_cpus(device: str, folders: Path, task: Callable[[Load], Tensor]) -> None:
    expected = task(lambda kind: load_model(folders / kind))
    assert_alike(task(lambda kind: load_model(folders / kind).to(device)), expected)


def test_images_of_a_model_made_ready_for_inference_are_the_cpus(device: str, folders: Path) -> None:
    expected, found = (
        text_to_image(model, PROMPTS, seeds=SEEDS, steps=6)
        for model in (load_model(folders / TEXT), load_model(folders / TEXT).to(device).for_inference())
    )
    assert_alike(found, expected)


@pytest.mark.parametrize("kind", [TEXT, XL])
def test_images_in_bf16_are_near(device: str, folders: Path, kind: str) -> None:
    whole = text_to_image(load_model(folders / kind), PROMPTS, seeds=SEEDS, steps=6)
    half = text_to_image(load_model(folders / kind, torch.bfloat16).to(device), PROMPTS, seeds=SEEDS, steps=6)
    difference = (half.int() - whole.int()).abs().float()
    # Seen on a CPU: 0.3 levels of 255, of images that vary by 42.
    assert float(difference.mean()) < 4


def test_predictions_and_gradients_of_the_unet_are_the_cpus(device: str, folders: Path) -> None:
    unet = load_model(folders / TEXT).unet
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10.0, 900.0]), torch.randn(2, 5, 64)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    moved = copy.deepcopy(unet).to(device)
    expected = unet(*inputs, mask)
    found = moved(*(part.to(device) for part in (*inputs, mask)))
    assert found.device.type == device
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    for output in (expected, found):
        output.square().mean().backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in unet.parameters() if parameter.grad is not None)
    gradients = dict(moved.named_parameters())
    for name, parameter in unet.named_parameters():
        gradient = gradients[name].grad
        assert gradient is not None
        torch.testing.assert_close(gradient.cpu(), parameter.grad, rtol=1e-4, atol=1e-4 * largest, msg=name)


def test_moving_averages_are_the_cpus(device: str) -> None:
    """Kept where the parameters are, in float32 whatever theirs."""
    averages = []
    for place in ("cpu", device):
        layer = torch.nn.Linear(8, 8, dtype=torch.bfloat16, device=place)
        ema = EmaHorizons(layer.named_parameters(), {"long": Power(0.1)})
        for step in range(10):
            with torch.no_grad():
                layer.weight.copy_(torch.randn(8, 8, generator=torch.Generator().manual_seed(step)))
            ema.update(layer.named_parameters())
        average = ema.horizons["long"].averages["weight"]
        assert (average.device.type, average.dtype) == (place, torch.float32)
        ema.copy_to(layer, "long")
        torch.testing.assert_close(layer.weight, average.bfloat16())
        averages.append(average.cpu())
    torch.testing.assert_close(averages[1], averages[0], rtol=1e-6, atol=1e-6)


def test_features_of_images_are_the_cpus(device: str) -> None:
    images = pictures(64)
    expected = load_extractor("efficientnet_lite0")(images)
    torch.testing.assert_close(load_extractor("efficientnet_lite0", device)(images), expected, rtol=1e-3, atol=1e-3)
