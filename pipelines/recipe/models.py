"""The models of a recipe: what they are made of, how they are trained, sampled and measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from pipelines.recipe.block import MANNER, Block, Fraction, PositiveFloat
from pipelines.recipe.data import Split


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
    perceptual: NonNegativeFloat = 0.0
    """Distance of VGG16's features, which keeps textures: 1 is usual. Needs the package stlpips-pytorch, and images of
    32 pixels or more; runs VGG16 forth and back at every step."""


class AutoencoderModel(Block):
    """A KL autoencoder: the first stage (node `train.<name>`)."""

    kind: Literal["autoencoder"]
    init: str = "scratch"
    """"scratch", the name of weights that come with the package ("emoji_f8"), or a folder with an AutoencoderKL (local,
    or any fsspec URL). Weights must be of this network's shape."""
    network: AutoencoderNetwork
    loss: AutoencoderLoss = AutoencoderLoss()
    train: TrainSpec


class ClipNetwork(Block):
    """Shape of an open_clip model: an image and a text tower whose outputs meet in one space."""

    embed_dim: PositiveInt = 128
    image_tower: Literal["vit", "efficientnet_lite0"] = "vit"
    """A transformer trained from nothing, or ImageNet's EfficientNet-Lite0 (from its package, frozen) with a trained
    projection, as in LiT (Zhai et al. 2022): what minutes are enough for."""
    image_px: PositiveInt | None = None
    """Images are resized to this; by default they are taken as they are."""
    image_width: PositiveInt = 192
    """This and the next two: of a "vit"."""
    image_layers: PositiveInt = 4
    patch_size: PositiveInt = 8
    """Pixels a side; must divide the images' size."""
    text_width: PositiveInt = 128
    text_layers: PositiveInt = 2
    head_width: PositiveInt = 32
    """Of both; must divide `image_width` and `text_width`."""
    context_length: PositiveInt = 32
    """Tokens of open_clip's tokenizer; longer captions are cut."""


class ClipModel(Block):
    """A CLIP (node `train.<name>`), trained on the acquired pairs before any of them is selected."""

    kind: Literal["clip"]
    network: ClipNetwork = ClipNetwork()
    split: Split | None = None
    """Which pairs it learns from; the others measure it. By default as `select.split`: none that `select` holds out."""
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
    """What the U-Net learns to predict, and at which times. What a prediction has no use for must be left out."""

    prediction: Literal["flow", "eps", "v", "x0", "edm"] = "flow"
    schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    """Noise schedule of eps, v and x0."""
    zero_terminal_snr: bool = False
    """Of v and x0: the last step is noise alone, so that very dark and very bright pictures can be made."""
    flow_shift: PositiveFloat = 1.0
    """Of flow: above 1, more of the process is spent near the noise, as large images need."""
    timestep_sampling: Literal["uniform", "logit_normal", "log_normal"] | None = None
    """logit_normal favours the middle; log_normal is edm's. null: log_normal for edm, else uniform."""
    stratified_timesteps: bool = False
    """Each sample of a global batch draws from its own part of the process, so that the loss varies less (Kingma et al.
    2021)."""
    loss: Literal["mse", "huber", "pseudo_huber"] = "mse"
    huber_delta: PositiveFloat = 0.1
    loss_weight: Literal["none", "min_snr", "debiased"] = "none"
    """Of eps, v and x0."""
    min_snr_gamma: PositiveFloat = 5.0
    offset_noise: NonNegativeFloat = 0.0
    """Standard deviation of noise that all pixels of a channel share."""
    input_perturbation: NonNegativeFloat = 0.0
    """Noise that the network sees and isn't asked for, relative to the rest: 0.1 is usual."""
    caption_dropout: Fraction = 0.1
    """Share of samples trained with the empty prompt, for classifier-free guidance."""


class Sampling(Block):
    """How pictures are made from prompts, in training previews and in `evaluate`."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    seed: NonNegativeInt = 7
    guidance_scale: PositiveFloat = 3.0
    sampler: Literal[
        "ddpm",
        "ddim",
        "plms",
        "euler",
        "euler_ancestral",
        "heun",
        "dpmpp_2m",
        "dpmpp_2m_sde",
        "unipc",
        "flow_euler",
        "flow_heun",
    ] = "dpmpp_2m"
    steps: PositiveInt = 20


class EncodeSpec(Block):
    """Node `encode.<model>`: what is computed once and kept in the cache."""

    batch_size: Annotated[PositiveInt, MANNER] = 64
    """Images encoded at once. Has no bearing on the values beyond rounding."""


class EvaluateSpec(Block):
    """What `evaluate.<model>` measures, on pictures of the averaged weights."""

    images: PositiveInt = 1000
    """Pictures, from captions of the train split, for the Frechet and kernel distances. Fewer are made where there are
    fewer than twice as many images to compare with."""
    extractor: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    """Whose features the distances are of: each figure carries this name."""
    judge: str | None = None
    """A clip model among `models`, "hub:NAME" or a folder as in `score.clip`; not the one that scored. None: no CLIP
    score, and faithfulness by image features alone."""
    prompts: PositiveInt = 256
    """Captions, of each side of the split, for prompt faithfulness; all of them where there are fewer."""
    derangements: PositiveInt = 20
    """Shufflings in which no picture keeps its own prompt."""
    untrained: bool = True
    """Measure the same network with its initial weights too: where training began."""
    batch_size: Annotated[PositiveInt, MANNER] = 64
    seed: NonNegativeInt = 0


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
    evaluate: EvaluateSpec | None = None
    """None: a grid of the prompts, and no figures."""


Model = Annotated[AutoencoderModel | ClipModel | TextToImageModel, Field(discriminator="kind")]


class ReleaseSpec(Block):
    """Node `release`: the model as a folder that stock diffusers pipelines load."""

    model: str
    """Name of a text_to_image model among `models`."""
