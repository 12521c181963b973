"""Fast ways to a layer's result give the plain way's result, and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.convolutions import Conv1x1, Conv3x3
from ldm.layers import attention


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
