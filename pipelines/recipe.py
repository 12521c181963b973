"""The recipe: everything that a run is asked for, as strict models with a docstring per field.

Each block is named after the stage or the model it configures. `execution`, `store` and `state_dir` say how and where,
never what: they are left out of every key. Reading YAML and reporting its errors is `pipelines.recipe_file`'s matter.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]*")


class Block(BaseModel):
    """A block of the recipe: unknown keys are refused, values are of the type that is asked for and never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


# -- source and acquire ------------------------------------------------------------------------------------------------


class GallerySource(Block):
    """Real captioned emoji images from installed packages, served over HTTP on loopback with the web's usual faults."""

    kind: Literal["gallery"]
    port: Annotated[int, Field(ge=1024, le=65535)] = 8377
    """Port on 127.0.0.1; part of every URL, so that a change of port is a change of the source."""
    vendors: tuple[Literal["Goog", "Twtr"], ...] = ("Goog", "Twtr")
    """Goog is Noto Emoji, Twtr is Twemoji."""
    limit: PositiveInt | None = None
    """Serve the first so many images only."""
    fault_rate: Fraction = 0.04
    """Links with a fault per image: slow, flaky, moved, turned ones stand in for the image's own link; dead, truncated,
    duplicated, opted-out ones and the like come on top."""


