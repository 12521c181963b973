"""A network that was made ready for inference is a module like any other: whatever is done to it has its effect."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ldm.layers import Attention
from ldm.unet import UNet2DCondition, UNetConfig

SHAPE = UNetConfig(
    sample_size=8,
    block_out_channels=(96, 128),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=24,
)
Change = Callable[[UNet2DCondition], UNet2DCondition]


class _Added(nn.Module):
    """A layer beside another, as a LoRA or a quantised layer wraps it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x) + x.sum(dim=-1, keepdim=True)
        return output


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def attention(unet: UNet2DCondition) -> Attention:
    found = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    assert isinstance(found, Attention)
    return found


def convolution(unet: UNet2DCondition) -> nn.Conv2d:
    found = unet.get_submodule("mid_block.resnets.0.conv1")
    assert isinstance(found, nn.Conv2d)
    return found


def replaced_weight(unet: UNet2DCondition) -> UNet2DCondition:
    attention(unet).to_q.weight = nn.Parameter(2 * attention(unet).to_q.weight, requires_grad=False)
    return unet


def new_data(unet: UNet2DCondition) -> UNet2DCondition:
    attention(unet).to_k.weight.data = 2 * attention(unet).to_k.weight.data
    return unet


def written_data(unet: UNet2DCondition) -> UNet2DCondition:
    convolution(unet).weight.data.mul_(2)
    return unet


def wrapped_projection(unet: UNet2DCondition) -> UNet2DCondition:
    attention(unet).to_q = _Added(attention(unet).to_q)  # type: ignore[assignment]
    return unet


def wrapped_convolution(unet: UNet2DCondition) -> UNet2DCondition:
    unet.mid_block.resnets[0].conv1 = _Added(convolution(unet))
    return unet


def hook(unet: UNet2DCondition) -> UNet2DCondition:
    attention(unet).to_v.register_forward_hook(lambda module, given, output: 2 * output)
    return unet


def parametrization(unet: UNet2DCondition) -> UNet2DCondition:
    parametrize.register_parametrization(attention(unet).to_v, "weight", _Doubled())
    return unet


def parametrized_convolution(unet: UNet2DCondition) -> UNet2DCondition:
    parametrize.register_parametrization(convolution(unet), "weight", _Doubled())
    return unet


def written_copy(unet: UNet2DCondition) -> UNet2DCondition:
    copied = copy.deepcopy(unet)
    attention(copied).to_v.weight.mul_(2)
    return copied


def loaded_state(unet: UNet2DCondition) -> UNet2DCondition:
    unet.load_state_dict({name: 1.1 * value for name, value in unet.state_dict().items()})
    return unet


CHANGES = (
    replaced_weight,
    new_data,
    written_data,
    wrapped_projection,
    wrapped_convolution,
    hook,
    parametrization,
    parametrized_convolution,
    written_copy,
    loaded_state,
)


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
@torch.no_grad()
def test_a_change_has_the_effect_that_it_has_on_a_network_that_was_not_prepared(change: Change) -> None:
    torch.manual_seed(0)
    plain = UNet2DCondition(SHAPE)
    for parameter in plain.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    prepared = copy.deepcopy(plain).for_inference()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 7, 24)
    before = prepared(*inputs)
    torch.testing.assert_close(before, plain(*inputs), rtol=1e-4, atol=1e-4)
    after = change(prepared)(*inputs)
    torch.testing.assert_close(after, change(plain)(*inputs), rtol=1e-4, atol=1e-4)
    assert float((after - before).abs().max()) > 1e-2
