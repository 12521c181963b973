"""The models of a recipe: what they are made of, how their pictures are made and measured."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field

from pipelines.recipe.block import MANNER, MOST, Block, Count, Fraction, Name, NonNegativeFloat, PositiveFloat, Whole
from pipelines.recipe.data import SelectSpec, Split
from pipelines.recipe.training import TrainSpec

Channels = Annotated[
    tuple[Annotated[int, Field(ge=1, le=2**16)], ...],
    Field(min_length=1, max_length=9),
]
Layers = Annotated[int, Field(ge=1, le=64)]
Width = Annotated[int, Field(ge=1, le=2**16)]


class AutoencoderNetwork(Block):
    """Shape of a standard AutoencoderKL; the names are those of its config.json."""

    block_out_channels: Channels
    """Number of channels at each resolution, from the finest. Each further entry halves height and width, so with n
    entries `acquire.image.size_px` must be a multiple of 2^(n - 1)."""
    layers_per_block: Layers = 2
    """Number of residual blocks at each resolution of the encoder; the decoder has one more."""
    latent_channels: Width = 4
    """Number of channels of the latents."""
    norm_num_groups: Width = 32
    """Number of groups of the group normalisations; it must divide every entry of `block_out_channels`."""
    mid_block_add_attention: bool = True
    """Whether all positions at the coarsest resolution attend to each other."""


class AutoencoderLoss(Block):
    """Weights of the terms of the reconstruction loss; 0 leaves a term out."""

    l1: NonNegativeFloat = 1.0
    """Weight of the mean absolute error of pixels; 0 leaves the term out."""
    mse: NonNegativeFloat = 1.0
    """Weight of the mean squared error of pixels; 0 leaves the term out."""
    gradient_l1: NonNegativeFloat = 1.0
    """Weight of the mean absolute error of differences between neighbouring pixels, horizontal and vertical, which
    keeps edges; 0 leaves the term out."""
    pooled_l1: NonNegativeFloat = 1.0
    """Weight of the mean absolute error of 4x4 averages, which keeps colours; 0 leaves the term out."""
    kl: NonNegativeFloat = 1e-6
    """Weight of the posterior's KL divergence from a standard normal, per latent value; 0 leaves the term out."""
    perceptual: NonNegativeFloat = 0.0
    """Weight of the distance of VGG16's features, which keeps textures: 1 is usual, 0 leaves the term out. It needs the
    package stlpips-pytorch and images of 32 pixels or more, and takes VGG16 forth and back at every step."""


class ModelBlock(Block):
    """The base of the block of each kind of model. A block has two fields: `kind`, a literal, and `train`, a
    `TrainSpec`."""

    def completed(self, select: SelectSpec) -> Self:  # noqa: ARG002 - for the kinds that take something from it
        """The block with what it takes from block `select`, if its own fields leave that open."""
        return self


class AutoencoderModel(ModelBlock):
    """A KL autoencoder: the first stage (node `train.<name>`)."""

    kind: Literal["autoencoder"]
    """Kind of the model: a KL autoencoder, the first stage of a text-to-image model."""
    init: Name = "scratch"
    """Weights that training begins with: "scratch" for random ones, the name of weights that come with the package
    ("emoji_f8"), or a folder with an AutoencoderKL, as a path with a slash ("./vae") or any fsspec URL. They must have
    the shape that `network` gives."""
    network: AutoencoderNetwork
    """Shape of the autoencoder's network."""
    loss: AutoencoderLoss = AutoencoderLoss()
    """Loss that the autoencoder is trained to make small, as weights of its terms."""
    train: TrainSpec
    """Settings of the model's training: steps, batches, optimizer, precision and seed."""


class ClipNetwork(Block):
    """Shape of an open_clip model: an image and a text tower whose outputs meet in one space."""

    embed_dim: Width = 128
    """Width of the space in which images and texts are compared."""
    image_tower: Literal["vit", "efficientnet_lite0"] = "vit"
    """Network that reads images. "vit" is a transformer trained from nothing; "efficientnet_lite0" is ImageNet's
    EfficientNet-Lite0 (from its package, frozen) with a trained projection, as in LiT (Zhai et al. 2022), for which
    minutes of training are enough."""
    image_px: Count | None = None
    """Side in pixels that images are resized to for the image tower. null takes them as they are stored."""
    image_width: Width = 192
    """Width of the image tower, if that is a "vit"; `head_width` must divide it."""
    image_layers: Layers = 4
    """Number of transformer layers of the image tower, if that is a "vit"."""
    patch_size: Count = 8
    """Side in pixels of the patches that the image tower reads, if that is a "vit". It must divide the images' side:
    `image_px`, or `acquire.image.size_px` where that is null."""
    text_width: Width = 128
    """Width of the text tower; `head_width` must divide it."""
    text_layers: Layers = 2
    """Number of transformer layers of the text tower."""
    head_width: Width = 32
    """Width of one attention head in both towers; it must divide `text_width`, and `image_width` if the image tower is
    a "vit"."""
    context_length: Annotated[int, Field(ge=3, le=2**16)] = 32
    """Number of tokens of open_clip's tokenizer that the text tower reads, the marks of start and end among them;
    longer captions are cut."""


