from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.errors import ConfigError, InputError
from ldm.guidance import Guidance, Guided, predict
from ldm.unet import UNet2DCondition

Batch = tuple[Tensor, Tensor, Conditioning, Conditioning]


class Toy(nn.Module):
    """A network of the plain form: latents, times, context, mask. Extra channels are added to the first four."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.batches: list[int] = []

    def forward(self, x: Tensor, time: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        self.batches.append(len(x))
        given = context.mean(dim=(1, 2)) + time / 1000
        extra = x[:, 4:].mean(dim=1, keepdim=True) if x.shape[1] > 4 else 0
        return self.factor * torch.sin(x[:, :4] + given.view(-1, 1, 1, 1)) + extra


def guided(
    unet: nn.Module, latents: Tensor, times: Tensor, *conditions: Any, noise_share: float = 0.5, **extra: Any
) -> Tensor:
    """One call of a network under guidance."""
    return Guided(unet, *conditions, **extra)(latents, times, noise_share=noise_share)


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    prompts = Conditioning(torch.randn(3, 5, 384, generator=generator))
    empty = Conditioning(torch.randn(1, 5, 384, generator=generator)).expand(3)
    return latents, torch.tensor([10.0, 500.0, 900.0]), prompts, empty


@torch.no_grad()
def test_scale_mixes_both_predictions(unet: UNet2DCondition, batch: Batch) -> None:
    latents, times, prompts, empty = batch
    within = unet(latents, times, prompts.context)
    without = unet(latents, times, empty.context)
    for scale in (0.0, 0.5, 3.0):
        result = guided(unet, latents, times, prompts, empty, scale)
        torch.testing.assert_close(result, (1 - scale) * without + scale * within, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_scale_one_is_the_prompt_alone_in_one_pass(unet: UNet2DCondition, batch: Batch) -> None:
    latents, times, prompts, empty = batch
    sizes: list[int] = []
    hook = unet.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    result = guided(unet, latents, times, prompts, empty, 1.0)
    assert sizes == [3]
    guided(unet, latents, times, prompts, empty, 2.0)
    assert sizes == [3, 6]
    hook.remove()
    torch.testing.assert_close(result, unet(latents, times, prompts.context), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_noise_outside_the_interval_takes_one_pass_with_the_condition_alone(
    unet: UNet2DCondition, batch: Batch
) -> None:
    latents, times, prompts, empty = batch
    network = Guided(unet, prompts, empty, Guidance(3.0, interval=(0.2, 0.6)))
    rows: list[int] = []
    unet.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    for share, scale in ((0.1, 1.0), (0.3, 3.0), (0.5, 3.0), (0.9, 1.0)):
        found = network(latents, times, noise_share=share)
        torch.testing.assert_close(found, guided(unet, latents, times, prompts, empty, scale), rtol=1e-5, atol=1e-5)
    assert rows == [3, 3, 6, 6, 6, 6, 3, 3]


@torch.no_grad()
def test_equal_conditions_need_no_guidance(unet: UNet2DCondition, batch: Batch) -> None:
    latents, times, prompts, _ = batch
    result = guided(unet, latents, times, prompts, prompts, 7.5)
    torch.testing.assert_close(result, unet(latents, times, prompts.context), rtol=1e-4, atol=1e-4)


@given(scale=st.floats(0, 20), rescale=st.floats(0, 1), share=st.floats(0, 1))
def test_identities(scale: float, rescale: float, share: float) -> None:
    latents, times, prompts, empty = make_batch()
    toy = Toy()
    within, without = (predict(toy, latents, times, each) for each in (prompts, empty))
    assert torch.equal(guided(toy, latents, times, prompts, empty, Guidance(1.0, rescale)), within)
    torch.testing.assert_close(guided(toy, latents, times, prompts, empty, 0.0), without)
    plain = guided(toy, latents, times, prompts, empty, scale)
    torch.testing.assert_close(plain, without + scale * (within - without), rtol=1e-4, atol=1e-4)
    assert torch.equal(guided(toy, latents, times, prompts, empty, Guidance(scale, 0.0)), plain)
    inside = 0.2 <= share <= 0.6
    limited = guided(toy, latents, times, prompts, empty, Guidance(scale, interval=(0.2, 0.6)), noise_share=share)
    torch.testing.assert_close(limited, plain if inside else within)


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_rescale_is_that_of_diffusers(batch: Batch, share: float) -> None:
    latents, times, prompts, empty = batch
    toy = Toy()
    plain, within = guided(toy, latents, times, prompts, empty, 7.5), predict(toy, latents, times, prompts)
    found = guided(toy, latents, times, prompts, empty, Guidance(7.5, rescale=share))
    torch.testing.assert_close(found, rescale_noise_cfg(plain, within, share))
    if share == 1:
        torch.testing.assert_close(found.flatten(1).std(dim=1), within.flatten(1).std(dim=1))


def test_the_interval_costs_one_pass_outside(batch: Batch) -> None:
    toy = Toy()
    for share in (0.1, 0.2, 0.6, 0.7):
        guided(toy, *batch, Guidance(3.0, interval=(0.2, 0.6)), noise_share=share)
    assert toy.batches == [3, 6, 6, 3]


def test_each_row_may_have_its_own_negative_prompt(batch: Batch) -> None:
    latents, times, prompts, _ = batch
    negative = Conditioning(torch.randn(3, 5, 384, generator=torch.Generator().manual_seed(5)))
    toy = Toy()
    whole = guided(toy, latents, times, prompts, negative, 3.0)
    for row in range(3):
        one = slice(row, row + 1)
        alone = guided(toy, latents[one], times[one], prompts[one], negative[one], 3.0)
        torch.testing.assert_close(whole[one], alone)


def test_several_conditions_have_a_scale_each(batch: Batch) -> None:
    latents, times, prompts, empty = batch
    other = prompts[[1, 2, 0]]
    toy = Toy()
    u, first, second = (predict(toy, latents, times, each) for each in (empty, prompts, other))
    toy.batches.clear()
    found = guided(toy, latents, times, [prompts, other], empty, Guidance((2.0, -1.5)))
    torch.testing.assert_close(found, u + 2 * (first - u) - 1.5 * (second - u), rtol=1e-4, atol=1e-5)
    assert toy.batches == [9]


def test_images_and_text_are_guided_as_instruct_pix2pix(batch: Batch) -> None:
    """Brooks et al. 2023, eq. 3, with the image in extra channels that are zero for the unconditional prediction."""
    latents, times, text, empty = batch
    image = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    toy, s_image, s_text = Toy(), 1.5, 7.5

    def with_image(channels: Tensor, condition: Conditioning) -> Tensor:
        return predict(toy, torch.cat([latents, channels], dim=1), times, condition)

    nothing, only_image, both = (
        with_image(0 * image, empty),
        with_image(image, empty),
        with_image(image, text),
    )
    expected = nothing + s_image * (only_image - nothing) + s_text * (both - only_image)
    found = guided(
        toy,
        latents,
        times,
        [empty, text],
        empty,
        Guidance((s_image - s_text, s_text)),
        extra_BEHW=[0 * image, image, image],
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_weak_network_takes_the_empty_prompts_place(batch: Batch) -> None:
    latents, times, prompts, _ = batch
    strong, weak = Toy(), Toy(0.7)
    found = guided(strong, latents, times, prompts, None, Guidance(2.0, weak=weak))
    within, without = predict(strong, latents, times, prompts), predict(weak, latents, times, prompts)
    torch.testing.assert_close(found, without + 2 * (within - without))
    torch.testing.assert_close(guided(strong, latents, times, prompts, None, Guidance(2.0, weak=strong)), within)


def test_every_part_of_a_condition_reaches_the_network(batch: Batch) -> None:
    latents, times, prompts, _ = batch
    seen: dict[str, Any] = {}

    class Wide(nn.Module):
        def forward(self, x: Tensor, time: Tensor, context: Tensor, mask: Any = None, **given: Any) -> Tensor:
            seen.update(given, mask=mask)
            return x

    predict(Wide(), latents, times, prompts)
    assert seen == {"mask": None}
    full = Conditioning(
        prompts.context,
        torch.ones(3, 5, dtype=torch.bool),
        torch.randn(3, 7),
        torch.randn(3, 6),
        torch.tensor([1, 2, 3]),
    )
    predict(Wide(), latents, times, full)
    assert seen["mask"] is full.mask
    assert seen["pooled_BP"] is full.pooled
    assert seen["sizes_BS"] is full.sizes
    assert seen["noise_level_B"] is full.noise_level


def test_half_precision_is_mixed_in_float32(batch: Batch) -> None:
    latents, times, prompts, empty = batch
    result = guided(Toy(), latents.bfloat16(), times, prompts, empty, 7.5)
    assert result.dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": -1.0}, "guidance_scale = -1.0"),
        ({"scale": math.nan}, "guidance_scale = nan"),
        ({"scale": ()}, "one for each condition"),
        ({"scale": (1.0, math.inf)}, "one for each condition"),
        ({"rescale": 1.5}, "rescale = 1.5"),
        ({"interval": (0.6, 0.2)}, "interval"),
        ({"interval": (0.0, 1.1)}, "interval"),
        ({"scale": (1.0, 2.0), "interval": (0.1, 0.9)}, "take one scale"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Guidance(**values)


def test_what_does_not_fit_is_refused(batch: Batch) -> None:
    latents, times, prompts, empty = batch
    with pytest.raises(ConfigError, match=r"guidance_scale = -1.0"):
        guided(Toy(), *batch, -1.0)
    with pytest.raises(ConfigError, match="1 guidance scales and 2 conditions"):
        guided(Toy(), latents, times, [prompts, prompts], empty, 2.0)
    with pytest.raises(InputError, match="without an empty condition"):
        guided(Toy(), latents, times, prompts, None, 2.0)
    with pytest.raises(InputError, match="3 rows of a condition and 1 latents: must be equal"):
        guided(Toy(), latents[:1], times[:1], prompts, empty, 1.0)
    with pytest.raises(InputError, match="1 rows of a condition and 3 latents: must be equal"):
        guided(Toy(), latents, times, prompts, empty[:1], 2.0)
    with pytest.raises(InputError, match="3 extra channels: must be 2"):
        guided(Toy(), *batch, 2.0, extra_BEHW=[latents] * 3)
