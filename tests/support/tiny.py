"""The quickstart made tiny, run as a person runs it: the `ldm` command in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

STAGES = (
    "acquire",
    "train.clip",
    "train.judge",
    "score",
    "select",
    "report",
    "train.autoencoder",
    "encode.base",
    "train.base",
    "evaluate.base",
    "release",
)
TINY_CLIP = {
    "network": "{image_tower: vit, patch_size: 16, image_width: 32, image_layers: 1, text_width: 32, text_layers: 1,"
    " embed_dim: 16, head_width: 16, context_length: 16}",
    "train.steps": 6,
    "train.max_minutes": "null",
    "train.global_batch_size": 16,
}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class TinyRecipe:
    """quickstart with 96 images, small networks and a few steps, in a folder of its own."""

    def __init__(self, folder: Path, port: int, store: str | None = None) -> None:
        self.folder = folder
        self.recipe = "quickstart"
        self.store = store or str(folder / "store")
        self.settings = {
            "store": self.store,
            "state_dir": str(folder / "state"),
            "source.port": port,
            "source.limit": 96,
            "source.fault_rate": 0.3,
            "acquire.fetch.allow_hosts": f'["127.0.0.1:{port}"]',
            "acquire.fetch.timeout_s": 3,
            "acquire.fetch.attempts": 2,
            "acquire.shard_size": 24,
            **{f"models.{name}.{key}": value for name in ("clip", "judge") for key, value in TINY_CLIP.items()},
            "select.where.2.value": '"."',  # any subject: 96 images are few
            "select.where.3.value": -1.0,  # any similarity: six steps make no CLIP
            "models.autoencoder.init": "scratch",
            "models.autoencoder.network.block_out_channels": "[8, 8, 8]",
            "models.base.network.cross_attention": "[false, true]",
            "models.autoencoder.train.steps": 12,
            "models.autoencoder.train.max_minutes": "null",
            "models.base.network.block_out_channels": "[32, 32]",
            "models.base.network.attention_head_dim": 2,
            "models.base.train.steps": 24,
            "models.base.train.max_minutes": "null",
            "models.base.sampling.steps": 3,
            "models.base.evaluate.images": 16,
            "models.base.evaluate.prompts": 8,
            "models.base.evaluate.batch_size": 8,
            # Each process costs seconds to start; several are tried where they are the point.
            "execution.ranks": 1,
            **{f"execution.{stage}_workers": 1 for stage in ("score", "encode", "evaluate")},
            "execution.checkpoint_every_steps": 4,
            "execution.sample_every_steps": 12,
            "execution.log_every_steps": 4,
        }

    def arguments(self, *more: str) -> list[str]:
        sets = [part for name, value in self.settings.items() for part in ("--set", f"{name}={value}")]
        return [*sets, *more]

    def start(self, *more: str, command: str = "run") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                "env",
                "--default-signal=INT",
                sys.executable,
                "-m",
                "pipelines.cli",
                command,
                self.recipe,
                *self.arguments(*more),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def ldm(self, *more: str, command: str = "run", timeout_s: float = 480) -> subprocess.CompletedProcess[str]:
        process = self.start(*more, command=command)
        out, _ = process.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(process.args, process.returncode, out, "")

    def status(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "pipelines.cli", "status", self.recipe, *self.arguments("--json")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=self.folder)
        nodes: dict[str, Any] = json.loads(done.stdout)["nodes"]
        return nodes
