"""Small published artifacts for the stages that read them: tars, ledgers, selections, networks; and places to run."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from asked import asked

from infra.storage import Store
from pipelines.artifacts import Artifact, Counts, digest, file_sha256
from pipelines.building import building
from pipelines.publishing import publish_unit
from pipelines.recipe import Execution, SelectSpec, Split, TextToImageModel
from pipelines.reporting import LogReport
from pipelines.select.stage import select

SIZE_PX = 16
WORDS = ("flag of France", "red heart", "grinning face", "sun", "cat", "keycap 7")


class Recorded(LogReport):
    """A report that remembers."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.steps: list[tuple[int, int, str, str]] = []
        self.figures: dict[str, bytes] = {}
        self.notes: list[str] = []

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        self.values |= values

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        self.steps.append((done, total, unit, note))

    def figure(self, name: str, png: bytes) -> None:
        self.figures[name] = png

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def report() -> Recorded:
    return Recorded()


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    from infra.cluster import ClusterSpec, cluster

    with cluster(ClusterSpec(num_cpus=2, object_store_bytes=80 * 2**20)):
        yield


class _PoolOfOne:
    """`pipelines.actors.Pool` with its one worker in this process."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def call(self, method: str, *arguments: object) -> Any:
        return getattr(self._worker, method)(*arguments)

    def map(self, method: str, items: Iterable[Any]) -> Iterator[Any]:
        return map(getattr(self._worker, method), items)


@functools.cache
def extractor_once(name: str, device: Any = "cpu") -> Any:
    from ldm.features import load_extractor

    return load_extractor(name, device)


@functools.cache
def text_encoder_once(*arguments: Any) -> Any:
    from ldm.conditioning.text import load_text_encoder

    return load_text_encoder(*arguments)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages work in this process: starting actors takes longer than all that they do here. So does loading the same
    networks again and again: those that nothing changes are loaded once."""

    @contextlib.contextmanager
    def pool(worker: Any, job: object, *, workers: int, device: str) -> Iterator[_PoolOfOne]:
        yield _PoolOfOne(worker(job, device, 1))

    monkeypatch.setattr("pipelines.actors.actor_pool", pool)
    monkeypatch.setattr("pipelines.score.features.load_extractor", extractor_once)
    monkeypatch.setattr("pipelines.encode.worker.load_extractor", extractor_once)
    monkeypatch.setattr("pipelines.encode.worker.load_text_encoder", text_encoder_once)


