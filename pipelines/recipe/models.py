"""The models of a recipe: what they are made of, how they are trained, sampled and measured."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field

from pipelines.recipe.block import MANNER, MOST, Block, Count, Fraction, Name, NonNegativeFloat, PositiveFloat, Whole
from pipelines.recipe.data import SelectSpec, Split

Channels = Annotated[
    tuple[Annotated[int, Field(ge=1, le=2**16)], ...],
    Field(min_length=1, max_length=9),
]
Layers = Annotated[int, Field(ge=1, le=64)]
Width = Annotated[int, Field(ge=1, le=2**16)]


class Optimizer(Block):
    """AdamW with linear warm-up and a cosine or constant course."""

    learning_rate: PositiveFloat = 1e-4
    """Learning rate after the warm-up."""
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.99)
    """AdamW's two decays, of the gradients' mean and of their squares' mean."""
    eps: PositiveFloat = 1e-8
    """Number added to AdamW's denominator."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay, decoupled from the gradient; 0 for none."""
    warmup_steps: Whole = 100
    """Steps in which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate after the warm-up: constant, or half a cosine down to 0 at the end."""
    max_grad_norm: PositiveFloat = 1.0
    """Longest gradient (L2 norm over all parameters): a longer one is scaled down to it."""


class TrainSpec(Block):
    """How a model is trained. What runs it (ranks, ZeRO stage, micro-batch) is in `execution`."""

    steps: Count
    """Optimizer steps, each of one global batch."""
    max_minutes: PositiveFloat | None = None
    """End earlier when training has taken this long in all. The course of the learning rate follows whichever of steps
    and minutes is further on. With a limit, how many steps are made depends on the machine. null: no limit."""
    global_batch_size: Count = 32
    """Samples of one step, over all ranks."""
    lanes: Count = 8
    """Parts of the dataset from which each global batch takes equal shares; must divide `global_batch_size`."""
    optimizer: Optimizer = Optimizer()
    """The optimizer and the course of its learning rate."""
    ema_decay: Fraction = 0.9999
    """Decay of the weights' moving average, which is what is published. It warms up: min(ema_decay, (1 + step) / (10 +
    step))."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of forward and backward passes. Weights, gradients, moments and average are fp32 in both."""
    seed: Whole = 0
    """Seed of the initial weights, the order of samples, and all noise."""


class AutoencoderNetwork(Block):
    """Shape of a standard AutoencoderKL; the names are those of its config.json."""

    block_out_channels: Channels
    """Channels at each resolution, from the finest; each further entry halves height and width."""
    layers_per_block: Layers = 2
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    latent_channels: Width = 4
    """Channels of the latents."""
    norm_num_groups: Width = 32
    """Groups of the group normalisations; must divide every entry of `block_out_channels`."""
    mid_block_add_attention: bool = True
    """Attention among all positions at the coarsest resolution."""


class AutoencoderLoss(Block):
    """Weights of the terms of the reconstruction loss; 0 leaves a term out."""

    l1: NonNegativeFloat = 1.0
    """Weight of the mean absolute error of pixels."""
    mse: NonNegativeFloat = 1.0
    """Weight of the mean squared error of pixels."""
    gradient_l1: NonNegativeFloat = 1.0
    """Weight of the L1 of horizontal and vertical differences, which keeps edges."""
    pooled_l1: NonNegativeFloat = 1.0
    """Weight of the L1 of 4x4 averages, which keeps colours."""
    kl: NonNegativeFloat = 1e-6
    """Weight of the posterior's KL divergence from a standard normal, per latent value."""
    perceptual: NonNegativeFloat = 0.0
    """Weight of the distance of VGG16's features, which keeps textures: 1 is usual. Needs the package stlpips-pytorch,
    and images of 32 pixels or more; runs VGG16 forth and back at every step."""


class ModelBlock(Block):
    """The base of the block of each kind of model. A block has two fields: `kind`, a literal, and `train`, a
    `TrainSpec`."""

    def completed(self, select: SelectSpec) -> Self:  # noqa: ARG002 - for the kinds that take something from it
        """With what it takes from block `select`, if its own fields leave that open."""
        return self


class AutoencoderModel(ModelBlock):
    """A KL autoencoder: the first stage (node `train.<name>`)."""

    kind: Literal["autoencoder"]
    """Kind of the model: a first stage."""
    init: Name = "scratch"
    """What training begins with: "scratch", the name of weights that come with the package ("emoji_f8"), or a folder
    with an AutoencoderKL, as a path with a slash ("./vae") or any fsspec URL. Weights must be of this network's
    shape."""
    network: AutoencoderNetwork
    """Shape of the network."""
    loss: AutoencoderLoss = AutoencoderLoss()
    """What the network is trained to make small."""
    train: TrainSpec
    """How the model is trained."""


