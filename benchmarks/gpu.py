"""What one GPU does with a full-size latent diffusion model, from torch (and numpy) and this package alone.

Cases, each with images a second and the share of the GPU's peak (MFU, of the operations that the model needs, counted
by torch's FlopCounterMode; recomputation isn't counted):

- `train`: the whole step of Stable Diffusion 2's U-Net at 256 and 512 pixels: forward, backward, gradient clipping,
  AdamW, EMA; bf16 autocast over float32 weights, compiled;
- `encode`: Stable Diffusion's VAE encoder at 256 and 512 pixels, bf16;
- `sample`: 20 steps with guidance and decoding, at 512 pixels, bf16.

Where diffusers is installed, it does the same beside it (eager, and compiled for `train`), with the same weights. Ends
in under 8 minutes on an H100.

    python benchmarks/gpu.py [--json FILE] [--device cpu --tiny]
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.conditioning import Conditioning
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.ema import Ema
from ldm.generate import decode_latents
from ldm.sampling import sample_latents
from ldm.shapes import SD2_UNET
from ldm.unet import UNet2DCondition, UNetConfig

PEAKS_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "L40S": 362.0, "L4": 121.0}
"""Dense bf16 with float32 sums, by the makers' data sheets."""
CONTEXT = (77, 1024)
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    unet: UNetConfig
    autoencoder: AutoencoderConfig
    context: tuple[int, int]
    train: tuple[tuple[int, int], ...]
    """(side of the image in pixels, batch)."""
    encode: tuple[tuple[int, int], ...]
    sample: tuple[int, int]
    steps: int
    rounds: int


FULL = Scale(SD2_UNET, AutoencoderConfig(), CONTEXT, ((256, 64), (512, 32)), ((256, 64), (512, 16)), (512, 8), 20, 10)
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
    2,
)


@dataclass(frozen=True)
class Figure:
    """One measurement."""

    case: str
    who: str
    size_px: int
    batch: int
    images_per_s: float
    step_s: float
    tflop_per_image: float
    mfu: float | None
    peak_memory_gib: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, eager: to see that it runs")
    parser.add_argument("--case", action="append", choices=["train", "encode", "sample"], help="only these")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    scale = TINY if options.tiny else FULL
    cases = {"train": train, "encode": encode, "sample": sample}
    figures: list[Figure] = []
    for name in options.case or cases:
        for figure in cases[name](scale, options.device, compiled=not options.tiny):
            figures.append(figure)
            print(line(figure), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(report(figures, options.device), indent=2) + "\n", encoding="utf-8")


def line(figure: Figure) -> str:
    mfu = "" if figure.mfu is None else f"  MFU {100 * figure.mfu:.1f} %"
    memory = "" if figure.peak_memory_gib is None else f"  {figure.peak_memory_gib:.1f} GiB"
    return (
        f"{figure.case:<7} {figure.who:<20} {figure.size_px} px, batch {figure.batch:<3}"
        f" {figure.images_per_s:9.1f} images/s  {figure.tflop_per_image:.3f} TFLOP/image{mfu}{memory}"
    )


def report(figures: list[Figure], device: str) -> dict[str, Any]:
    """What a reader needs to place the figures."""
    on_gpu = device.startswith("cuda")
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "peak_tflops": peak_tflops(device),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]},
        "figures": [dataclasses.asdict(figure) for figure in figures],
    }


# -- cases -------------------------------------------------------------------------------------------------------------


def train(scale: Scale, device: str, *, compiled: bool) -> Iterator[Figure]:
    """Images a second of the whole training step."""
    for size_px, batch in scale.train:
        inputs = training_inputs(scale, size_px, batch, device)
        torch.manual_seed(0)
        ours = UNet2DCondition(scale.unet).to(device)
        flop = 3 * flop_of(partial(ours, *inputs[:3])) / batch  # the backward pass costs twice the forward
        yield measured("train", "ldm", size_px, batch, flop, Step(ours, *inputs, compiled=compiled), scale, device)
        if theirs := diffusers_class("UNet2DConditionModel"):
            peer = theirs.from_config(scale.unet.to_dict()).to(device)
            peer.load_state_dict(ours.state_dict())
            peer = Sample(peer)
            del ours
            for name, fast in (("diffusers eager", False), ("diffusers compiled", True)):
                if compiled or not fast:
                    step = Step(peer, *inputs, compiled=fast)
                    yield measured("train", name, size_px, batch, flop, step, scale, device)