class ClipModel(ModelBlock):
    """A CLIP (node `train.<name>`), trained on the acquired pairs before any of them is selected."""

    kind: Literal["clip"]
    """Kind of the model: a CLIP, which scores pairs or judges pictures."""
    network: ClipNetwork = ClipNetwork()
    """Shape of the image tower and of the text tower."""
    split: Split | None = None
    """Split of the acquired pairs into those that the model learns from and those that measure it. null takes
    `select.split`, so that the model learns from none that `select` holds out."""
    train: TrainSpec
    """Settings of the model's training: steps, batches, optimizer, precision and seed."""

    def completed(self, select: SelectSpec) -> Self:
        """The block with a split of its own: that of `select`, if it has none."""
        return self if self.split is not None else self.model_copy(update={"split": select.split})


class TextEncoder(Block):
    """The language model that reads the prompts."""

    encoder: Name = "minilm"
    """Language model whose token states the U-Net attends to: "minilm" (all-MiniLM-L6-v2 from its package), or a local
    folder of a transformers encoder, as a path with a slash ("./t5")."""
    tokens: Annotated[int, Field(ge=4, le=512)] = 24
    """Number of tokens of a prompt that the U-Net sees, the encoder's special tokens among them. Longer captions are
    cut, and counted."""
    form: Literal["padded"] = "padded"
    """Form of the prompt that the U-Net attends to. padded is all positions, those of padding too, as stock pipelines
    have it."""


class UNetNetwork(Block):
    """Shape of a standard UNet2DConditionModel; the names are those of its config.json."""

    block_out_channels: Channels
    """Number of channels at each resolution of the latents, from the finest; each further entry halves height and
    width."""
    layers_per_block: Layers = 2
    """Number of residual blocks at each resolution on the way down; on the way up there is one more."""
    cross_attention: tuple[bool, ...]
    """Whether there are transformer blocks with cross-attention to the prompt, for each resolution from the finest: as
    many entries as `block_out_channels` has."""
    transformer_layers_per_block: Layers = 1
    """Number of layers of each transformer block."""
    attention_head_dim: Width = 8
    """Number of attention heads, whatever the name says: config.json has meant that from the beginning. It must divide
    every entry of `block_out_channels`."""
    norm_num_groups: Width = 32
    """Number of groups of the group normalisations; it must divide every entry of `block_out_channels`."""
    use_linear_projection: bool = True
    """Whether projections into and out of transformer blocks are linear layers, as in Stable Diffusion 2, or 1x1
    convolutions, as in 1."""


class DiffusionSpec(Block):
    """What the U-Net learns to predict, and at which times. What a prediction has no use for must be left out."""

    prediction: Literal["flow", "eps", "v", "x0", "edm"] = "flow"
    """Quantity that the network predicts, and with it the process. flow is the velocity of a straight path; eps is the
    noise, x0 the clean latents and v a mixture of both, of a process in 1,000 steps; edm is EDM's mixture (Karras et
    al. 2022)."""
    schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    """Noise schedule of the predictions eps, v and x0; with others it must be left out."""
    zero_terminal_snr: bool = False
    """Whether the last step of the process is noise alone, so that very dark and very bright pictures can be made (Lin
    et al. 2023). It is for the predictions v and x0."""
    flow_shift: PositiveFloat = 1.0
    """Shift of the times of the prediction flow: above 1, more of the process is spent near the noise, as large images
    need. With other predictions it must be left out."""
    timestep_sampling: Literal["uniform", "logit_normal", "log_normal"] | None = None
    """Distribution from which training draws times. uniform favours none, logit_normal the middle; log_normal is EDM's,
    for the prediction edm alone. null takes log_normal for edm, else uniform."""
    stratified_timesteps: bool = False
    """Whether each sample of a global batch draws its time from its own part of the process, so that the loss varies
    less (Kingma et al. 2021)."""
    loss: Literal["mse", "huber", "pseudo_huber"] = "mse"
    """Penalty of the network's error: its square (mse), or one that grows only linearly beyond `huber_delta` (huber,
    and its smooth form pseudo_huber)."""
    huber_delta: PositiveFloat = 0.1
    """Error beyond which the losses huber and pseudo_huber grow linearly; mse has no use for it."""
    loss_weight: Literal["none", "min_snr", "debiased"] = "none"
    """Weight of the loss over times, for the predictions eps, v and x0. none weighs all alike; min_snr is that of Hang
    et al. 2023, debiased that of Yu et al. 2023."""
    min_snr_gamma: PositiveFloat = 5.0
    """Signal-to-noise ratio at which the loss weight min_snr is capped; other loss weights have no use for it."""
    offset_noise: NonNegativeFloat = 0.0
    """Standard deviation of the noise that all pixels of a channel share, added to their own, whose standard deviation
    is 1; 0 adds none."""
    input_perturbation: NonNegativeFloat = 0.0
    """Standard deviation, relative to the noise, of further noise that the network sees and isn't asked for (Ning et
    al. 2023): 0.1 is usual, 0 adds none."""
    caption_dropout: Fraction = 0.1
    """Share of samples that are trained with the empty prompt, which classifier-free guidance needs."""


