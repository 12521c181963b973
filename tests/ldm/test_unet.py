from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from ldm.errors import ConfigError, InputError
from ldm.layers import set_gradient_checkpointing
from ldm.unet import UNet2DCondition, UNetConfig

SD1 = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
SD2 = SD1 | {"use_linear_projection": True, "attention_head_dim": (2, 4, 8), "upcast_attention": True}
DEMO = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": 2,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
SDXL = DEMO | {
    "block_out_channels": (16, 16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
REFINER = SDXL | {
    "block_out_channels": (24, 24, 48, 48),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 2,
    "attention_head_dim": (2, 4, 8, 8),
    "projection_class_embeddings_input_dim": 20 + 5 * 8,
}
INPAINT = SD1 | {"in_channels": 9}
UPSCALER = SD1 | {
    "in_channels": 7,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "only_cross_attention": (True, True, False),
    "num_class_embeds": 10,
}
UNEVEN = SD1 | {"layers_per_block": (1, 2, 3), "only_cross_attention": True}
SHAPES = {
    "sd1": SD1,
    "sd2": SD2,
    "sdxl": SDXL,
    "refiner": REFINER,
    "inpaint": INPAINT,
    "upscaler": UPSCALER,
    "uneven": UNEVEN,
    "demo": DEMO,
}


def pair(shape: dict[str, Any]) -> tuple[UNet2DCondition, diffusers.UNet2DConditionModel]:
    """Ours and diffusers' with the same random weights."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**shape)
    ours = UNet2DCondition(UNetConfig.from_dict(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(height: int = 16, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, height, width, generator=generator),
        torch.tensor([3.0, 981.5]),
        torch.randn(2, 7, 24, generator=generator),
    )


def extras(config: UNetConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the shape takes beside latents, times and context: for ours, and for diffusers'."""
    generator = torch.Generator().manual_seed(3)
    if config.takes_pooled:
        assert config.projection_class_embeddings_input_dim is not None
        count = (config.projection_class_embeddings_input_dim - 20) // 8
        pooled = torch.randn(2, 20, generator=generator)
        sizes = torch.randint(0, 1024, (2, count), generator=generator).float()
        ours = {"pooled_BP": pooled, "sizes_BS": sizes}
        return ours, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    if config.num_class_embeds is not None:
        level = torch.tensor([2, 7])
        return {"noise_level_B": level}, {"class_labels": level}
    return {}, {}


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    """Each parameter's gradient agrees to 1e-5 of the largest gradient of its kind in the network."""
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients_are_those_of_diffusers(shape: dict[str, Any]) -> None:
    ours, theirs = pair(shape)
    _, times, context = inputs()
    latents = torch.randn(2, ours.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    mine = latents.clone().requires_grad_()
    yours = latents.clone().requires_grad_()
    more, as_theirs = extras(ours.config)
    output = ours(mine, times, context, **more)
    expected = theirs(yours, times, context, **as_theirs).sample
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-5, atol=1e-5 * float(yours.grad.abs().max()))
    assert_same_gradients(ours, theirs)


def test_masked_context_is_read_as_by_diffusers() -> None:
    ours, theirs = pair(SD1)
    latents, times, context = inputs()
    mask = torch.tensor([[True] * 3 + [False] * 4, [True] * 7])
    output = ours(latents, times, context, mask)
    torch.testing.assert_close(output, theirs(latents, times, context, encoder_attention_mask=mask).sample)
    changed = context.clone()
    changed[0, 3:] = 100.0
    torch.testing.assert_close(ours(latents, times, changed, mask), output)


def test_what_the_mask_hides_is_not_read_even_where_all_attention_is_to_the_context() -> None:
    ours, _ = pair(UPSCALER)
    latents, (_, times, context) = torch.randn(2, 7, 16, 16), inputs()
    more, _ = extras(ours.config)
    mask = torch.tensor([[True] * 3 + [False] * 4, [True] * 7])
    output = ours(latents, times, context, mask, **more)
    changed = context.clone()
    changed[0, 3:] = 100.0
    torch.testing.assert_close(ours(latents, times, changed, mask, **more), output)


def test_sizes_that_do_not_halve_evenly() -> None:
    ours, theirs = pair(SD1)
    latents, times, context = inputs(13, 10)
    torch.testing.assert_close(ours(latents, times, context), theirs(latents, times, context).sample)


def test_long_sequences_take_the_fused_kernel_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair(SD2)
    output = ours(*inputs())
    monkeypatch.setattr("ldm.layers.PLAIN_ATTENTION_SCORES", 0)
    torch.testing.assert_close(ours(*inputs()), output, rtol=1e-5, atol=1e-5)


def test_checkpointing_changes_nothing_but_memory() -> None:
    ours, _ = pair(DEMO)
    ours(*inputs()).sum().backward()
    before = {name: parameter.grad for name, parameter in ours.named_parameters()}
    ours.zero_grad(set_to_none=True)
    set_gradient_checkpointing(ours, True)
    ours(*inputs()).sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name])


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "bf16 autocast"])
def test_half_precision_is_near_and_keeps_the_latents_dtype(autocast: bool) -> None:
    ours, _ = pair(DEMO)
    expected = ours(*inputs())
    if not autocast:
        ours.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = ours(*inputs())
    output.square().mean().backward()
    assert output.dtype == torch.float32
    with torch.no_grad():
        assert float((output - expected).square().mean() / expected.square().mean()) < 1e-3
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in ours.parameters())