def encode(scale: Scale, device: str, *, compiled: bool) -> Iterator[Figure]:
    """Images a second of the first stage's encoder."""
    dtype = torch.bfloat16
    torch.manual_seed(0)
    ours = AutoencoderKL(scale.autoencoder).eval().requires_grad_(False)
    theirs = diffusers_class("AutoencoderKL")
    peer = None
    if theirs:
        peer = theirs.from_config(scale.autoencoder.to_dict())
        peer.load_state_dict(ours.state_dict())
        peer = peer.to(device, dtype).eval().requires_grad_(False)
    network = ours.to(device, dtype).for_inference()
    for size_px, batch in scale.encode:
        pixels = torch.randn(batch, 3, size_px, size_px, device=device, dtype=dtype)
        flop = flop_of(partial(network.encode, pixels)) / batch
        run = torch.compile(network.encode) if compiled else network.encode
        yield measured("encode", "ldm", size_px, batch, flop, Call(run, pixels), scale, device)
        if peer is not None:
            yield measured("encode", "diffusers eager", size_px, batch, flop, Call(peer.encode, pixels), scale, device)


def sample(scale: Scale, device: str, *, compiled: bool) -> Iterator[Figure]:
    """Images a second of sampling with guidance, decoding included; the text's states are given."""
    size_px, batch = scale.sample
    dtype = torch.bfloat16
    torch.manual_seed(0)
    unet = UNet2DCondition(scale.unet).eval().requires_grad_(False)
    autoencoder = AutoencoderKL(scale.autoencoder).eval().requires_grad_(False).to(device, dtype)
    diffusion = Diffusion(DiffusionConfig(prediction="v"))
    side = size_px // scale.autoencoder.downsampling
    noise = torch.randn(batch, scale.autoencoder.latent_channels, side, side)
    text, empty = (torch.randn(batch, *scale.context, device=device, dtype=dtype) for _ in range(2))
    unet, autoencoder = unet.to(device, dtype).for_inference(), autoencoder.for_inference()
    flop = 2 * scale.steps * flop_of(lambda: unet(noise[:1].to(device, dtype), torch.ones(1, device=device), text[:1]))
    if compiled:
        unet.compile()

    def run() -> Tensor:
        latents = sample_latents(
            unet, diffusion, Conditioning(text), Conditioning(empty), noise,
            guidance=7.5, sampler="dpmpp_2m", steps=scale.steps,
        )  # fmt: skip
        return decode_latents(autoencoder, latents)

    yield measured("sample", "ldm", size_px, batch, flop, run, scale, device)


class Step:
    """One optimizer step of a U-Net, with all that training does around it."""

    def __init__(
        self, network: nn.Module, noised: Tensor, times: Tensor, context: Tensor, target: Tensor, *, compiled: bool
    ) -> None:
        self._network = network
        self._forward = torch.compile(network) if compiled else network
        self._inputs, self._target = (noised, times, context), target
        fused = noised.device.type == "cuda"
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, fused=fused)
        self._ema = Ema(network.named_parameters(), 0.9999)

    def __call__(self) -> Tensor:
        device = self._target.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            output = self._forward(*self._inputs)
        loss = (output.float() - self._target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._ema.update(self._network.named_parameters())
        return loss


class Sample(nn.Module):
    """diffusers' U-Net with our signature, and its output without a wrapper."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        output: Tensor = self.network(latents, timesteps, context, return_dict=False)[0]
        return output


class Call:
    """A function with its argument, without gradients."""

    def __init__(self, function: Callable[[Tensor], Any], argument: Tensor) -> None:
        self._function, self._argument = function, argument

    @torch.no_grad()
    def __call__(self) -> Any:
        return self._function(self._argument)


def training_inputs(scale: Scale, size_px: int, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noised latents, times, text states, and the target."""
    random = torch.Generator().manual_seed(1)
    side = size_px // scale.autoencoder.downsampling
    shape = (batch, scale.unet.in_channels, side, side)
    noised, target = (torch.randn(shape, generator=random).to(device) for _ in range(2))
    times = torch.randint(1000, (batch,), generator=random).to(device)
    return noised, times, torch.randn(batch, *scale.context, generator=random).to(device), target


# -- measuring ---------------------------------------------------------------------------------------------------------


def measured(
    case: str, who: str, size_px: int, batch: int, flop: float, run: Callable[[], Any], scale: Scale, device: str
) -> Figure:
    """The median of several calls, after warming up."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3 if on_gpu else 1):
        run()
    times = []
    for _ in range(scale.rounds):
        with timed(times, on_gpu):
            run()
    step_s = statistics.median(times)
    peak = peak_tflops(device)
    mfu = None if peak is None else flop * batch / step_s / (peak * 1e12)
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return Figure(case, who, size_px, batch, batch / step_s, step_s, flop / 1e12, mfu, memory)


@contextmanager
def timed(times: list[float], on_gpu: bool) -> Iterator[None]:
    if on_gpu:
        torch.cuda.synchronize()
    started_s = time.perf_counter()
    yield
    if on_gpu:
        torch.cuda.synchronize()
    times.append(time.perf_counter() - started_s)


def flop_of(call: Callable[[], Any]) -> float:
    """Operations of one call, a multiplication and an addition counted as two; in the backend that can be counted."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def peak_tflops(device: str) -> float | None:
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS_TFLOPS.items() if part in name), None)


def diffusers_class(name: str) -> Any:
    """None if diffusers isn't installed."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    import diffusers

    return getattr(diffusers, name)


if __name__ == "__main__":
    main()
