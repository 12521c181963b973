"""Small artifacts in the stages' formats: real tars, real Parquet, real Arrow files."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from asked import asked

from infra.storage import Store
from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.conditioning.text import load_text_encoder
from ldm.interchange import save_network
from pipelines.artifacts import Artifact, Counts, Unit, digest, find_unit
from pipelines.building import building
from pipelines.dataset.cache import CacheRows, CacheSchema, null_file, write_cache
from pipelines.publishing import publish_unit
from pipelines.recipe import AutoencoderModel, Execution, TextToImageModel
from pipelines.train.job import TrainJob

SIZE_PX = 16
BINDING = {
    "moments_shape": (8, 4, 4),
    "text_shape": (3, 6),
    "autoencoder_sha256": "aaaa",
    "text_encoder": "minilm@1",
    "text_form": "padded",
    "transform": "center_square 16",
}
TRAIN = {
    "steps": 6,
    "global_batch_size": 8,
    "lanes": 4,
    "ema_decay": 0.9,
    "precision": "fp32",
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "schedule": "cosine"},
}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def picture(number: int, size_px: int = SIZE_PX) -> np.ndarray:
    """A disc on a coloured ground, different for each number."""
    random = np.random.default_rng(number)
    pixels = np.full((size_px, size_px, 3), random.integers(0, 256, 3), np.uint8)
    centre = tuple(int(c) for c in random.integers(size_px // 4, 3 * size_px // 4, 2))
    colour = tuple(int(c) for c in random.integers(0, 256, 3))
    return cv2.circle(pixels, centre, int(size_px // 4), colour, -1)


def publish(store: Store, node: str, units, inputs=None, info=None, spec=None) -> Artifact:
    """`units`: (files, counts, info) of each."""
    with building(store, node, asked(spec or {}), inputs or {}, {}, 1) as build:
        done = [
            publish_unit(
                store,
                node,
                build.unit_key({"unit": i, "files": {name: digest(data.hex()) for name, data in files.items()}}),
                files,
                counts,
                unit_info,
            )
            for i, (files, counts, unit_info) in enumerate(units)
        ]
        return build.publish(done, info=info)


def parquet(columns: dict) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


@pytest.fixture
def pictures(store) -> Callable[..., tuple[Artifact, Artifact]]:
    """Artifacts of `acquire` and `select`: `num` PNG images in shards of 5, each fifth one held out."""

    def make(num: int = 24, size_px: int = SIZE_PX) -> tuple[Artifact, Artifact]:
        selected: dict[str, list] = {"uid": [], "shard": [], "key": [], "split": []}
        units = []
        for shard, first in enumerate(range(0, num, 5)):
            numbers = range(first, min(first + 5, num))
            tar_bytes = io.BytesIO()
            with tarfile.open(fileobj=tar_bytes, mode="w") as tar:
                for number in numbers:
                    key = f"{shard:05d}{number - first:04d}"
                    png = cv2.imencode(".png", picture(number, size_px)[..., ::-1])[1].tobytes()
                    for suffix, data in ((".json", b"{}"), (".png", png), (".txt", b"a disc")):
                        member = tarfile.TarInfo(key + suffix)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
                    selected["uid"].append(f"{number:032x}")
                    selected["shard"].append(f"{shard:05d}")
                    selected["key"].append(key)
                    selected["split"].append("held_out" if number % 5 == 4 else "train")
            counts = Counts(len(numbers), len(numbers))
            files = {f"{shard:05d}.tar": tar_bytes.getvalue(), f"{shard:05d}.parquet": parquet({"key": []})}
            units.append((files, counts, {"shard": f"{shard:05d}"}))
        acquire = publish(store, "acquire", units)
        select = publish(
            store,
            "select",
            [({"selection.parquet": parquet(selected), "dropped.parquet": parquet({"uid": []})}, Counts(num, num), {})],
            {"acquire": acquire},
        )
        return acquire, select

    return make


def publish_latents(
    store: Store, folder: Path, num: int = 24, inputs=None, content: str = "", **binding: object
) -> Artifact:
    """An artifact of `encode.base`: shards of 5 rows, each fifth one held out, and the empty prompt's row.

    `content` is what it is known by, from which the order of samples follows; by default, what it is bound to.
    """
    content = content or digest(binding)
    random = np.random.default_rng(0)
    schema = CacheSchema(**(BINDING | binding))
    units = []
    for shard, first in enumerate(range(0, num, 5)):
        numbers = list(range(first, min(first + 5, num)))
        moments = random.normal(size=(len(numbers), *schema.moments_shape))
        moments[:, schema.moments_shape[0] // 2 :] -= 3  # log-variance
        splits = ["held_out" if number % 5 == 4 else "train" for number in numbers]
        path = folder / "cache.arrow"
        with write_cache(path, schema) as writer:
            writer.append(
                CacheRows(
                    uid=[f"{number:032x}" for number in numbers],
                    key=[f"{number:09d}" for number in numbers],
                    split=splits,
                    caption=[f"disc {number}" for number in numbers],
                    moments=moments.astype(np.float16),
                    text=random.normal(size=(len(numbers), *schema.text_shape)).astype(np.float16),
                    original_width=[16] * len(numbers),
                    original_height=[16] * len(numbers),
                )
            )
        info = {"shard": f"{shard:05d}", "train": splits.count("train"), "held_out": splits.count("held_out")}
        info["content"] = digest([num, shard, content])
        units.append(({"cache.arrow": path.read_bytes()}, Counts(len(numbers), len(numbers)), info))
    null = null_file(schema, np.full(schema.text_shape, 0.5, np.float16))
    units.append(({"null.arrow": null}, Counts(0, 0), {"null": True, "content": content}))
    return publish(store, "encode.base", units, inputs, info=schema.binding())


@pytest.fixture
def latents(store, tmp_path) -> Callable[..., Artifact]:
    return partial(publish_latents, store, tmp_path)


@pytest.fixture(scope="session")
def text_encoder_folder(tmp_path_factory) -> str:
    """A transformers encoder of 12 dimensions with random weights, as a recipe names it: by its folder."""
    import transformers

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "disc", "red", "blue"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def autoencoder_model() -> AutoencoderModel:
    return AutoencoderModel.model_validate(
        {
            "kind": "autoencoder",
            "network": {
                "block_out_channels": (8, 8, 8),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "mid_block_add_attention": False,
            },
            "train": TRAIN,
        },
        strict=False,
    )


@pytest.fixture(scope="session")
def base_model(text_encoder_folder) -> TextToImageModel:
    return TextToImageModel.model_validate(
        {
            "kind": "text_to_image",
            "first_stage": "autoencoder",
            "text": {"encoder": text_encoder_folder, "tokens": 6},
            "network": {
                "block_out_channels": (8, 16),
                "layers_per_block": 1,
                "cross_attention": (False, True),
                "attention_head_dim": 2,
                "norm_num_groups": 4,
            },
            "diffusion": {"timestep_sampling": "logit_normal", "caption_dropout": 0.25},
            "train": TRAIN,
            "sampling": {"prompts": ("red disc", "blue disc"), "steps": 2},
        },
        strict=False,
    )


@pytest.fixture
def autoencoder_job(store, pictures, autoencoder_model) -> TrainJob:
    acquire, select = pictures()
    inputs = {"acquire": acquire, "select": select}
    return TrainJob("autoencoder", autoencoder_model, inputs, store, Execution(device="cpu"), "unit0", "line")


@pytest.fixture
def base_job(store, base_model, tmp_path) -> TrainJob:
    return _make_base_job(store, base_model, tmp_path)


@pytest.fixture(scope="module")
def calm_base_job(base_model, tmp_path_factory) -> TrainJob:
    """The same for all tests of a module, in a store of its own."""
    folder = tmp_path_factory.mktemp("calm")
    return _make_base_job(Store(folder / "store"), base_model, folder)


@pytest.fixture(scope="session")
def make_base_job():
    return _make_base_job


def _make_base_job(store: Store, model: TextToImageModel, folder: Path, change=None) -> TrainJob:
    """With a cache of random latents that is bound to a random first stage and to the recipe's text encoder.

    `change` is done to the first stage.
    """
    config = AutoencoderConfig(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16)
    torch.manual_seed(1)
    network = AutoencoderKL(config)
    if change is not None:
        change(network)
    save_network(network, folder / "vae")
    files = {f"vae/{path.name}": path.read_bytes() for path in (folder / "vae").iterdir()}
    first_stage = publish(store, "train.autoencoder", [(files, Counts(20, 20), {})])
    weights = next(entry for entry in first_stage.units[0].files if entry.name.endswith(".safetensors"))
    encoder = load_text_encoder(model.text.encoder, 6)
    binding = {"autoencoder_sha256": weights.sha256, "text_encoder": encoder.identity, "text_shape": (6, 12)}
    inputs = {
        "encode.base": publish_latents(store, folder, content="latents", **binding),
        "train.autoencoder": first_stage,
    }
    return TrainJob("base", model, inputs, store, Execution(device="cpu"), "unit0", "line")


@dataclass
class Outcome:
    """What ranks did."""

    return_codes: list[int]
    log: str
    events: list
    unit: Unit | None
    found: list[Path]

    def metrics(self, name: str) -> dict[int, float]:
        found = [event.arguments for event in self.events if event.method == "metrics"]
        return {step: values[name] for values, step in found if name in values and step is not None}

    def progress(self, unit: str) -> list[tuple[int, int]]:
        found = [event.arguments for event in self.events if event.method == "progress"]
        return [(done, total) for done, total, own, _ in found if own == unit]

    @property
    def notes(self) -> list[str]:
        return [event.arguments[0] for event in self.events if event.method == "note"]


@pytest.fixture(scope="session")
def ranks_server(tmp_path_factory) -> Iterator[subprocess.Popen]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, str(Path(__file__).with_name("rank_worker.py"))]
    with (tmp_path_factory.mktemp("ranks") / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
    yield process
    process.stdin.close()
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture(scope="session")
def train(tmp_path_factory, ranks_server) -> Callable[..., Outcome]:
    """Runs the ranks of a job to their end; see `rank_worker`."""

    def run(job: TrainJob, ranks: int = 1, kill_at: int | None = None, do: str = "train") -> Outcome:
        folder = tmp_path_factory.mktemp("run")
        execution = job.execution.model_copy(update={"ranks": ranks})
        (folder / "job").write_bytes(pickle.dumps(replace(job, execution=execution)))
        paths = {name: str(folder / name) for name in ("job", "rendezvous", "out")}
        requests = [
            {**paths, "do": do, "log": str(folder / f"log{rank}"), "kill_at": kill_at if rank == ranks - 1 else None}
            for rank in range(ranks)
        ]
        ranks_server.stdin.write(json.dumps(requests).encode() + b"\n")
        ranks_server.stdin.flush()
        codes = json.loads(ranks_server.stdout.readline())
        log = "".join((folder / f"log{rank}").read_text() for rank in range(ranks))
        events = pickle.loads((folder / "out").read_bytes()) if (folder / "out").exists() else []
        unit = find_unit(job.store, job.node, job.unit_key)
        return Outcome(codes, log, events, unit, [folder / f"out{rank}" for rank in range(ranks)])

    return run