class ClipNetwork(Block):
    """Shape of an open_clip model: an image and a text tower whose outputs meet in one space."""

    embed_dim: Width = 128
    """Width of the space in which images and texts are compared."""
    image_tower: Literal["vit", "efficientnet_lite0"] = "vit"
    """What reads images: a transformer trained from nothing, or ImageNet's EfficientNet-Lite0 (from its package,
    frozen) with a trained projection, as in LiT (Zhai et al. 2022): what minutes are enough for."""
    image_px: Count | None = None
    """Side in pixels that images are resized to for the image tower. null: they are taken as they are."""
    image_width: Width = 192
    """Width of the image tower, if it is a "vit"."""
    image_layers: Layers = 4
    """Transformer layers of the image tower, if it is a "vit"."""
    patch_size: Count = 8
    """Pixels a side of the patches that the image tower reads, if it is a "vit"; must divide the images' side."""
    text_width: Width = 128
    """Width of the text tower."""
    text_layers: Layers = 2
    """Transformer layers of the text tower."""
    head_width: Width = 32
    """Width of one attention head in both towers; must divide `image_width` and `text_width`."""
    context_length: Annotated[int, Field(ge=3, le=2**16)] = 32
    """Tokens of open_clip's tokenizer that the text tower reads, two of them the marks of start and end; longer
    captions are cut."""


class ClipModel(ModelBlock):
    """A CLIP (node `train.<name>`), trained on the acquired pairs before any of them is selected."""

    kind: Literal["clip"]
    """Kind of the model: a CLIP."""
    network: ClipNetwork = ClipNetwork()
    """Shape of the two towers."""
    split: Split | None = None
    """Which pairs the model learns from; the others measure it. null: as `select.split`, so none that `select` holds
    out."""
    train: TrainSpec
    """How the model is trained."""

    def completed(self, select: SelectSpec) -> Self:
        """With a split of its own: that of `select`, if it has none."""
        return self if self.split is not None else self.model_copy(update={"split": select.split})


class TextEncoder(Block):
    """The language model that reads the prompts."""

    encoder: Name = "minilm"
    """The language model: "minilm" (all-MiniLM-L6-v2 from its package), or a local folder of a transformers encoder, as
    a path with a slash ("./t5")."""
    tokens: Annotated[int, Field(ge=4, le=512)] = 24
    """Tokens of a prompt that the U-Net sees; longer captions are cut, and counted."""
    form: Literal["padded"] = "padded"
    """What the U-Net attends to. padded: all positions, as stock pipelines do."""


class UNetNetwork(Block):
    """Shape of a standard UNet2DConditionModel; the names are those of its config.json."""

    block_out_channels: Channels
    """Channels at each resolution, from the finest; each further entry halves height and width."""
    layers_per_block: Layers = 2
    """Residual blocks at each resolution on the way down; on the way up there is one more."""
    cross_attention: tuple[bool, ...]
    """For each resolution, from the finest: transformer blocks with cross-attention, or none."""
    transformer_layers_per_block: Layers = 1
    """Layers of each transformer block."""
    attention_head_dim: Width = 8
    """The number of heads, whatever its name says: config.json has meant that from the beginning. Must divide every
    entry of `block_out_channels`."""
    norm_num_groups: Width = 32
    """Groups of the group normalisations; must divide every entry of `block_out_channels`."""
    use_linear_projection: bool = True
    """Projections into and out of transformer blocks: linear layers as in Stable Diffusion 2, or 1x1 convolutions as in
    1."""


