"""One training step of the U-Net, against diffusers' UNet2DConditionModel: forward, backward, fused AdamW.

Each side in the faster of float32 and bf16 autocast; on a CPU diffusers also with weights in either memory format, and
each compiled where asked for. On a GPU bf16 in channels_last, once both eager and once both compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from cases.compare import COMPILED, Call, Make, Result, Side, compare
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

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
CPU_AIM, CUDA_AIM, CUDA_AIM_COMPILED = 0.95, 1.3, 1.0


@dataclass(frozen=True)
class _Shape:
    name: str
    config: UNetConfig
    batch: int
    tokens: int
    rounds: int


def run(*, quick: bool, device: str, compiled: bool) -> list[Result]:
    """All shapes; on a CPU the demo's alone if `quick`."""
    demo = _Shape("demo shape", DEMO, 32, 24, 5 if quick else 41)
    half = "SD1 at half width"
    if not device.startswith("cuda"):
        shapes = [demo] if quick else [demo, _Shape(half, HALF_SD1, 2, 77, 11)]
        return [_on_cpu(shape, device, compiled=compiled) for shape in shapes]
    shapes = [demo, _Shape(half, HALF_SD1, 16, 77, 5 if quick else 31)]
    ways = (False, True) if compiled else (False,)
    return [_on_gpu(shape, device, compiled=way) for shape in shapes for way in ways]


def _on_cpu(shape: _Shape, device: str, *, compiled: bool) -> Result:
    step = _steps(shape, device)
    return compare(
        "unet step",
        _words(shape),
        Side(
            "ldm",
            {name: step(ours=True, setting=name) for name in PRECISIONS},
            (lambda name: step(ours=True, setting=name + COMPILED)) if compiled else None,
        ),
        Side(
            f"diffusers {diffusers.__version__}",
            {
                setting: step(ours=False, setting=setting)
                for setting in (f"{precision}, {form}" for precision in PRECISIONS for form in FORMATS)
            },
            (lambda name: step(ours=False, setting=name + COMPILED)) if compiled else None,
        ),
        device=device,
        rounds=shape.rounds,
        aim=CPU_AIM,
    )


def _on_gpu(shape: _Shape, device: str, *, compiled: bool) -> Result:
    step = _steps(shape, device)
    setting = "bfloat16" + (COMPILED if compiled else "")
    return compare(
        "unet step",
        _words(shape) + (", both compiled" if compiled else ""),
        Side("ldm", {setting: step(ours=True, setting=setting)}),
        Side(f"diffusers {diffusers.__version__}", {setting: step(ours=False, setting=setting)}),
        device=device,
        rounds=shape.rounds,
        aim=CUDA_AIM_COMPILED if compiled else CUDA_AIM,
    )


def _words(shape: _Shape) -> str:
    side = shape.config.sample_size
    return (
        f"{shape.name} {shape.config.block_out_channels}, {side}x{side} latents, batch {shape.batch},"
        f" {shape.tokens} tokens"
    )


def _steps(shape: _Shape, device: str) -> Callable[..., Make]:
    """What builds a side's step in a setting, of one set of weights and inputs."""
    config = shape.config
    torch.manual_seed(0)
    weights = diffusers.UNet2DConditionModel(**_keys(config)).state_dict()
    size = config.sample_size
    latents, noise = torch.randn(2, shape.batch, config.in_channels, size, size, device=device)
    times = torch.randint(0, 1000, (shape.batch,), device=device)
    context = torch.randn(shape.batch, shape.tokens, config.cross_attention_dim, device=device)
    target = noise[:, : config.out_channels]

    def of_theirs(network: Callable[..., Any]) -> Tensor:
        prediction: Tensor = network(latents, times, context, return_dict=False)[0]
        return prediction

    def of_ours(network: Callable[..., Any]) -> Tensor:
        prediction: Tensor = network(latents, times, context)
        return prediction

    def make(*, ours: bool, setting: str) -> Call:
        parts = setting.split(", ")
        network = UNet2DCondition(config) if ours else diffusers.UNet2DConditionModel(**_keys(config))
        network.load_state_dict(weights)
        form = next((FORMATS[part] for part in parts if part in FORMATS), torch.channels_last)
        network.to(device).to(memory_format=form)
        predict = of_ours if ours else of_theirs
        return _step(network, predict, target, PRECISIONS[parts[0]], compiled="compiled" in parts)

    return lambda **which: partial(make, **which)


def _step(
    network: nn.Module,
    predict: Callable[[Callable[..., Any]], Tensor],
    target: Tensor,
    dtype: torch.dtype,
    *,
    compiled: bool,
) -> Call:
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
