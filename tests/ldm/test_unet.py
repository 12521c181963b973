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
SHAPES = {"sd1": SD1, "sd2": SD2, "demo": DEMO}


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


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    """Each parameter's gradient agrees to 1e-5 of the largest gradient of its kind in the network."""
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients_are_those_of_diffusers(shape: dict[str, Any]) -> None:
    ours, theirs = pair(shape)
    latents, times, context = inputs()
    weights = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    mine = latents.clone().requires_grad_()
    yours = latents.clone().requires_grad_()
    output = ours(mine, times, context)
    expected = theirs(yours, times, context).sample
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


def test_forward_compiles_to_one_graph() -> None:
    ours, _ = pair(DEMO)
    graph = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(graph(*inputs()), ours(*inputs()))


def test_full_size_shapes_have_diffusers_parameters() -> None:
    sd2 = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
    for shape in ({"cross_attention_dim": 768}, sd2):
        with torch.device("meta"):
            theirs = diffusers.UNet2DConditionModel(**shape)
            ours = UNet2DCondition(UNetConfig(**shape))
        expected = {name: value.shape for name, value in theirs.state_dict().items()}
        assert {name: value.shape for name, value in ours.state_dict().items()} == expected


def test_configuration_survives_json() -> None:
    config = UNetConfig(**SD2)
    assert UNetConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn = 'gelu' is not supported"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type = 'text_time' is not a key"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"_class_name": "AutoencoderKL"}, "another network's file"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "AttnDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"]}, "1 entries"),
        ({"norm_num_groups": 5}, "does not divide 16, 32"),
        ({"attention_head_dim": 5}, "5 heads do not divide 16"),
        ({"layers_per_block": [1, 1, 1]}, "layers_per_block has 3 entries"),
        ({"cross_attention_dim": [24, 24]}, "one width for all blocks"),
    ],
)
def test_configurations_of_other_computations_are_refused(change: dict[str, Any], message: str) -> None:
    values = UNetConfig(**DEMO).to_dict() | change
    with pytest.raises(ConfigError, match=message):
        UNetConfig.from_dict(values)


def test_keys_without_effect_are_ignored() -> None:
    values = UNetConfig(**DEMO).to_dict()
    more = {"_diffusers_version": "0.42.1", "class_embed_type": None, "dual_cross_attention": False}
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
    with pytest.raises(InputError, match=r"mask is \(2, 6\)"):
        ours(latents, times, context, torch.ones(2, 6, dtype=torch.bool))
