"""Training step, encoding and sampling at Stable Diffusion 2's size, of ours and of diffusers, for `benchmarks/gpu.py`.

Both sides have the same weights, in channels_last, and the same inputs; torch's fused attention and AdamW.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases.measure import Call, Meter, Place
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.conditioning import Conditioning
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.ema import Ema
from ldm.generate import decode_latents
from ldm.sampling import sample_latents
from ldm.shapes import SD2_UNET
from ldm.unet import UNet2DCondition, UNetConfig

LEARNING_RATE = 1e-4
DTYPE = torch.bfloat16
OURS, THEIRS = "ldm", "diffusers"


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    unet: UNetConfig
    autoencoder: AutoencoderConfig
    context: tuple[int, int]
    """Length and width of the text's states."""
    train: tuple[tuple[int, int], ...]
    """(side of the image in pixels, batch), here and below."""
    encode: tuple[tuple[int, int], ...]
    sample: tuple[int, int]
    steps: int


FULL = Scale(SD2_UNET, AutoencoderConfig(), (77, 1024), ((256, 64), (512, 32)), ((256, 64), (512, 16)), (512, 8), 20)
TINY = Scale(
    dataclasses.replace(
        SD2_UNET, block_out_channels=(32, 64, 64, 64), attention_head_dim=(1, 2, 2, 2), cross_attention_dim=32
    ),
    AutoencoderConfig(block_out_channels=(32, 32, 64, 64)),
    (7, 32),
    ((64, 2),),
    ((64, 2),),
    (64, 1),
    2,
)


def train(meter: Meter, scale: Scale, ways: tuple[str, ...]) -> None:
    """The whole step of the U-Net: forward, backward, gradient clipping, AdamW, EMA; bf16 autocast on a GPU."""
    weights = _weights(partial(UNet2DCondition, scale.unet), meter.device)
    for size_px, batch in scale.train:
        inputs = training_inputs(scale, size_px, batch, meter.device)
        tflop = 3 * unet_tflop(scale.unet, size_px // scale.autoencoder.downsampling, scale.context)

        def make(*, ours: bool, compiled: bool, inputs: tuple[Tensor, ...] = inputs) -> Call:
            network = _unet(scale, weights, meter.device, ours=ours).train()
            return Step(network if ours else Unwrapped(network), *inputs, compiled=compiled)

        for how in ways:
            for who in sides():
                # The backward pass costs twice the forward.
                place = Place("train", who, how, size_px, batch, tflop)
                meter.measure(place, partial(make, ours=who == OURS, compiled=how == "compiled"))


def encode(meter: Meter, scale: Scale, ways: tuple[str, ...]) -> None:
    """The first stage's encoder, bf16."""
    weights = _weights(partial(AutoencoderKL, scale.autoencoder), meter.device)
    for size_px, batch in scale.encode:
        pixels = torch.randn(batch, 3, size_px, size_px, generator=torch.Generator().manual_seed(1))
        with torch.device("meta"):
            tflop = tflop_of(partial(AutoencoderKL(scale.autoencoder).encode, torch.empty(1, 3, size_px, size_px)))

        def make(*, ours: bool, compiled: bool, pixels: Tensor = pixels) -> Call:
            run = _autoencoder(scale, weights, meter.device, ours=ours).encode
            run = torch.compile(run) if compiled else run
            images = pixels.to(meter.device, DTYPE)

            @torch.no_grad()
            def call() -> Tensor:
                found = run(images)
                moments: Tensor = found if ours else found.latent_dist.parameters
                return moments

            return call

        for how in ways:
            for who in sides():
                place = Place("encode", who, how, size_px, batch, tflop)
                meter.measure(place, partial(make, ours=who == OURS, compiled=how == "compiled"))


def sample(meter: Meter, scale: Scale, ways: tuple[str, ...]) -> None:
    """DPM-Solver++ with guidance, decoding included, bf16; the text's states are given."""
    size_px, batch = scale.sample
    side = size_px // scale.autoencoder.downsampling
    unet_weights = _weights(partial(UNet2DCondition, scale.unet), meter.device)
    weights = _weights(partial(AutoencoderKL, scale.autoencoder), meter.device)
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, scale.autoencoder.latent_channels, side, side, generator=random)
    text, empty = (torch.randn(batch, *scale.context, generator=random).to(meter.device, DTYPE) for _ in range(2))

    def ours(*, compiled: bool) -> Call:
        unet = _unet(scale, unet_weights, meter.device, ours=True).to(DTYPE).for_inference()
        autoencoder = _autoencoder(scale, weights, meter.device, ours=True)
        if compiled:
            unet.compile()
            autoencoder.decode = torch.compile(autoencoder.decode)
        diffusion = Diffusion(DiffusionConfig(prediction="v"))

        def call() -> Tensor:
            latents = sample_latents(
                unet, diffusion, Conditioning(text), Conditioning(empty), noise,
                guidance=7.5, sampler="dpmpp_2m", steps=scale.steps, spacing="trailing",
            )  # fmt: skip
            return decode_latents(autoencoder, latents).float() / 255

        return call

    place = partial(Place, "sample", size_px=size_px, batch=batch)
    tflop = 2 * scale.steps * unet_tflop(scale.unet, side, scale.context)
    for how in ways:
        meter.measure(place(who=OURS, how=how, tflop_per_image=tflop), partial(ours, compiled=how == "compiled"))
        if THEIRS in sides():
            make = partial(_pipeline, scale, unet_weights, weights, noise, text, empty, meter.device)
            meter.measure(place(who=THEIRS, how=how, tflop_per_image=tflop), partial(make, compiled=how == "compiled"))