class DiffusionSpec(Block):
    """What the U-Net learns to predict, and at which times. What a prediction has no use for must be left out."""

    prediction: Literal["flow", "eps", "v", "x0", "edm"] = "flow"
    """What the network predicts: a flow's velocity, the noise, v, the image, or EDM's mixture; with it goes the
    process."""
    schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    """Noise schedule of the predictions eps, v and x0."""
    zero_terminal_snr: bool = False
    """For the predictions v and x0: the last step is noise alone, so that very dark and very bright pictures can be
    made."""
    flow_shift: PositiveFloat = 1.0
    """For the prediction flow: above 1, more of the process is spent near the noise, as large images need."""
    timestep_sampling: Literal["uniform", "logit_normal", "log_normal"] | None = None
    """How times are drawn in training. logit_normal favours the middle; log_normal is edm's. null: log_normal for edm,
    else uniform."""
    stratified_timesteps: bool = False
    """Each sample of a global batch draws from its own part of the process, so that the loss varies less (Kingma et al.
    2021)."""
    loss: Literal["mse", "huber", "pseudo_huber"] = "mse"
    """Penalty of the network's error: its square, or one that grows more slowly beyond `huber_delta`."""
    huber_delta: PositiveFloat = 0.1
    """Error beyond which the losses huber and pseudo_huber grow linearly."""
    loss_weight: Literal["none", "min_snr", "debiased"] = "none"
    """Weight of the loss over times, for the predictions eps, v and x0."""
    min_snr_gamma: PositiveFloat = 5.0
    """Signal-to-noise ratio at which the loss weight min_snr is capped."""
    offset_noise: NonNegativeFloat = 0.0
    """Standard deviation of noise that all pixels of a channel share; 0 for none."""
    input_perturbation: NonNegativeFloat = 0.0
    """Noise that the network sees and isn't asked for, relative to the rest: 0.1 is usual, 0 for none."""
    caption_dropout: Fraction = 0.1
    """Share of samples trained with the empty prompt, for classifier-free guidance."""


class Sampling(Block):
    """How pictures are made from prompts, in training previews and in `evaluate`."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    """Prompts of the previews and of the grid of `evaluate`."""
    seed: Whole = 7
    """Seed of the first prompt's picture; the others count up from it."""
    guidance_scale: PositiveFloat = 3.0
    """Classifier-free guidance: above 1, pictures go more towards the prompt; 1 is without, and half the work."""
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
    """The solver of the backward process."""
    steps: Count = 20
    """Steps of the sampler, fewer than 1000."""


class EncodeSpec(Block):
    """Node `encode.<model>`: what is computed once and kept in the cache."""

    batch_size: Annotated[Count, MANNER] = 64
    """Images encoded at once. Has no bearing on the values beyond rounding."""


class EvaluateSpec(Block):
    """What `evaluate.<model>` measures, on pictures of the averaged weights."""

    images: Annotated[int, Field(ge=2, lt=MOST)] = 1000
    """Pictures, from captions of the train split, for the Frechet and kernel distances. Fewer are made where there are
    fewer than twice as many images to compare with."""
    extractor: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    """Network whose features the distances are of: each figure carries this name."""
    judge: Name | None = None
    """CLIP that judges the pictures: a clip model among `models`, "hub:NAME/TAG" or a folder as in `score.clip`; not
    the one that scored. null: no CLIP score, and faithfulness by image features alone."""
    prompts: Count = 256
    """Captions, of each side of the split, for prompt faithfulness; all of them where there are fewer."""
    derangements: Count = 20
    """Shufflings in which no picture keeps its own prompt, for prompt faithfulness."""
    untrained: bool = True
    """Measure the same network with its initial weights too: where training began."""
    batch_size: Annotated[Count, MANNER] = 64
    """Pictures made and measured at once. Has no bearing on the figures beyond rounding."""
    seed: Whole = 0
    """Seed of the choice of captions, of the pictures' noise, and of the shufflings."""


class TextToImageModel(ModelBlock):
    """A latent diffusion model (nodes `encode.<name>`, `train.<name>`, `evaluate.<name>`)."""

    kind: Literal["text_to_image"]
    """Kind of the model: one that makes pictures of prompts."""
    first_stage: Name
    """Name of the autoencoder among `models`."""
    text: TextEncoder = TextEncoder()
    """The language model that reads the prompts."""
    encode: EncodeSpec = EncodeSpec()
    """How the cache is made that the model is trained on."""
    network: UNetNetwork
    """Shape of the U-Net."""
    diffusion: DiffusionSpec = DiffusionSpec()
    """What the U-Net learns to predict."""
    train: TrainSpec
    """How the model is trained."""
    sampling: Sampling
    """How pictures are made from prompts."""
    evaluate: EvaluateSpec | None = None
    """What is measured on the model's pictures. null: a grid of the prompts is made, and no figures."""


Model = Annotated[AutoencoderModel | ClipModel | TextToImageModel, Field(discriminator="kind")]
AnyModel = TypeVar("AnyModel", bound=ModelBlock)
"""The block of one kind of model, in the tables of kinds."""


class ReleaseSpec(Block):
    """Node `release`: the model as a folder that stock diffusers pipelines load."""

    model: Name
    """Name of a text_to_image model among `models`."""