def picture(number: int, side: int = SIZE_PX) -> np.ndarray:
    """RGB: a disc on a ground, different for each number."""
    random = np.random.default_rng(number)
    pixels = np.full((side, side + number % 3, 3), random.integers(0, 256, 3), np.uint8)
    centre = (int(random.integers(4, 12)), int(random.integers(4, 12)))
    return cv2.circle(pixels, centre, side // 4, tuple(int(c) for c in random.integers(0, 256, 3)), -1)


def shard_files(shard: int, numbers: Sequence[int], captions: Mapping[int, str]) -> dict[str, bytes]:
    """A tar and its ledger, in which every fourth picture could not be had. Files come in no particular order."""
    images = {
        number: cv2.imencode(".png", picture(number)[..., ::-1])[1].tobytes() for number in numbers if number % 4 != 3
    }
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for number, png in reversed(images.items()):
            for suffix, data in ((".json", b"{}"), (".png", png), (".txt", captions[number].encode())):
                member = tarfile.TarInfo(f"{number:09d}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    ledger = {
        "uid": [f"{number:032x}" for number in numbers],
        "key": [f"{number:09d}" for number in numbers],
        "caption": [captions[number] for number in numbers],
        "outcome": ["kept" if number in images else "failed" for number in numbers],
        "sha256": [digest(number) for number in numbers],
        "stored_sha256": [
            hashlib.sha256(images[number]).hexdigest() if number in images else None for number in numbers
        ],
        "licence": ["Apache-2.0" if number % 2 else "CC-BY-4.0" for number in numbers],
        "original_width": pa.array([64 + number for number in numbers], pa.int32()),
        "original_height": pa.array([64] * len(numbers), pa.int32()),
    }
    parquet = io.BytesIO()
    pq.write_table(pa.table(ledger), parquet)
    return {f"{shard:05d}.tar": sink.getvalue(), f"{shard:05d}.parquet": parquet.getvalue()}


class Published:
    """Publishes artifacts into one store, as the stages would."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.folder = folder

    def acquire(
        self, shards: Sequence[int] = (12, 12, 8), captions: Mapping[int, str] | None = None, spoil: str = ""
    ) -> Artifact:
        """Shards of so many URLs. `spoil` is the key of an image that is stored as rubbish."""
        texts = {number: f"{WORDS[number % 6]}, {number} noto style" for number in range(sum(shards))} | (
            captions or {}
        )
        with building(self.store, "acquire", asked({"source": {"kind": "gallery"}}), {}, {}, 1) as build:
            units, first = [], 0
            for shard, size in enumerate(shards):
                files: dict[str, Any] = shard_files(shard, range(first, first + size), texts)
                if spoil:
                    files = {name: _spoiled(data, spoil) for name, data in files.items()}
                first += size
                kept = sum(number % 4 != 3 for number in range(first - size, first))
                counts = Counts(size, kept, {}, {"timeout": size - kept})
                key = build.unit_key({"files": {name: digest(data.hex()) for name, data in files.items()}})
                units.append(publish_unit(self.store, "acquire", key, files, counts, {"shard": f"{shard:05d}"}))
            return build.publish(units)

    def select(self, acquired: Artifact, **spec: Any) -> Artifact:
        rules = SelectSpec(**({"split": Split(held_out=0.25)} | spec))
        return select(rules, {"acquire": acquired}, self.store, Recorded(), Execution())

    def autoencoder(self, seed: int = 0, change: Callable[[Any], None] | None = None) -> Artifact:
        """A random AutoencoderKL, f4z2."""
        import torch

        from ldm.autoencoder import AutoencoderConfig, AutoencoderKL

        torch.manual_seed(seed)
        config = AutoencoderConfig(
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            latent_channels=2,
            norm_num_groups=4,
            mid_block_add_attention=False,
            scaling_factor=0.7,
            sample_size=SIZE_PX,
        )
        return self._network("train.autoencoder", "vae", AutoencoderKL(config), change)

    def unet(
        self,
        inputs: Mapping[str, Artifact] | None = None,
        seed: int = 0,
        change: Callable[[Any], None] | None = None,
    ) -> Artifact:
        """A random U-Net for the latents of `autoencoder`, as `train.base`, made from `inputs`."""
        import torch

        from ldm.unet import UNet2DCondition, UNetConfig

        torch.manual_seed(seed)
        config = UNetConfig(
            in_channels=2,
            out_channels=2,
            sample_size=SIZE_PX // 4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=384,
            use_linear_projection=True,
            norm_num_groups=4,
        )
        return self._network("train.base", "unet", UNet2DCondition(config), change, inputs)

    def _network(
        self,
        node: str,
        name: str,
        network: Any,
        change: Callable[[Any], None] | None,
        inputs: Mapping[str, Artifact] | None = None,
    ) -> Artifact:
        from ldm.interchange import save_network

        if change is not None:
            change(network)
        folder = self.folder / node / str(len(list(self.folder.glob("*/*"))))
        save_network(network, folder)
        files: dict[str, Path | bytes] = {f"{name}/{path.name}": path for path in folder.iterdir()}
        files["training.json"] = b'{"steps": 12}'
        key = digest({path.name: file_sha256(path) for path in folder.iterdir()})
        with building(self.store, node, asked({"weights": key}), inputs or {}, {}, 1) as build:
            unit = publish_unit(self.store, node, key, files, Counts(20, 20), {"steps": 12})
            return build.publish([unit], info={"steps": 12})


def _spoiled(data: bytes, key: str) -> bytes:
    """The tar with the image `key` overwritten; other files as they are."""
    at = data.find(f"{key}.png".encode())
    return data if at < 0 else data[: at + 512] + b"\0" * 16 + data[at + 528 :]


@pytest.fixture
def published(store: Store, tmp_path: Path) -> Published:
    return Published(store, tmp_path / "networks")


@pytest.fixture
def model() -> TextToImageModel:
    """Settings that fit the networks of `published`."""
    return TextToImageModel.model_validate_json(
        """{
        "kind": "text_to_image", "first_stage": "autoencoder",
        "text": {"encoder": "minilm", "tokens": 12},
        "encode": {"batch_size": 5},
        "network": {"block_out_channels": [8, 16], "layers_per_block": 1, "cross_attention": [false, true]},
        "train": {"steps": 12, "global_batch_size": 8},
        "sampling": {"prompts": ["flag of France", "red heart"], "steps": 3}
        }"""
    )
