"""What one GPU does with a full-size latent diffusion model, beside diffusers where that is installed.

Cases, each with images a second, memory, and the share of the GPU's peak (MFU, of the operations that the model needs,
counted by torch's FlopCounterMode) where the GPU's rate is known:

- `encode`: Stable Diffusion's VAE encoder at 256 and 512 pixels, bf16;
- `train`: the whole step of Stable Diffusion 2's U-Net at 256 and 512 pixels: forward, backward, gradient clipping,
  AdamW, EMA; bf16 autocast over float32 weights;
- `product`: such a step at 256 pixels, of a U-Net as wide, through the product's engine (DeepSpeed), and through its
  training step with its loader, beside the bare network;
- `sample`: 20 steps with guidance and decoding, at 512 pixels, bf16.

Both sides are in channels_last, first eager, then compiled, one after another, each alone on the device. Every figure
is printed as it is measured, and written to the file, so that a run that is cut keeps what it has. The last line is
JSON.

    python benchmarks/gpu.py [--quick] [--case NAME ...] [--json FILE] [--device cpu --tiny]
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cases.full_size import FULL, OURS, THEIRS, TINY, Scale, encode, sample, train
from cases.measure import Meter
from cases.peaks import device_name, peak_tflops
from cases.rows import last_line, processor, write_json

BARE, ENGINE, STEP = "bare", "Engine", "train_step"
PAIRS = {OURS: THEIRS, ENGINE: BARE, STEP: BARE}
"""Who is compared, and with whom."""


def product(meter: Meter, scale: Scale, ways: tuple[str, ...]) -> None:
    """Needs the whole package installed; imported when it is this case's turn."""
    from cases.product import product as run

    run(meter, scale, ways)


CASES: dict[str, Callable[[Meter, Scale, tuple[str, ...]], None]] = {
    "encode": encode,
    "train": train,
    "product": product,
    "sample": sample,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: to see that it runs")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, nothing is compiled")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only these")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: give --device cpu --tiny to see that it runs")

    def tell(meter: Meter, line: str) -> None:
        print(line, flush=True)
        write_json(options.json, report(meter))

    meter = Meter(options.device, rounds=3 if options.quick or options.tiny else 10, tell=tell)
    cases = options.case or list(CASES)
    for ways in (("eager",),) if options.quick else (("eager",), ("compiled",)):
        for name in cases:
            CASES[name](meter, TINY if options.tiny else FULL, ways)
    print(last_line("gpu", meter.rows(PAIRS)))


def report(meter: Meter) -> dict[str, Any]:
    """What a reader needs to place the figures."""
    name = device_name(meter.device)
    return {
        "date": datetime.date.today().isoformat(),
        "device": processor() if name == "cpu" else name,
        "peak_tflops": peak_tflops(name),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]},
        "figures": [figure.to_json() for figure in meter.figures],
        "failed": meter.failed,
        "rows": [row.to_json() for row in meter.rows(PAIRS)],
    }


if __name__ == "__main__":
    main()