def test_weights_stay_contiguous_and_time_may_be_whole() -> None:
    ours, _ = pair(DEMO)
    latents, _, context = inputs()
    whole = ours(latents, torch.tensor([3, 981]), context)
    torch.testing.assert_close(whole, ours(latents, torch.tensor([3.0, 981.0]), context))
    assert all(parameter.is_contiguous() for parameter in ours.parameters())


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(DEMO, id="demo"),
        pytest.param(SDXL, id="sdxl", marks=pytest.mark.slow),
        pytest.param(UPSCALER, id="upscaler", marks=pytest.mark.slow),
    ],
)
def test_forward_compiles_to_one_graph(shape: dict[str, Any]) -> None:
    ours, _ = pair(shape)
    _, times, context = inputs()
    latents = torch.randn(2, ours.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True] * 3 + [False] * 4, [True] * 7])
    more, _ = extras(ours.config)
    graph = torch.compile(ours, fullgraph=True, backend="eager")
    expected = ours(latents, times, context, mask, **more)
    torch.testing.assert_close(graph(latents, times, context, mask, **more), expected)


@pytest.mark.slow
def test_gradients_of_the_compiled_network_are_the_same() -> None:
    ours, theirs = pair(DEMO)
    torch.compile(ours, fullgraph=True, backend="aot_eager")(*inputs()).square().mean().backward()
    theirs(*inputs()).sample.square().mean().backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.slow
def test_forward_compiles_with_inductor() -> None:
    ours, _ = pair(DEMO)
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True)
        torch.testing.assert_close(compiled(*inputs()), ours(*inputs()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [DEMO, UPSCALER], ids=["demo", "upscaler"])
def test_weights_in_channels_last_memory_give_the_same(shape: dict[str, Any]) -> None:
    ours, _ = pair(shape)
    _, times, context = inputs()
    latents = torch.randn(2, ours.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(1))
    more, _ = extras(ours.config)
    expected = ours(latents, times, context, **more)
    ours.to(memory_format=torch.channels_last)
    output = ours(latents, times, context, **more)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.sum().backward()
    for name, parameter in ours.named_parameters():
        if parameter.ndim == 4:
            assert parameter.grad is not None
            assert parameter.grad.is_contiguous(memory_format=torch.channels_last), name


def test_configuration_survives_json() -> None:
    config = UNetConfig(**SD2)
    assert UNetConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn = 'gelu' is not supported"),
        ({"addition_embed_type": "text"}, "addition_embed_type = 'text': supported are 'text_time'"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim = None: must be of whole numbers"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep' is not a key"),
        ({"num_class_embeds": 0}, "num_class_embeds = 0: must be of whole numbers above zero"),
        ({"only_cross_attention": [True]}, "only_cross_attention has 1 entries"),
        ({"attention_head_dim": [4, 0]}, r"attention_head_dim = \[4, 0\]: must be"),
        ({"norm_num_groups": None}, "norm_num_groups = None: must be"),
        ({"sample_size": None}, "sample_size = None: must be"),
        ({"cross_attention_dim": 1.5}, "cross_attention_dim = 1.5: must be"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"_class_name": "AutoencoderKL"}, "another network's file"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "AttnDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"]}, "1 entries"),
        ({"norm_num_groups": 5}, "does not divide 16, 32"),
        ({"attention_head_dim": 5}, "5 heads do not divide 16"),
        ({"layers_per_block": [1, 1, 1]}, "layers_per_block has 3 entries"),
        ({"cross_attention_dim": [24, 24]}, r"cross_attention_dim = \[24, 24\]: must be of type int"),
    ],
)
def test_configurations_of_other_computations_are_refused(change: dict[str, Any], message: str) -> None:
    values = UNetConfig(**DEMO).to_dict() | change
    with pytest.raises(ConfigError, match=message):
        UNetConfig.from_dict(values)


