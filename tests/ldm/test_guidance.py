from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.errors import ConfigError
from ldm.guidance import guided
from ldm.unet import UNet2DCondition


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Conditioning, Conditioning]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    prompts = Conditioning(torch.randn(3, 5, 384, generator=generator))
    empty = Conditioning(torch.randn(1, 5, 384, generator=generator)).expand(3)
    return latents, torch.tensor([10.0, 500.0, 900.0]), prompts, empty


@torch.no_grad()
def test_scale_mixes_both_predictions(
    unet: UNet2DCondition, batch: tuple[Tensor, Tensor, Conditioning, Conditioning]
) -> None:
    latents, times, prompts, empty = batch
    within = unet(latents, times, prompts.context)
    without = unet(latents, times, empty.context)
    for scale in (0.0, 0.5, 3.0):
        result = guided(unet, latents, times, prompts, empty, scale)
        torch.testing.assert_close(result, (1 - scale) * without + scale * within, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_scale_one_is_the_prompt_alone_in_one_pass(
    unet: UNet2DCondition, batch: tuple[Tensor, Tensor, Conditioning, Conditioning]
) -> None:
    latents, times, prompts, empty = batch
    sizes: list[int] = []
    hook = unet.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    result = guided(unet, latents, times, prompts, empty, 1.0)
    assert sizes == [3]
    guided(unet, latents, times, prompts, empty, 2.0)
    assert sizes == [3, 6]
    hook.remove()
    assert torch.equal(result, unet(latents, times, prompts.context))


@torch.no_grad()
def test_equal_conditions_need_no_guidance(
    unet: UNet2DCondition, batch: tuple[Tensor, Tensor, Conditioning, Conditioning]
) -> None:
    latents, times, prompts, _ = batch
    result = guided(unet, latents, times, prompts, prompts, 7.5)
    torch.testing.assert_close(result, unet(latents, times, prompts.context), rtol=1e-4, atol=1e-4)


def test_negative_scales_are_refused(
    unet: UNet2DCondition, batch: tuple[Tensor, Tensor, Conditioning, Conditioning]
) -> None:
    with pytest.raises(ConfigError, match=r"guidance_scale = -1.0"):
        guided(unet, *batch, -1.0)