def _pipeline(
    scale: Scale,
    unet_weights: dict[str, Tensor],
    weights: dict[str, Tensor],
    noise: Tensor,
    text: Tensor,
    empty: Tensor,
    device: str,
    *,
    compiled: bool,
) -> Call:
    """diffusers' StableDiffusionPipeline, given the text's states."""
    diffusers = _diffusers()
    unet = _unet(scale, unet_weights, device, ours=False).to(DTYPE).eval().requires_grad_(False)
    vae = _autoencoder(scale, weights, device, ours=False)
    if compiled:
        unet.compile()
        vae.decode = torch.compile(vae.decode)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae, None, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)

    def call() -> Tensor:
        images = pipeline(
            prompt_embeds=text,
            negative_prompt_embeds=empty,
            latents=noise.to(device, DTYPE),
            num_inference_steps=scale.steps,
            guidance_scale=7.5,
            output_type="np",
        ).images
        return torch.from_numpy(images)

    return call


class Step:
    """One optimizer step of a U-Net, with all that training does around it. Gives the loss."""

    def __init__(
        self, network: nn.Module, noised: Tensor, times: Tensor, context: Tensor, target: Tensor, *, compiled: bool
    ) -> None:
        self._network = network
        self._forward = torch.compile(network) if compiled else network
        self._inputs, self._target = (noised, times, context), target
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, fused=True)
        self._ema = Ema(network.named_parameters(), 0.9999)

    def __call__(self) -> Tensor:
        device = self._target.device.type
        with torch.autocast(device, DTYPE, enabled=device == "cuda"):
            output = self._forward(*self._inputs)
        loss = (output.float() - self._target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._ema.update(self._network.named_parameters())
        return loss.detach()


class Unwrapped(nn.Module):
    """diffusers' U-Net with our signature, and its output without a wrapper."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        output: Tensor = self.network(latents, timesteps, context, return_dict=False)[0]
        return output


def training_inputs(scale: Scale, size_px: int, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noised latents, times, text states, and the target."""
    random = torch.Generator().manual_seed(1)
    side = size_px // scale.autoencoder.downsampling
    shape = (batch, scale.unet.in_channels, side, side)
    noised, target = (torch.randn(shape, generator=random).to(device) for _ in range(2))
    times = torch.randint(1000, (batch,), generator=random).to(device)
    return noised, times, torch.randn(batch, *scale.context, generator=random).to(device), target


def unet_tflop(config: UNetConfig, side: int, context: tuple[int, int]) -> float:
    """10^12 operations of one forward pass of one sample."""
    with torch.device("meta"):
        network = UNet2DCondition(config)
        inputs = (torch.empty(1, config.in_channels, side, side), torch.empty(1), torch.empty(1, *context))
    return tflop_of(partial(network, *inputs))


def tflop_of(call: Callable[[], Any]) -> float:
    """10^12 operations of one call, a multiplication and an addition counted as two; in the backend that can be
    counted. Recomputation isn't counted."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops()) / 1e12


def sides() -> tuple[str, ...]:
    """diffusers only if it is installed."""
    return (OURS, THEIRS) if importlib.util.find_spec("diffusers") else (OURS,)


def _diffusers() -> Any:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def _weights(make: Callable[[], nn.Module], device: str) -> dict[str, Tensor]:
    """Initial weights on the CPU, drawn on the device, which is faster."""
    torch.manual_seed(0)
    with torch.device(device):
        network = make()
    return {name: value.cpu() for name, value in network.state_dict().items()}


def _unet(scale: Scale, weights: dict[str, Tensor], device: str, *, ours: bool) -> Any:
    with torch.device(device):  # initial weights, which are overwritten, are drawn faster there
        network: Any = (
            UNet2DCondition(scale.unet) if ours else _diffusers().UNet2DConditionModel.from_config(scale.unet.to_dict())
        )
    network.load_state_dict(weights)
    return network.to(memory_format=torch.channels_last)


def _autoencoder(scale: Scale, weights: dict[str, Tensor], device: str, *, ours: bool) -> Any:
    with torch.device(device):
        network: Any = (
            AutoencoderKL(scale.autoencoder)
            if ours
            else _diffusers().AutoencoderKL.from_config(scale.autoencoder.to_dict())
        )
    network.load_state_dict(weights)
    return network.to(DTYPE).to(memory_format=torch.channels_last).eval().requires_grad_(False)
