"""The recipe: everything that a run is asked for, as strict models with a docstring per field.

Each block is named after the stage or the model it configures. `execution`, `store` and `state_dir` say how and where,
never what: they are left out of every key. Reading YAML and reporting its errors is `pipelines.recipe.file`'s matter.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from pipelines.recipe.block import Block
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

    cluster: str = "local"
    """"local", "auto" (the cluster this machine belongs to) or an address of a Ray head."""
    cpus: PositiveInt | None = None
    """Of a local cluster; by default those of the machine."""
    ranks: PositiveInt = 1
    """Training processes; ranks x micro-batch must divide the global batch."""
    zero_stage: Literal[1, 2, 3] = 1
    offload_optimizer: bool = False
    micro_batch_size: PositiveInt | None = None
    """Samples of one rank in one pass; by default the global batch divided by the ranks."""
    encode_workers: PositiveInt = 1
    acquire_tasks: PositiveInt = 2
    """Shards downloaded at once."""
    score_workers: PositiveInt = 1
    evaluate_workers: PositiveInt = 1
    device: Literal["cpu", "cuda", "auto"] = "auto"
    extractor: Literal["efficientnet_lite0"] | None = "efficientnet_lite0"
    """Whose features `train.<autoencoder>` and `encode` measure Frechet distances with, on the way; None for none."""
    checkpoint_every_steps: PositiveInt = 500
    sample_every_steps: PositiveInt = 1000
    log_every_steps: PositiveInt = 20
    keep_checkpoints: PositiveInt = 2
    tracking_uri: str | None = None
    """An MLflow tracking server; by default SQLite in `state_dir`."""


class Recipe(Block):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    description: str = ""
    source: Source
    acquire: AcquireSpec = AcquireSpec()
    score: ScoreSpec | None = None
    """None: nothing is scored."""
    select: SelectSpec = SelectSpec()
    report: bool = True
    """Node `report`: one HTML page on the data, with what was kept and dropped and why."""
    models: dict[str, Model]
    release: ReleaseSpec | None = None
    execution: Execution = Execution()
    store: str = "./ldm-store"
    """Any fsspec URL."""
    state_dir: str = "./ldm-state"
    """Always a local folder: databases, logs."""

    def model(self, name: str) -> Model:
        """The model of that name, with what it takes from other blocks filled in. Raises `KeyError`."""
        model = self.models[name]
        if isinstance(model, ClipModel) and model.split is None:
            return model.model_copy(update={"split": self.select.split})
        return model

    @model_validator(mode="after")
    def _models_fit(self) -> Recipe:
        for name, model in self.models.items():
            if not NAME_PATTERN.fullmatch(name):
                raise ValueError(f"models.{name}: a model's name is lower-case letters, digits and _, got {name!r}")
            if isinstance(model, TextToImageModel):
                self._expect(f"models.{name}.first_stage", model.first_stage, AutoencoderModel, "autoencoder")
                if model.evaluate is not None and model.evaluate.judge is not None:
                    self._expect_clip(f"models.{name}.evaluate.judge", model.evaluate.judge)
                    if self.score is not None and self.score.clip == model.evaluate.judge:
                        raise ValueError(
                            f"models.{name}.evaluate.judge: {model.evaluate.judge!r} is also score.clip; what was"
                            " selected by a CLIP can't be judged by it: name another one"
                        )
        if self.score is not None and self.score.clip is not None:
            self._expect_clip("score.clip", self.score.clip)
        if self.select.near_duplicates is not None and (self.score is None or not self.score.phash):
            raise ValueError("select.near_duplicates needs the columns of score.phash; set it, or leave these out")
        if self.release is not None:
            self._expect("release.model", self.release.model, TextToImageModel, "text_to_image")
        return self

    def _expect_clip(self, where: str, name: str) -> None:
        """A clip model of this recipe, unless it is plainly something else: "hub:..." or a path."""
        if name in self.models or NAME_PATTERN.fullmatch(name):
            self._expect(where, name, ClipModel, "clip")

    def _expect(self, where: str, name: str, kind: type[Block], kind_name: str) -> None:
        if not isinstance(self.models.get(name), kind):
            fitting = [other for other, model in self.models.items() if isinstance(model, kind)]
            raise ValueError(f"{where}: {name!r} is no {kind_name} model of this recipe; it has {fitting}")
