"""The model library beside its peers: diffusers (U-Net, VAE, sampling) and torch-fidelity (Frechet distance).

Each case runs both sides in one process, on the same weights and inputs, compares what comes out, chooses the fastest
setting of each side (precision, memory format, compiled or not), and lets the two take turns; the ratio is of medians.
Threads are torch's own (OMP_NUM_THREADS). The last line is JSON.

    python benchmarks/model.py [--quick] [--no-compile] [--device cpu|cuda] [--case NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from cases import frechet, sample, unet, vae
from cases.compare import Result
from cases.rows import last_line, processor, write_json

CASES: dict[str, Callable[..., list[Result]]] = {
    "unet": unet.run,
    "vae": vae.run,
    "sample": sample.run,
    "frechet": frechet.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller shapes, nothing is compiled")
    parser.add_argument("--no-compile", action="store_true", help="don't try torch.compile: minutes for each shape")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="only these")
    parser.add_argument("--json", type=Path, help="write the results there, in full")
    options = parser.parse_args()
    compiled = not (options.quick or options.no_compile)
    results: list[Result] = []
    for name in options.case or CASES:
        for result in CASES[name](quick=options.quick, device=options.device, compiled=compiled):
            print(line(result), flush=True)
            results.append(result)
            write_json(options.json, report(results))
    print(last_line("model", [result.row for result in results]))


def line(result: Result) -> str:
    aim = "" if result.aim is None else f" (aim {result.aim:.2f})"
    return (
        f"{result.case:<10} {result.shape}\n"
        f"    ldm {1e3 * result.ours_s:.1f} ms ({result.ours_setting}),"
        f" {result.peer} {1e3 * result.peer_s:.1f} ms ({result.peer_setting}):"
        f" {result.row.ratio:.2f} times as fast{aim}, difference {result.difference:.1e}"
    )


def report(results: list[Result]) -> dict[str, Any]:
    """What a reader needs to place the figures."""
    versions = {name: metadata.version(name) for name in ("torch", "diffusers", "torch-fidelity", "numpy")}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions | {"python": platform.python_version()},
        "results": [result.to_json() for result in results],
    }


if __name__ == "__main__":
    main()
