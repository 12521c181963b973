"""One training step of the U-Net, against diffusers' UNet2DConditionModel: forward, backward, AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from cases.compare import Result, compare
from torch import Tensor, nn

from ldm.unet import UNet2DCondition, UNetConfig

DEMO = UNetConfig(
    sample_size=8,
    in_channels=8,
    out_channels=8,
    block_out_channels=(96, 128),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=384,
)
"""The network of configs/quickstart.yaml."""

HALF_SD1 = UNetConfig(sample_size=32, block_out_channels=(160, 320, 640, 640))

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Of the loss and of a gradient: in bf16, two orders of the same operations differ by rounding."""


@dataclass(frozen=True)
class _Setting:
    name: str
    config: UNetConfig
    batch: int
    tokens: int
    rounds: int


def run(quick: bool, device: str) -> list[Result]:
    """All cases of the U-Net; on a CPU the demo's alone if `quick`. On a GPU also both compiled."""
    gpu = device.startswith("cuda")
    settings = [_Setting("demo shape", DEMO, 32, 24, 5 if quick else 41)]
    if gpu:
        settings.append(_Setting("SD1 at half width", HALF_SD1, 16, 77, 5 if quick else 31))
    elif not quick:
        settings.append(_Setting("SD1 at half width", HALF_SD1, 2, 77, 11))
    dtypes = (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16)
    return [
        _case(setting, dtype, device, compiled=compiled)
        for setting in settings
        for dtype in dtypes
        for compiled in ((False, True) if gpu else (False,))
    ]


def _case(setting: _Setting, dtype: torch.dtype, device: str, *, compiled: bool) -> Result:
    config = setting.config
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**_keys(config)).to(device)
    ours = UNet2DCondition(config).to(device)
    ours.load_state_dict(theirs.state_dict())
    ours.to(memory_format=torch.channels_last)
    side = config.sample_size
    latents, noise = torch.randn(2, setting.batch, config.in_channels, side, side, device=device)
    times = torch.randint(0, 1000, (setting.batch,), device=device)
    context = torch.randn(setting.batch, setting.tokens, config.cross_attention_dim, device=device)

    def of_theirs(network: Callable[..., Any]) -> Tensor:
        prediction: Tensor = network(latents, times, context, return_dict=False)[0]
        return prediction

    def of_ours(network: Callable[..., Any]) -> Tensor:
        prediction: Tensor = network(latents, times, context)
        return prediction

    target = noise[:, : config.out_channels]
    precision = "bf16 autocast" if dtype == torch.bfloat16 else "float32"
    return compare(
        "unet step",
        f"{setting.name} {config.block_out_channels}, {side}x{side} latents, batch {setting.batch}, "
        f"{setting.tokens} tokens, {precision}{', both compiled' if compiled else ''}",
        device=device,
        peer=f"diffusers {diffusers.__version__}{' compiled' if compiled else ''}",
        ours=_step(ours, of_ours, target, dtype, compiled=compiled),
        theirs=_step(theirs, of_theirs, target, dtype, compiled=compiled),
        rounds=setting.rounds,
        tolerance=TOLERANCES[dtype],
        aim=_aim(device, compiled=compiled) if dtype == torch.bfloat16 else None,
    )


def _step(
    network: nn.Module,
    predict: Callable[[Callable[..., Any]], Tensor],
    target: Tensor,
    dtype: torch.dtype,
    *,
    compiled: bool,
) -> Callable[[], Tensor]:
    """A step that returns the loss and the first convolution's gradient, which has passed through every block."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(network) if compiled else network

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(target.device.type, dtype, enabled=dtype != torch.float32):
            prediction = predict(forward)
        loss = (prediction.float() - target).square().mean()
        loss.backward()
        optimizer.step()
        gradient = network.get_parameter("conv_in.weight").grad
        assert gradient is not None
        largest = gradient.abs().max()
        return torch.cat([torch.stack([loss.detach(), largest]), gradient.flatten() / largest])

    return step


def _keys(config: UNetConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if not key.startswith("_")}


def _aim(device: str, *, compiled: bool) -> float:
    if compiled:
        return 1.15
    return 1.5 if device.startswith("cuda") else 1.3
