"""One training rank for `test_engine.py`, in a process of its own: DeepSpeed serves one kind of device in each.

Run as `engine_worker.py DEVICE FOLDER`; writes every run's outcome to FOLDER/outcomes.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from infra.engine import Engine, EngineSpec
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.ema import Ema, decay_at
from ldm.unet import UNet2DCondition, UNetConfig

BATCH = 4
STEPS = 6
SAVED_AT = 3
LEARNING_RATE = 1e-3
EMA_DECAY = 0.9
MAX_GRAD_NORM = 0.5
BETAS, WEIGHT_DECAY = (0.9, 0.99), 0.01
EPS = 1e-4
"""Far above the usual: gradients near zero, whose sign rounding decides, would move weights by a whole step."""
HIDDEN = "mid_block.resnets.0.conv1"
"""A layer whose output tells what the network computes in."""

EVERY_STEP = ("losses", "grad_norms", "decays", "weights", "ema")
"""What of an outcome is a list of one entry a step."""

Device = Literal["cpu", "cuda"]
DIFFUSION = Diffusion(DiffusionConfig("flow"))


def network(seed: int = 0) -> UNet2DCondition:
    torch.manual_seed(seed)
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=16,
        norm_num_groups=8,
    )
    return UNet2DCondition(config)


def batch(step: int, device: Device) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The network's inputs of one step, and its target: the same numbers on any device."""
    generator = torch.Generator().manual_seed(step)
    x0, noise = (torch.randn(BATCH, 4, 8, 8, generator=generator) for _ in range(2))
    times = DIFFUSION.timesteps_from_uniform(torch.rand(BATCH, generator=generator))
    context = torch.randn(BATCH, 5, 16, generator=generator)
    inputs = (DIFFUSION.noised(x0, noise, times), DIFFUSION.model_time(times), context)
    latents, model_times, states = (part.to(device) for part in inputs)
    return (latents, model_times, states), DIFFUSION.target(x0, noise, times).to(device)


def spec(device: Device, stage: Literal[1, 2, 3], precision: Literal["fp32", "bf16"]) -> EngineSpec:
    return EngineSpec(
        zero_stage=stage,
        micro_batch_size=BATCH,
        gradient_accumulation_steps=1,
        precision=precision,
        learning_rate=LEARNING_RATE,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        ema_decay=EMA_DECAY,
        device=device,
    )


def train(settings: EngineSpec, *, seed: int = 0, save: Path | None = None, load: Path | None = None) -> dict[str, Any]:
    """An outcome: what the steps gave, from the first or from a checkpoint on. `save` is where one is made halfway."""
    outcome: dict[str, Any] = {key: [] for key in EVERY_STEP}
    engine = Engine.build(network(seed), settings)
    outcome["device"] = engine.device.type
    engine.module.get_submodule(HIDDEN).register_forward_hook(
        lambda module, inputs, output: outcome.update(hidden=str(output.dtype))
    )
    first = engine.load(load)["step"] if load else 0
    for step in range(first, STEPS):
        inputs, target = batch(step, settings.device)
        loss = (engine(*inputs).float() - target).square().mean()
        engine.backward(loss)
        decay = decay_at(step, EMA_DECAY)
        info = engine.step(LEARNING_RATE, decay)
        assert info.applied
        outcome["decays"].append(decay)
        outcome["losses"].append(loss.item())
        outcome["grad_norms"].append(info.grad_norm)
        outcome["weights"].append(engine.gather("weights"))
        outcome["ema"].append(engine.gather("ema"))
        if save is not None and step + 1 == SAVED_AT:
            engine.save(save, {"step": step + 1})
    engine.close()
    return outcome


def train_plainly(device: Device) -> dict[str, Any]:
    """What `train` should come to, with torch and `ldm.ema` alone."""
    outcome: dict[str, Any] = {key: [] for key in EVERY_STEP}
    unet = network().to(device)
    ema = Ema(unet.named_parameters(), EMA_DECAY)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    for step in range(STEPS):
        inputs, target = batch(step, device)
        loss = (unet(*inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        ema.update(unet.named_parameters())
        outcome["losses"].append(loss.item())
        outcome["grad_norms"].append(norm.item())
        outcome["weights"].append({name: value.detach().cpu().clone() for name, value in unet.named_parameters()})
        outcome["ema"].append({name: value.cpu().clone() for name, value in ema.averages.items()})
    return outcome


def outcomes(device: Device, folder: Path) -> dict[str, dict[str, Any]]:
    """Every run's, by its name."""
    found = {"plain": train_plainly(device), "plain on the CPU": train_plainly("cpu")}
    for stage in (1, 2, 3):
        for precision in ("fp32", "bf16"):
            settings, name = spec(device, stage, precision), f"stage {stage}, {precision}"
            found[name] = train(settings, save=folder / name)
            found[f"{name}, resumed"] = train(settings, seed=1, load=folder / name)
    return found


def main() -> None:
    device, folder = sys.argv[1], Path(sys.argv[2])
    assert device in ("cpu", "cuda")
    os.environ["LOCAL_RANK"] = "0"
    torch.backends.cudnn.allow_tf32 = False
    # Which of its kernels a GPU takes is its own choice otherwise, and some sum in no fixed order.
    torch.use_deterministic_algorithms(True, warn_only=True)
    rendezvous = f"file://{folder / 'rendezvous'}"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=rendezvous, rank=0, world_size=1)
    torch.save(outcomes(device, folder), folder / "outcomes.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
