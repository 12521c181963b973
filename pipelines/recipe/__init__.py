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
    ImageFormat,
    NearDuplicates,
    PairFilter,
    Predicate,
    ScoreSpec,
    SelectSpec,
    Split,
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
    ReleaseSpec,
    Sampling,
    TextEncoder,
    TextToImageModel,
    UNetNetwork,
)
from pipelines.recipe.sources import FolderSource, GallerySource, NamedSource, Source, SourceBlock, UrlsSource
from pipelines.recipe.training import Optimizer, TrainSpec

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
    "NamedSource",
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
    "SourceBlock",
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
    """Ray cluster to work on. "local" starts one on this machine, "auto" joins the one that this machine belongs to,
    and "host:port" or "ray://host:port" joins another."""
    cpus: Count | None = None
    """Number of CPUs of a local cluster, and of those that the ranks on a machine compute with together. null takes all
    of the machine."""
    ranks: Count = 1
    """Number of training processes. Each takes an equal share of every global batch, so it must divide
    `train.global_batch_size` of every model."""
    zero_stage: Literal[1, 2, 3] = 1
    """Stage of DeepSpeed's ZeRO, which says what is sharded over the ranks: 1 the optimizer's state, 2 gradients too, 3
    weights too. The lowest stage that fits into memory is the fastest."""
    offload_optimizer: bool = False
    """Whether fp32 weights and the optimizer's moments are kept in the host's memory, which leaves more of a GPU's to
    the rest. On the CPU it has no effect."""
    micro_batch_size: Count | None = None
    """Number of samples that a rank takes through the network in one pass; it must divide the rank's share of every
    global batch. null takes the whole share at once, as a clip model needs, which compares the samples with each
    other."""
    encode_workers: Count = 1
    """Number of processes that encode images and captions at a time, in nodes `encode.<model>`."""
    acquire_tasks: Count = 2
    """Number of shards that are downloaded at a time, each with `acquire.fetch.threads` requests."""
    score_workers: Count = 1
    """Number of processes that score pairs at a time, in node `score`."""
    evaluate_workers: Count = 1
    """Number of processes that make and measure pictures at a time, in nodes `evaluate.<model>`."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Device that networks run on. auto takes GPUs where there are enough, else the CPU; cuda takes GPUs, and fails
    where there are too few; cpu takes none."""
    extractor: Name | None = "efficientnet_lite0"
    """Network whose image features `train.<autoencoder>` and `encode.<model>` measure Frechet distances with, on the
    way; names are those of `evaluate.extractor`. null leaves these distances out."""
    checkpoint_every_steps: Count = 500
    """Number of optimizer steps from one checkpoint of a training to the next. A training that is killed goes on from
    the last one."""
    sample_every_steps: Count = 1000
    """Number of optimizer steps from one preview of a training to the next."""
    log_every_steps: Count = 20
    """Number of optimizer steps from one report of a training to the next, each with the means over these steps."""
    keep_checkpoints: Count = 2
    """Number of checkpoints of a training that are kept, the newest ones."""
    tracking_uri: Name | None = None
    """Address of MLflow's tracking server or database: http://host:5000, sqlite:///file.db or
    postgresql://user@host/database, for example. null keeps a SQLite database in `state_dir`."""


class Recipe(Block):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=100), MANNER]
    """Name of the recipe, which its runs, logs and registered model carry: lower-case letters, digits, _ and -,
    beginning with a letter or a digit, at most 100 characters."""
    description: Annotated[str, MANNER] = ""
    """Description of what the recipe is for, in a line."""
    plugins: Annotated[tuple[Name, ...], MANNER] = ()
    """Python files that register scorers, samplers and extractors, as paths seen from the recipe's file. They are run
    as you, whenever the recipe is read. A file's hash is in the keys of the nodes that use its names."""
    source: Source | None = None
    """Source of the pairs of image and caption. A recipe has either `source` or `sources`: null says that there are
    several."""
    sources: dict[str, Source] = Field(default_factory=dict)
    """Sources of the pairs where they come from several places, by names of your own: lower-case letters, digits and _,
    beginning with a letter. Each has a node `acquire.<name>`, and `select` has the name in the column `source`. A
    recipe has either `source` or `sources`."""
    acquire: AcquireSpec = AcquireSpec()
    """Rules by which pairs are downloaded, filtered and stored in shards."""
    score: ScoreSpec | None = None
    """Scores that each pair is given, as columns that `select` can use. null gives none."""
    select: SelectSpec = SelectSpec()
    """Rules by which pairs are chosen from those that were acquired, and some of them held out from training."""
    report: bool = True
    """Whether node `report` is made: one HTML page on the data, with what was kept and dropped and why."""
    models: dict[str, Model]
    """Models to train, by names of your own: lower-case letters, digits and _, beginning with a letter, at most 100
    characters. What kind of model each is, its `kind` says."""
    release: ReleaseSpec | None = None
    """Model that is released, as a folder that stock diffusers pipelines load. null releases none."""
    execution: Annotated[Execution, MANNER] = Execution()
    """Settings of how and where the recipe is run: cluster, processes, device, how often something is saved or told."""
    store: Annotated[Name, MANNER] = "./ldm-store"
    """Place where everything is published: a local folder, or any fsspec URL that can be written to, such as
    s3://bucket/prefix."""
    state_dir: Annotated[Name, MANNER] = "./ldm-state"
    """Folder for databases and logs, on the machine where the command is given; not a URL."""

    @property
    def named_sources(self) -> tuple[NamedSource, ...]:
        """All sources with their names, in the recipe's order; the one `source` has the name ""."""
        only = () if self.source is None else (NamedSource("", self.source),)
        return (*only, *(NamedSource(name, block) for name, block in self.sources.items()))

    @property
    def acquired(self) -> tuple[str, ...]:
        """The nodes that get the pairs: "acquire", or one for each of the `sources`."""
        return tuple(source.node for source in self.named_sources)

    def model(self, name: str) -> Model:
        """The model of that name, with what it takes from other blocks filled in. Raises `KeyError`."""
        return self.models[name].completed(self.select)
