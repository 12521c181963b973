from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL, IdentityAutoencoder, IdentityConfig
from ldm.errors import ConfigError, InputError
from ldm.latents import posterior_mean, sample_posterior, scale_latents, unscale_latents
from ldm.layers import set_gradient_checkpointing

F4 = {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
F8 = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 2, "latent_channels": 8, "norm_num_groups": 8}
SDXL = F8 | {"latent_channels": 4, "scaling_factor": 0.13025, "norm_num_groups": 4, "sample_size": 1024}
F16 = {"block_out_channels": (4, 4, 8, 8, 8), "layers_per_block": 1, "latent_channels": 16, "norm_num_groups": 4}
SD3 = F4 | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609}
NO_ATTENTION = F4 | {"mid_block_add_attention": False}
BARE = F4 | {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False}
SHAPES = {"f4": F4, "f8": F8, "sdxl": SDXL, "f16": F16, "sd3": SD3, "no_attention": NO_ATTENTION, "bare": BARE}

FULL = {
    "sd": {"scaling_factor": 0.18215},
    "sdxl": {"scaling_factor": 0.13025, "sample_size": 1024},
    "sd3": {"latent_channels": 16, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False},
    "f4": {"block_out_channels": (128, 256, 512), "latent_channels": 3},
    "f16": {"block_out_channels": (128, 128, 256, 256, 512), "latent_channels": 16},
}


def pair(shape: dict[str, Any]) -> tuple[AutoencoderKL, diffusers.AutoencoderKL]:
    """Ours and diffusers' with the same random weights."""
    torch.manual_seed(0)
    blocks = len(shape["block_out_channels"])
    types = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    theirs = diffusers.AutoencoderKL(**shape, **types)
    ours = AutoencoderKL(AutoencoderConfig.from_dict(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def close(actual: Tensor | None, expected: Tensor | None, tolerance: float = 1e-5) -> None:
    assert actual is not None
    assert expected is not None
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * largest)


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


@pytest.mark.parametrize("shape", FULL.values(), ids=FULL)
def test_full_size_shapes_have_diffusers_parameters(shape: dict[str, Any]) -> None:
    config = AutoencoderConfig(**shape)
    with torch.device("meta"):
        ours = AutoencoderKL(config)
        theirs = diffusers.AutoencoderKL.from_config(config.to_dict())
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected


def test_full_size_has_the_published_number_of_parameters() -> None:
    """83 653 863: the first stage of Stable Diffusion 1, 2 and XL."""
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in AutoencoderKL(AutoencoderConfig()).parameters()) == 83_653_863


@given(
    widths=st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=4),
    layers=st.integers(1, 2),
    latent=st.integers(1, 5),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
@settings(max_examples=8, deadline=None)
def test_random_shapes_are_those_of_diffusers(
    widths: list[int], layers: int, latent: int, flags: tuple[bool, ...]
) -> None:
    names = ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv")
    shape = {"block_out_channels": tuple(widths), "layers_per_block": layers, "latent_channels": latent}
    ours, theirs = pair(shape | {"norm_num_groups": 4} | dict(zip(names, flags, strict=True)))
    pixels = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        moments = ours.encode(pixels)
        # Groups of one channel, or of few positions, may have a small deviation to divide by.
        close(moments, theirs.encode(pixels).latent_dist.parameters, 1e-4)
        mean = moments[:, :latent]
        close(ours.decode(mean), theirs.decode(mean).sample, 1e-4)


def test_inference_changes_memory_formats_and_no_values(autoencoder: AutoencoderKL) -> None:
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    expected, moments = autoencoder(pixels)
    state = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    fast = autoencoder.train().for_inference()
    assert not fast.training
    assert fast.encoder.mid_block.resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert {name: value.tolist() for name, value in fast.state_dict().items()} == {
        name: value.tolist() for name, value in state.items()
    }
    reconstruction, fast_moments = fast(pixels)
    assert not reconstruction.requires_grad
    close(reconstruction, expected.detach())
    close(fast_moments, moments.detach())


def test_the_callers_pixels_are_left_alone(autoencoder: AutoencoderKL) -> None:
    """Blocks overwrite what they computed, never what they were given."""
    pixels = (torch.rand(1, 3, 16, 16) * 2 - 1).contiguous(memory_format=torch.channels_last)
    latents = torch.randn(1, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    before, latents_before = pixels.clone(), latents.clone()
    with torch.no_grad():
        autoencoder.encode(pixels)
        autoencoder.decode(latents)
    assert torch.equal(pixels, before)
    assert torch.equal(latents, latents_before)


def test_identity_leaves_pixels_as_they_are() -> None:
    stage = IdentityAutoencoder(IdentityConfig.from_dict(IdentityConfig().to_dict()))
    pixels = torch.rand(2, 3, 6, 10) * 2 - 1
    moments = stage.encode(pixels)
    assert torch.equal(posterior_mean(moments), pixels)
    torch.testing.assert_close(sample_posterior(moments, torch.randn(2, 3, 6, 10)), pixels, rtol=0, atol=1e-5)
    latents = scale_latents(pixels, stage.config)
    assert torch.equal(stage.decode(unscale_latents(latents, stage.config)), pixels)
    assert torch.equal(stage(pixels)[0], pixels)
    assert torch.equal(stage(pixels)[1], moments)
    assert stage.config.downsampling == 1
    assert not list(stage.parameters())
    with pytest.raises(InputError, match=r"pixels are \(2, 1, 4, 4\)"):
        stage.encode(torch.zeros(2, 1, 4, 4))
    with pytest.raises(InputError, match=r"latents are \(3, 4, 4\)"):
        stage.decode(torch.zeros(3, 4, 4))
    with pytest.raises(ConfigError, match="latent_channels = 0"):
        IdentityConfig(latent_channels=0)


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