def test_keys_without_effect_are_ignored() -> None:
    values = UNetConfig(**DEMO).to_dict()
    more = {"_diffusers_version": "0.42.1", "class_embed_type": None, "dual_cross_attention": False}
    more |= {"upcast_attention": None, "mid_block_only_cross_attention": True, "addition_embed_type_num_heads": 64}
    assert UNetConfig.from_dict(values | more) == UNetConfig(**DEMO)


def test_inputs_that_do_not_fit_are_refused() -> None:
    ours, _ = pair(DEMO)
    latents, times, context = inputs()
    with pytest.raises(InputError, match=r"latents are \(2, 3, 16, 16\): must be \[batch, 4,"):
        ours(latents[:, :3], times, context)
    with pytest.raises(InputError, match=r"timesteps are \(1,\)"):
        ours(latents, times[:1], context)
    with pytest.raises(InputError, match=r"context is \(2, 7, 23\)"):
        ours(latents, times, context[..., :23])
    with pytest.raises(InputError, match=r"mask is torch.bool \(2, 6\): must be torch.bool \(2, 7\)"):
        ours(latents, times, context, torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(InputError, match=r"mask is torch.float32 \(2, 7\): must be torch.bool \(2, 7\)"):
        ours(latents, times, context, torch.ones(2, 7))
    with pytest.raises(InputError, match=r"latents are torch.int64"):
        ours(latents.long(), times, context)


def test_inputs_that_the_network_does_not_take_or_lacks_are_refused() -> None:
    demo, sdxl, upscaler = (UNet2DCondition(UNetConfig(**shape)) for shape in (DEMO, SDXL, UPSCALER))
    latents, times, context = inputs()
    pooled, sizes, level = torch.randn(2, 20), torch.ones(2, 6), torch.tensor([1, 2])
    with pytest.raises(InputError, match="pooled was given: the network has addition_embed_type = None"):
        demo(latents, times, context, pooled_BP=pooled, sizes_BS=sizes)
    with pytest.raises(InputError, match="noise_level was given: the network has num_class_embeds = None"):
        demo(latents, times, context, noise_level_B=level)
    with pytest.raises(InputError, match="pooled is missing: the network has addition_embed_type = 'text_time'"):
        sdxl(latents, times, context)
    with pytest.raises(InputError, match="sizes is missing"):
        sdxl(latents, times, context, pooled_BP=pooled)
    with pytest.raises(InputError, match=r"pooled is 20 wide and there are 5 sizes, embedded in 8 each: .* 68 wide"):
        sdxl(latents, times, context, pooled_BP=pooled, sizes_BS=sizes[:, :5])
    with pytest.raises(InputError, match=r"pooled is \(1, 20\): must be \[2, width\]"):
        sdxl(latents, times, context, pooled_BP=pooled[:1], sizes_BS=sizes)
    seven = torch.randn(2, 7, 16, 16)
    with pytest.raises(InputError, match="noise_level is missing: the network has num_class_embeds = 10"):
        upscaler(seven, times, context)
    with pytest.raises(InputError, match=r"noise_level is torch.float32 \(2,\): must be torch.int64 \(2,\)"):
        upscaler(seven, times, context, noise_level_B=level.float())
