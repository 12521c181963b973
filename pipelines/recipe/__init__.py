"""The recipe: everything that a run is asked for, as strict models with a docstring per field.

Each block is named after the stage or the model it configures. `execution`, `store` and `state_dir` say how and where,
never what: they are left out of every key. A block says what each of its fields may be; whether they go together,
`references` and `checks` say. Reading YAML and reporting its errors is `file`'s matter.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from pipelines.recipe.block import MANNER, Block, Count, Name
from pipelines.recipe.data import (
    AcquireSpec,
    Fetch,
    FolderSource,
    GallerySource,
    ImageFormat,
    NearDuplicates,
    PairFilter,
    Predicate,
    ScoreSpec,
    SelectSpec,
    Source,
    Split,
    UrlsSource,
)
from pipelines.recipe.models import (
    AutoencoderLoss,
    AutoencoderModel,
    AutoencoderNetwork,
    ClipModel,
    ClipNetwork,
    DiffusionSpec,
    EncodeSpec,
    EvaluateSpec,
    Model,
    ModelBlock,
    Optimizer,
    ReleaseSpec,
    Sampling,
    TextEncoder,
    TextToImageModel,
    TrainSpec,
    UNetNetwork,
)

__all__ = [
    "AcquireSpec",
    "AutoencoderLoss",
    "AutoencoderModel",
    "AutoencoderNetwork",
    "Block",
    "ClipModel",
    "ClipNetwork",
    "DiffusionSpec",
    "EncodeSpec",
    "EvaluateSpec",
    "Execution",
    "Fetch",
    "FolderSource",
    "GallerySource",
    "ImageFormat",
    "Model",
    "ModelBlock",
    "NearDuplicates",
    "Optimizer",
    "PairFilter",
    "Predicate",
    "Recipe",
    "ReleaseSpec",
    "Sampling",
    "ScoreSpec",
    "SelectSpec",
    "Source",
    "Split",
    "TextEncoder",
    "TextToImageModel",
    "TrainSpec",
    "UNetNetwork",
    "UrlsSource",
]

NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]*")


class Execution(Block):
    """How a recipe is run. Left out of every key, recorded in every manifest: changing it makes nothing anew."""

    cluster: Name = "local"
    """The Ray cluster to work on: "local" starts one on this machine, "auto" joins the one this machine belongs to,
    "host:port" or "ray://host:port" joins another."""
    cpus: Count | None = None
    """CPUs of a local cluster. null: those of the machine."""
    ranks: Count = 1
    """Training processes; ranks x micro-batch must divide the global batch."""
    zero_stage: Literal[1, 2, 3] = 1
    """What DeepSpeed's ZeRO shards over the ranks. 1: the optimizer's state; 2: gradients too; 3: weights too. The
    lowest that fits is the fastest."""
    offload_optimizer: bool = False
    """Keep fp32 weights and the optimizer's moments in the host's memory."""
    micro_batch_size: Count | None = None
    """Samples of one rank in one pass. null: the global batch divided by the ranks."""
    encode_workers: Count = 1
    """Processes that encode at a time."""
    acquire_tasks: Count = 2
    """Shards downloaded at a time."""
    score_workers: Count = 1
    """Processes that score at a time."""
    evaluate_workers: Count = 1
    """Processes that make and measure pictures at a time."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Where networks run. auto: on GPUs where there are enough, else on the CPU; cuda: on GPUs, or not at all."""
    extractor: Literal["efficientnet_lite0"] | None = "efficientnet_lite0"
    """Network whose features `train.<autoencoder>` and `encode` measure Frechet distances with, on the way. null: they
    measure none."""
    checkpoint_every_steps: Count = 500
    """Steps from one checkpoint of a training to the next: a training that is killed goes on from the last one."""
    sample_every_steps: Count = 1000
    """Steps from one preview of a training to the next."""
    log_every_steps: Count = 20
    """Steps from one report of a training's means to the next."""
    keep_checkpoints: Count = 2
    """Checkpoints of a training that are kept, the newest."""
    tracking_uri: Name | None = None
    """An MLflow tracking server or database: an http, sqlite or postgresql URI. null: SQLite in `state_dir`."""


class Recipe(Block):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100), MANNER]
    """Name of the recipe: lower-case letters, digits, _ and -. Runs, logs and the registered model carry it."""
    description: Annotated[str, MANNER] = ""
    """What the recipe is for, in a line."""
    source: Source
    """Where pairs of image and caption come from."""
    acquire: AcquireSpec = AcquireSpec()
    """How the pairs are downloaded and stored."""
    score: ScoreSpec | None = None
    """What the pairs are scored with. null: nothing is scored."""
    select: SelectSpec = SelectSpec()
    """Which of the acquired pairs are used."""
    report: bool = True
    """Make node `report`: one HTML page on the data, with what was kept and dropped and why."""
    models: dict[str, Model]
    """The models to train, by name: lower-case letters, digits and _, beginning with a letter."""
    release: ReleaseSpec | None = None
    """Which model is released, as a folder that stock diffusers pipelines load. null: none."""
    execution: Annotated[Execution, MANNER] = Execution()
    """How the recipe is run."""
    store: Annotated[Name, MANNER] = "./ldm-store"
    """Where everything is published: a local folder, or any fsspec URL, such as s3://bucket/prefix."""
    state_dir: Annotated[Name, MANNER] = "./ldm-state"
    """A local folder for databases and logs."""

    def model(self, name: str) -> Model:
        """The model of that name, with what it takes from other blocks filled in. Raises `KeyError`."""
        return self.models[name].completed(self.select)
