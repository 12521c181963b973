from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.errors import ConfigError, InputError
from ldm.layers import set_gradient_checkpointing

F4 = {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
F8 = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 2, "latent_channels": 8, "norm_num_groups": 8}
BARE = F4 | {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False}
SHAPES = {"f4": F4, "f8": F8, "bare": BARE}


def pair(shape: dict[str, Any]) -> tuple[AutoencoderKL, diffusers.AutoencoderKL]:
    """Ours and diffusers' with the same random weights."""
    torch.manual_seed(0)
    blocks = len(shape["block_out_channels"])
    types = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    theirs = diffusers.AutoencoderKL(**shape, **types)
    ours = AutoencoderKL(AutoencoderConfig.from_dict(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def close(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None
    assert expected is not None
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients_are_those_of_diffusers(shape: dict[str, Any]) -> None:
    ours, theirs = pair(shape)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1
    moments = ours.encode(pixels)
    expected = theirs.encode(pixels).latent_dist.parameters
    close(moments, expected)
    latents = torch.randn(moments[:, ::2].shape, generator=generator)
    decoded, expected_decoded = ours.decode(latents), theirs.decode(latents).sample
    assert decoded.shape == pixels.shape
    close(decoded, expected_decoded)
    (moments.square().sum() + decoded.square().sum()).backward()
    (expected.square().sum() + expected_decoded.square().sum()).backward()
    gradients = dict(theirs.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in gradients.values())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-5, atol=1e-5 * largest, msg=name)


def test_forward_is_encode_draw_decode(autoencoder: AutoencoderKL) -> None:
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    noise = torch.randn(2, 4, 4, 4)
    reconstruction, moments = autoencoder(pixels, noise)
    mean, log_variance = moments.chunk(2, dim=1)
    torch.testing.assert_close(moments, autoencoder.encode(pixels))
    torch.testing.assert_close(reconstruction, autoencoder.decode(mean + (log_variance / 2).exp() * noise))
    torch.testing.assert_close(autoencoder(pixels)[0], autoencoder.decode(mean))


def test_checkpointing_changes_nothing_but_memory(autoencoder: AutoencoderKL) -> None:
    pixels = torch.rand(1, 3, 16, 16)
    autoencoder(pixels)[0].sum().backward()
    before = {name: parameter.grad for name, parameter in autoencoder.named_parameters()}
    autoencoder.zero_grad(set_to_none=True)
    set_gradient_checkpointing(autoencoder, True)
    autoencoder(pixels)[0].sum().backward()
    for name, parameter in autoencoder.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name])


def test_half_precision_weights_keep_the_pixels_dtype(autoencoder: AutoencoderKL) -> None:
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = autoencoder(pixels)[0]
    output = autoencoder.to(torch.bfloat16)(pixels)[0]
    assert output.dtype == torch.float32
    with torch.no_grad():
        assert float((output - expected).square().mean() / expected.square().mean()) < 1e-2


def test_full_size_shape_has_diffusers_parameters() -> None:
    config = AutoencoderConfig()
    with torch.device("meta"):
        ours = AutoencoderKL(config)
        theirs = diffusers.AutoencoderKL.from_config(config.to_dict())
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected


def test_configuration_survives_json() -> None:
    config = AutoencoderConfig(**F8, scaling_factor=0.7, shift_factor=0.1)
    assert AutoencoderConfig.from_dict(config.to_dict()) == config
    assert config.downsampling == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
        ({"latents_mean": [0.1]}, "latents_mean"),
        ({"block_out_channels": []}, "empty"),
        ({"norm_num_groups": 3}, "does not divide"),
        ({"wavelets": 2}, "wavelets = 2 is not a key"),
    ],
)
def test_configurations_of_other_computations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoencoderConfig.from_dict(AutoencoderConfig(**F4).to_dict() | change)


def test_inputs_that_do_not_fit_are_refused(autoencoder: AutoencoderKL) -> None:
    with pytest.raises(InputError, match=r"pixels are \(3, 16, 16\)"):
        autoencoder.encode(torch.zeros(3, 16, 16))
    with pytest.raises(InputError, match="multiples of 4"):
        autoencoder.encode(torch.zeros(1, 3, 16, 18))
    with pytest.raises(InputError, match=r"latents are \(1, 3, 4, 4\)"):
        autoencoder.decode(torch.zeros(1, 3, 4, 4))
