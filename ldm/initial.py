"""Initial weights from which the standard shapes learn faster than from PyTorch's own; the shapes stay what they are.

Every residual branch of the autoencoder starts at zero, so that at first the network is its skips (Goyal et al. 2017,
section 5.1). A U-Net's branches don't: measured in the quickstart, that was slower.
"""

from __future__ import annotations

import torch
from torch import nn

from ldm.autoencoder import AutoencoderKL
from ldm.layers import ResnetBlock2D, SpatialAttention
from ldm.unet import UNet2DCondition

LOG_VARIANCE = -8.0
"""Log variance of the posterior at first. With the usual 0, its noise drowns what the encoder says until it is trained
away."""


@torch.no_grad()
def initialise_autoencoder(network: AutoencoderKL) -> None:
    """Residual branches at zero, orthogonal shortcuts, and a posterior whose noise is small, in place."""
    _zero_branches(network)
    for module in network.modules():
        if isinstance(module, ResnetBlock2D) and module.conv_shortcut is not None:
            nn.init.orthogonal_(module.conv_shortcut.weight)
    latent = network.config.latent_channels
    if network.quant_conv is not None:
        _identity(network.quant_conv)
        network.quant_conv.weight[latent:].mul_(0.01)
        assert network.quant_conv.bias is not None
        network.quant_conv.bias[latent:].fill_(LOG_VARIANCE)
    if network.post_quant_conv is not None:
        _identity(network.post_quant_conv)


@torch.no_grad()
def initialise_unet(network: UNet2DCondition) -> None:
    """The output at zero, in place: the first prediction is 0 everywhere (Ho et al. 2020, in their code)."""
    _zero(network.conv_out)


def _zero_branches(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            _zero(module.conv2)
        elif isinstance(module, SpatialAttention):
            _zero(module.to_out[0])


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.zero_()


def _identity(layer: nn.Conv2d) -> None:
    nn.init.dirac_(layer.weight)
    assert layer.bias is not None
    layer.bias.zero_()
