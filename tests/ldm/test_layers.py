"""Fast ways to a layer's result give the plain way's result, and gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.convolutions import Conv1x1, Conv3x3
from ldm.layers import Attention, SpatialAttention, attention, fuse_projections


def values_and_gradients(output: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    return (output, *torch.autograd.grad(output, of, seed))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (2, 0)])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 3), (12, 12)])
def test_convolution_is_the_plain_one_for_few_positions_and_for_many(
    size: tuple[int, int], stride: int, padding: int, memory: torch.memory_format
) -> None:
    if padding == 0 and min(size) < 3:
        pytest.skip("no neighbourhood fits")
    torch.manual_seed(0)
    layer = Conv3x3(48, 20, stride=stride, padding=padding).to(memory_format=memory)
    x = torch.randn(2, 48, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert layer.bias is not None
    of = (x, layer.weight, layer.bias)
    expected = values_and_gradients(F.conv2d(*of, stride=stride, padding=padding), *of)
    for one, other in zip(values_and_gradients(layer(x), *of), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_pointwise_convolution_is_the_plain_one() -> None:
    torch.manual_seed(0)
    layer = Conv1x1(12, 7)
    x = torch.randn(2, 12, 5, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert layer.bias is not None
    of = (x, layer.weight, layer.bias)
    expected = values_and_gradients(F.conv2d(*of), *of)
    for one, other in zip(values_and_gradients(layer(x), *of), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [(5, 9), (300, 300)], ids=["short", "long"])
def test_attention_is_that_of_pytorch(lengths: tuple[int, int], masked: bool) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 3, lengths[0], 8, requires_grad=True)
    k, v = torch.randn(2, 2, 3, lengths[1], 8, requires_grad=True)
    bias = torch.where(torch.rand(2, 1, 1, lengths[1]) < 0.5, 0.0, -10_000.0) if masked else None
    expected = values_and_gradients(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), q, k, v)
    for one, other in zip(values_and_gradients(attention(q, k, v, bias), q, k, v), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def layers_that_attend() -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    sequence, context = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    return [
        (Attention(16, heads=2, head_width=8), (sequence,)),
        # As wide as the sequence: its width doesn't tell that the context is another.
        (Attention(16, heads=2, head_width=8, context_width=16), (sequence, context)),
        (SpatialAttention(16, groups=4, eps=1e-6), (torch.randn(2, 16, 3, 3),)),
    ]


@torch.no_grad()
def test_fused_projections_give_the_same_under_the_same_names() -> None:
    for layer, inputs in layers_that_attend():
        expected, before = layer(*inputs), copy.deepcopy(layer.state_dict())
        fuse_projections(layer)
        torch.testing.assert_close(layer(*inputs), expected)
        after = layer.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)


@torch.no_grad()
def test_fused_projections_follow_the_parameters() -> None:
    for layer, inputs in layers_that_attend():
        fuse_projections(layer)
        plain = copy.deepcopy(layer)
        copied = copy.deepcopy(layer)
        for module in plain.modules():
            if isinstance(module, Attention | SpatialAttention):
                module.fused_weight = module.fused_bias = None
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter))
        for parameter, changed in zip(layer.parameters(), plain.parameters(), strict=True):
            parameter.copy_(changed)
        torch.testing.assert_close(layer(*inputs), plain(*inputs))
        copied.load_state_dict(plain.state_dict())
        torch.testing.assert_close(copied(*inputs), plain(*inputs))
        parameters = list(copied.double().parameters())
        parameters[0].mul_(3)
        plain.double()
        next(plain.parameters()).mul_(3)
        doubles = [part.double() for part in inputs]
        torch.testing.assert_close(copied(*doubles), plain(*doubles))
        assert all(parameter.dtype == torch.float64 for parameter in parameters)


def test_fused_projections_can_be_trained_and_saved(tmp_path: Path) -> None:
    for layer, inputs in layers_that_attend():
        fuse_projections(layer)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        before = layer(*inputs)
        before.square().mean().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        optimizer.step()
        trained = layer(*inputs)
        assert not torch.allclose(trained, before)
        with torch.no_grad():
            torch.testing.assert_close(layer(*inputs), trained)
        save_file(layer.state_dict(), tmp_path / "layer.safetensors")
        for name, value in load_file(tmp_path / "layer.safetensors").items():
            assert torch.equal(value, layer.state_dict()[name])
