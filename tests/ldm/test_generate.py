from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.errors import ConfigError, GenerationError, InputError
from ldm.generate import LatentDiffusion, text_to_image
from ldm.guidance import Guidance
from ldm.samplers import SAMPLERS
from ldm.sampling import seeded_noise

PROMPTS = ["a red apple", "grinning face", "flag of France"]


def test_images_have_the_models_own_size(model: LatentDiffusion) -> None:
    images = text_to_image(model, PROMPTS, seeds=[1, 2, 3], steps=2)
    assert images.shape == (3, 32, 32, 3)
    assert images.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in images}) == 3


def test_sizes_may_be_chosen(model: LatentDiffusion) -> None:
    assert text_to_image(model, PROMPTS[:1], seeds=[1], steps=1, size=(16, 40)).shape == (1, 16, 40, 3)


def test_an_image_does_not_depend_on_its_batch(model: LatentDiffusion) -> None:
    whole = text_to_image(model, PROMPTS, seeds=[1, 2, 3], steps=4)
    parts = text_to_image(model, PROMPTS, seeds=[1, 2, 3], steps=4, batch_size=2)
    alone = text_to_image(model, PROMPTS[2:], seeds=[3], steps=4)
    for images in (parts, torch.cat([whole[:2], alone])):
        assert int((images.int() - whole.int()).abs().max()) <= 1


def test_seed_decides_and_noise_takes_its_place(model: LatentDiffusion) -> None:
    first = text_to_image(model, PROMPTS[:1], seeds=[5], steps=2)
    assert torch.equal(first, text_to_image(model, PROMPTS[:1], seeds=[5], steps=2))
    assert torch.equal(first, text_to_image(model, PROMPTS[:1], noise=seeded_noise([5], (4, 8, 8)), steps=2))
    assert not torch.equal(first, text_to_image(model, PROMPTS[:1], seeds=[6], steps=2))


def test_prompt_and_guidance_matter(model: LatentDiffusion) -> None:
    noise = seeded_noise([5], (4, 8, 8))
    first = text_to_image(model, PROMPTS[:1], noise=noise, steps=4, guidance_scale=3)
    assert not torch.equal(first, text_to_image(model, PROMPTS[1:2], noise=noise, steps=4, guidance_scale=3))
    assert not torch.equal(first, text_to_image(model, PROMPTS[:1], noise=noise, steps=4, guidance_scale=1))


@pytest.mark.parametrize(
    ("sampler", "prediction"),
    [
        (sampler, prediction)
        for sampler in SAMPLERS
        for prediction in ("eps", "v", "x0", "flow", "edm")
        if not (sampler.startswith("flow_") and prediction != "flow") and (sampler, prediction) != ("plms", "flow")
    ],
)
def test_samplers_take_predictions_of_their_process(model: LatentDiffusion, sampler: str, prediction: Any) -> None:
    model.diffusion = Diffusion(DiffusionConfig(prediction))
    if sampler in ("plms", "flow_euler", "flow_heun") and (prediction == "flow") != sampler.startswith("flow"):
        with pytest.raises(ConfigError, match=sampler):
            text_to_image(model, PROMPTS[:1], seeds=[1], sampler=sampler, steps=3)
        return
    images = text_to_image(model, PROMPTS[:1], seeds=[1], sampler=sampler, steps=3)
    assert float(images.float().std()) > 0


def test_progress_counts_calls_over_all_batches(model: LatentDiffusion) -> None:
    calls: list[tuple[int, int]] = []
    text_to_image(model, PROMPTS, seeds=[1, 2, 3], steps=3, batch_size=2, progress=lambda *counts: calls.append(counts))
    assert calls == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seeds": [1]}, InputError, "3 pictures and 1 seeds"),
        ({"seeds": None}, InputError, "neither seeds nor noise"),
        ({"size": (30, 32)}, InputError, "multiples of 4"),
        ({"size": (0, 32)}, InputError, "multiples of 4"),
        ({"batch_size": 0}, InputError, "batch_size = 0"),
        ({"noise": torch.zeros(2, 4, 8, 8)}, InputError, r"noise is \(2, 4, 8, 8\)"),
        ({"noise": torch.full((3, 4, 8, 8), torch.nan)}, InputError, "not numbers"),
        ({"noise": torch.zeros(3, 4, 8, 8), "size": (16, 16)}, InputError, r"noise is \(3, 4, 8, 8\)"),
        ({"sampler": "lms"}, ConfigError, "'lms' is unknown"),
        ({"steps": 0}, ConfigError, "steps = 0"),
        ({"guidance_scale": -2}, ConfigError, "guidance_scale = -2"),
        ({"guidance_scale": 2, "guidance": Guidance(2)}, ConfigError, "both guidance and guidance_scale"),
        ({"negative_prompts": ["a pear"]}, InputError, "3 prompts and 1 negative"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: LatentDiffusion, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        text_to_image(model, PROMPTS, **({"seeds": [1, 2, 3], "steps": 1} | change))


def test_no_prompts_are_refused(model: LatentDiffusion) -> None:
    with pytest.raises(InputError, match="at least one"):
        text_to_image(model, [], seeds=[])


def test_networks_that_give_no_numbers_are_an_error(model: LatentDiffusion) -> None:
    with torch.no_grad():
        model.unet.conv_out.weight.fill_(torch.nan)
    with pytest.raises(GenerationError, match="not numbers"):
        text_to_image(model, PROMPTS[:1], seeds=[1], steps=1)