class UrlsSource(Block):
    """Lists of image URLs with captions."""

    kind: Literal["urls"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Parquet, CSV, TSV, JSON lines: local paths or fsspec URLs, in order."""
    url_column: str = "url"
    caption_column: str = "caption"
    uid_column: str | None = None
    """The dataset's own identifier, honoured where given."""
    keep_columns: tuple[str, ...] = ()
    """Further columns to carry into the ledger; `select` can use them."""


Source = Annotated[GallerySource | UrlsSource, Field(discriminator="kind")]


class Fetch(Block):
    """How a URL is fetched. The defaults refuse private addresses and every scheme but http and https."""

    user_agent: str = "latentworks/0.1"
    contact: str = ""
    """An e-mail address or page where site owners reach you; sent with each request."""
    timeout_s: PositiveFloat = 10.0
    """For one attempt, from resolving the name to the last byte."""
    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """For transient failures; permanent ones are not tried again."""
    max_bytes: PositiveInt = 20_000_000
    max_pixels: PositiveInt = 50_000_000
    """Checked in the header, before anything is decoded."""
    max_redirects: NonNegativeInt = 5
    allow_hosts: tuple[str, ...] = ()
    """"host:port" entries that may be fetched although their address is private: for a gallery on loopback alone."""
    opt_out: bool = True
    """Honour X-Robots-Tag, tdm-reservation, Content-Usage and Content-Signal headers, and keep them as evidence."""
    threads: PositiveInt = 32
    """Concurrent requests of one task."""


class ImageFormat(Block):
    """How an image is stored in a shard."""

    size_px: PositiveInt = 256
    resize_mode: Literal["border", "keep_ratio", "center_crop", "no"] = "center_crop"
    """Meanings are img2dataset's."""
    upscale: bool = False
    """Enlarge images smaller than `size_px`; otherwise they are dropped by `min_side_px` or kept as they are."""
    encode_format: Literal["png", "jpg", "webp"] = "jpg"
    encode_quality: Annotated[int, Field(ge=0, le=100)] = 95
    """JPEG or WebP quality; for PNG the compression level, 0 to 9."""

    @model_validator(mode="after")
    def _png_level(self) -> ImageFormat:
        if self.encode_format == "png" and self.encode_quality > 9:
            raise ValueError(f"encode_quality is PNG's compression level here: 0 to 9, not {self.encode_quality}")
        return self


class PairFilter(Block):
    """What is dropped while downloading, because keeping it would cost storage. Everything else is `select`'s."""

    min_side_px: NonNegativeInt = 0
    """Of the original, after EXIF orientation."""
    max_aspect: PositiveFloat = 100.0
    """Longer side by shorter side."""
    min_caption_chars: NonNegativeInt = 1


class AcquireSpec(Block):
    """Node `acquire`: URL lists to WebDataset shards and their ledgers."""

    shard_size: PositiveInt = 10_000
    """URLs of one shard: the unit of work, and of resuming."""
    fetch: Fetch = Fetch()
    image: ImageFormat = ImageFormat()
    filter: PairFilter = PairFilter()


# -- select ------------------------------------------------------------------------------------------------------------


class Predicate(Block):
    """A rule that a row must meet to stay. `name` is the reason by which the others are counted as dropped."""

    name: str
    column: str
    op: Literal["==", "!=", ">", ">=", "<", "<=", "in", "not_in", "matches", "not_matches", "min_chars", "max_chars"]
    value: Any
    missing: Literal["drop", "keep"] = "drop"
    """What becomes of a row where the column is null."""


class Split(Block):
    """Rows of one group go to one side, which every later stage respects."""

    by: str = "uid"
    """Column that names the group."""
    held_out: Fraction = 0.05
    salt: str = "split"


class SelectSpec(Block):
    """Node `select`: which of the acquired pairs are used. Changing it downloads nothing again."""

    duplicates: tuple[str, ...] = ("sha256",)
    """Columns in which equal values are duplicates. The largest original stays; among equals the lowest uid."""
    where: tuple[Predicate, ...] = ()
    split: Split = Split()


# -- models ------------------------------------------------------------------------------------------------------------


class Optimizer(Block):
    """AdamW with linear warm-up and a cosine or constant course."""

    learning_rate: PositiveFloat = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    warmup_steps: NonNegativeInt = 100
    schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: PositiveFloat = 1.0


class TrainSpec(Block):
    """How a model is trained. What runs it (ranks, ZeRO stage, micro-batch) is in `execution`."""

    steps: PositiveInt
    max_minutes: PositiveFloat | None = None
    """End earlier when training has taken this long in all. The course of the learning rate follows whichever of steps
    and minutes is further on. With a limit, how many steps are made depends on the machine."""
    global_batch_size: PositiveInt = 32
    lanes: PositiveInt = 8
    """Parts of the dataset from which each global batch takes equal shares; must divide `global_batch_size`."""
    optimizer: Optimizer = Optimizer()
    ema_decay: Fraction = 0.9999
    """The average warms up: min(ema_decay, (1 + step) / (10 + step))."""
    precision: Literal["fp32", "bf16"] = "bf16"
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _lanes_divide(self) -> TrainSpec:
        if self.global_batch_size % self.lanes:
            raise ValueError(f"lanes ({self.lanes}) must divide global_batch_size ({self.global_batch_size})")
        return self


class AutoencoderNetwork(Block):
    """Shape of a standard AutoencoderKL; the names are those of its config.json."""

    block_out_channels: tuple[PositiveInt, ...]
    layers_per_block: PositiveInt = 2
    latent_channels: PositiveInt = 4
    norm_num_groups: PositiveInt = 32
    mid_block_add_attention: bool = True


class AutoencoderLoss(Block):
    """Weights of the terms of the reconstruction loss."""

    l1: NonNegativeFloat = 1.0
    mse: NonNegativeFloat = 1.0
    gradient_l1: NonNegativeFloat = 1.0
    """L1 of horizontal and vertical differences: keeps edges."""
    pooled_l1: NonNegativeFloat = 1.0
    """L1 of 4x4 averages: keeps colours."""
    kl: NonNegativeFloat = 1e-6


class AutoencoderModel(Block):
    """A KL autoencoder: the first stage (node `train.<name>`)."""

    kind: Literal["autoencoder"]
    network: AutoencoderNetwork
    loss: AutoencoderLoss = AutoencoderLoss()
    train: TrainSpec


class TextEncoder(Block):
    """The language model that reads the prompts."""

    encoder: str = "minilm"
    """"minilm" (all-MiniLM-L6-v2 from its package) or a local folder of a transformers encoder."""
    tokens: Annotated[int, Field(ge=4, le=512)] = 24
    """Length of the context; longer captions are cut, and counted."""
    form: Literal["padded"] = "padded"
    """All positions are attended to by the U-Net, as stock pipelines do."""


class UNetNetwork(Block):
    """Shape of a standard UNet2DConditionModel; the names are those of its config.json."""

    block_out_channels: tuple[PositiveInt, ...]
    layers_per_block: PositiveInt = 2
    cross_attention: tuple[bool, ...]
    """For each resolution, from the finest: transformer blocks with cross-attention, or none."""
    transformer_layers_per_block: PositiveInt = 1
    attention_head_dim: PositiveInt = 8
    """The number of heads, whatever its name says: config.json has meant that from the beginning."""
    norm_num_groups: PositiveInt = 32
    use_linear_projection: bool = True

    @model_validator(mode="after")
    def _lengths(self) -> UNetNetwork:
        if len(self.cross_attention) != len(self.block_out_channels):
            raise ValueError(
                f"cross_attention has {len(self.cross_attention)} entries, block_out_channels"
                f" {len(self.block_out_channels)}; give one for each resolution"
            )
        return self


class DiffusionSpec(Block):
    """What the U-Net learns to predict, and at which times."""

    prediction: Literal["flow", "eps", "v", "x0"] = "flow"
    schedule: Literal["linear", "scaled_linear"] = "scaled_linear"
    """Noise schedule of the discrete predictions; flow has none."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    loss_weight: Literal["none", "min_snr"] = "none"
    caption_dropout: Fraction = 0.1
    """Share of samples trained with the empty prompt, for classifier-free guidance."""


class Sampling(Block):
    """How pictures are made from prompts, in training previews and in `evaluate`."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    seed: NonNegativeInt = 7
    guidance_scale: PositiveFloat = 3.0
    sampler: Literal["dpmpp_2m", "ddim", "euler"] = "dpmpp_2m"
    steps: PositiveInt = 20


class EncodeSpec(Block):
    """Node `encode.<model>`: what is computed once and kept in the cache."""

    batch_size: PositiveInt = 64
    """Images encoded at once. Has no bearing on the values beyond rounding."""


class TextToImageModel(Block):
    """A latent diffusion model (nodes `encode.<name>`, `train.<name>`, `evaluate.<name>`)."""

    kind: Literal["text_to_image"]
    first_stage: str
    """Name of the autoencoder among `models`."""
    text: TextEncoder = TextEncoder()
    encode: EncodeSpec = EncodeSpec()
    network: UNetNetwork
    diffusion: DiffusionSpec = DiffusionSpec()
    train: TrainSpec
    sampling: Sampling


Model = Annotated[AutoencoderModel | TextToImageModel, Field(discriminator="kind")]


class ReleaseSpec(Block):
    """Node `release`: the model as a folder that stock diffusers pipelines load."""

    model: str
    """Name of a text_to_image model among `models`."""


# -- how and where -----------------------------------------------------------------------------------------------------


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
    device: Literal["cpu", "cuda", "auto"] = "auto"
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
    select: SelectSpec = SelectSpec()
    models: dict[str, Model]
    release: ReleaseSpec | None = None
    execution: Execution = Execution()
    store: str = "./ldm-store"
    """Any fsspec URL."""
    state_dir: str = "./ldm-state"
    """Always a local folder: databases, logs."""

    @model_validator(mode="after")
    def _models_fit(self) -> Recipe:
        for name, model in self.models.items():
            if not NAME_PATTERN.fullmatch(name):
                raise ValueError(f"models.{name}: a model's name is lower-case letters, digits and _, got {name!r}")
            if isinstance(model, TextToImageModel):
                self._expect(f"models.{name}.first_stage", model.first_stage, AutoencoderModel, "autoencoder")
        if self.release is not None:
            self._expect("release.model", self.release.model, TextToImageModel, "text_to_image")
        return self

    def _expect(self, where: str, name: str, kind: type[Block], kind_name: str) -> None:
        if not isinstance(self.models.get(name), kind):
            fitting = [other for other, model in self.models.items() if isinstance(model, kind)]
            raise ValueError(f"{where}: {name!r} is no {kind_name} model of this recipe; it has {fitting}")