class Sampling(Block):
    """How pictures are made from prompts, in training previews and in `evaluate`."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    """Prompts of the pictures in training previews and in the grid of `evaluate`."""
    seed: Whole = 7
    """Seed of the first prompt's picture; the others count up from it."""
    guidance_scale: PositiveFloat = 3.0
    """Scale of classifier-free guidance: above 1, pictures go more towards the prompt; 1 is without guidance, and half
    the work."""
    sampler: Name = "dpmpp_2m"
    """Solver of the backward process: ddpm, ddim, plms, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde, unipc,
    flow_euler, flow_heun, or one that a plugin registers."""
    steps: Count = 20
    """Number of steps of the sampler, fewer than 1000."""


class EncodeSpec(Block):
    """Node `encode.<model>`: what is computed once and kept in the cache."""

    batch_size: Annotated[Count, MANNER] = 64
    """Number of images encoded at once. It has no bearing on the cache beyond rounding."""


class EvaluateSpec(Block):
    """What `evaluate.<model>` measures, on pictures of the averaged weights."""

    images: Annotated[int, Field(ge=2, lt=MOST)] = 1000
    """Number of pictures, made from captions of the train split, that Frechet and kernel distances are measured on. As
    many other images are compared with them, so half the train split is the most."""
    extractor: Name = "efficientnet_lite0"
    """Network whose image features the distances are of: one of efficientnet_lite0, inception:PATH, clip:PATH,
    dinov2:PATH, with the path of weights of your own, or one that a plugin registers. Each figure carries its name."""
    judge: Name | None = None
    """CLIP that judges the pictures: a clip model among `models`, "hub:NAME/TAG" or a folder as in `score.clip`, but
    not the one that scored. null gives no CLIP score, and takes faithfulness from image features alone."""
    prompts: Count = 256
    """Number of captions, from each side of the split, that prompt faithfulness is measured on; all of them where there
    are fewer."""
    derangements: Count = 20
    """Number of shufflings in which no picture keeps its own prompt, with which prompt faithfulness compares."""
    untrained: bool = True
    """Whether the same network is measured with its initial weights too, which shows where training began."""
    batch_size: Annotated[Count, MANNER] = 64
    """Number of pictures made and measured at once. It has no bearing on the figures beyond rounding."""
    seed: Whole = 0
    """Seed of the choice of captions, of the pictures' noise, and of the shufflings."""


class TextToImageModel(ModelBlock):
    """A latent diffusion model (nodes `encode.<name>`, `train.<name>`, `evaluate.<name>`)."""

    kind: Literal["text_to_image"]
    """Kind of the model: a latent diffusion model, which makes pictures from prompts."""
    first_stage: Name
    """Name of the autoencoder among `models` whose latents the model learns to make."""
    text: TextEncoder = TextEncoder()
    """Language model that reads the prompts, and how much of them."""
    encode: EncodeSpec = EncodeSpec()
    """Settings of the cache of latents and text states that the model is trained on."""
    network: UNetNetwork
    """Shape of the U-Net that is trained."""
    diffusion: DiffusionSpec = DiffusionSpec()
    """Process that the U-Net learns to reverse: what it predicts, at which times, and how its errors weigh."""
    train: TrainSpec
    """Settings of the model's training: steps, batches, optimizer, precision and seed."""
    sampling: Sampling
    """Settings of how pictures are made from prompts, in training previews and in `evaluate`."""
    evaluate: EvaluateSpec | None = None
    """Measurements of the model's pictures. null makes a grid of the prompts, and no figures."""


Model = Annotated[AutoencoderModel | ClipModel | TextToImageModel, Field(discriminator="kind")]
AnyModel = TypeVar("AnyModel", bound=ModelBlock)
"""The block of one kind of model, in the tables of kinds."""


class ReleaseSpec(Block):
    """Node `release`: the model as a folder that stock diffusers pipelines load."""

    model: Name
    """Name of the text_to_image model among `models` that is released."""
