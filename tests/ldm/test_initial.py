"""Initial weights of the autoencoder: what it computes before the first step, and that every part learns."""

from __future__ import annotations

import torch

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.initial import LOG_VARIANCE, initialise_autoencoder, initialise_unet
from ldm.unet import UNet2DCondition, UNetConfig


def _autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=3, norm_num_groups=4, sample_size=16
    )
    network = AutoencoderKL(config)
    initialise_autoencoder(network)
    return network


def test_posterior_of_the_autoencoder_is_narrow_at_first() -> None:
    network = _autoencoder()
    mean, log_variance = network.encode(torch.rand(2, 3, 16, 16) * 2 - 1).chunk(2, dim=1)
    assert mean.std() > 0.05
    assert (log_variance - LOG_VARIANCE).abs().max() < 1


def test_residual_blocks_of_the_autoencoder_start_as_their_shortcuts() -> None:
    network = _autoencoder()
    block = network.encoder.down_blocks[1].resnets[0]
    images = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(block(images), block.conv_shortcut(images), rtol=1e-5, atol=1e-6)
    weight = block.conv_shortcut.weight[:, :, 0, 0]
    assert torch.allclose(weight.T @ weight, torch.eye(8), atol=1e-5)


def test_every_weight_of_the_autoencoder_has_a_gradient_at_the_second_step() -> None:
    network = _autoencoder()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    pixels = torch.rand(4, 3, 16, 16) * 2 - 1
    for _ in range(2):
        optimizer.zero_grad()
        reconstruction, moments = network(pixels, torch.randn(4, 3, 8, 8))
        ((reconstruction - pixels).square().mean() + 1e-4 * moments.square().mean()).backward()
        optimizer.step()
    assert [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_unet_predicts_zero_at_first() -> None:
    torch.manual_seed(0)
    network = UNet2DCondition(
        UNetConfig(
            in_channels=4,
            out_channels=4,
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
        )
    )
    initialise_unet(network)
    assert not network(torch.randn(2, 4, 8, 8), torch.tensor([1.0, 900.0]), torch.randn(2, 5, 12)).any()
