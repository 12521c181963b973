"""Original checkpoints of CompVis and Stability AI, whole models in one file, in and out.

    model.diffusion_model.*   first_stage_model.*   cond_stage_model.* (SD 1 and 2) or conditioner.embedders.* (SDXL)

Such a file has no configuration. Which of the published shapes it has (`LAYOUTS`) is read from its U-Net's parameters;
a checkpoint of another shape needs its `Layout`. Whatever a file has beside the three networks, such as an optimizer's
state or a schedule, is left alone. Tokenizers are CLIP's, from open_clip's vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.conditioning import TextEncoder
from ldm.conditioning.clip_text import SDXL_FIRST, SDXL_SECOND, ClipLayer, ClipTextEncoder, PairedTextEncoder
from ldm.config import NetworkConfig
from ldm.diffusion import Diffusion, DiffusionConfig, Prediction
from ldm.errors import ConfigError, EncoderMissing, FolderError
from ldm.interchange.encoders import check_text, forces_zeros, text_parts
from ldm.interchange.files import check_no_lora, check_types, read_checkpoint, write_safetensors
from ldm.interchange.keys import autoencoder_keys, ema_key, unet_keys
from ldm.interchange.networks import autoencoder_to_save, build_network
from ldm.interchange.towers import Tower, tower_from_original, tower_to_original
from ldm.model import LatentDiffusion
from ldm.shapes import SD1_INPAINT_UNET, SD1_UNET, SD2_UNET, SDXL_REFINER_UNET, SDXL_UNET, X4_UPSCALER_UNET
from ldm.unet import UNet2DCondition, UNetConfig

UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
EMA = "model_ema."
PARAMETERS = ("weight", "bias")
"""Ends of names of what is not a buffer, which may be of whole numbers."""

CLIP_L = Tower("cond_stage_model.transformer.", open_clip=False, projected=False)
OPENCLIP_H = Tower("cond_stage_model.model.", open_clip=True, projected=False, shorter=True)
SDXL_CLIP_L = Tower("conditioner.embedders.0.transformer.", open_clip=False, projected=False)
SDXL_BIGG = Tower("conditioner.embedders.1.model.", open_clip=True, projected=True)
REFINER_BIGG = Tower("conditioner.embedders.0.model.", open_clip=True, projected=True)

V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Empty entries by which later files tell that they predict v, and that their noise ends without any signal."""
FOREIGN = ("edm_mean", "edm_vpred.sigma_max")
"""Entries of files that were trained otherwise than their shape is known for."""


@dataclass(frozen=True)
class Layout:
    """All that an original checkpoint does not say of itself."""

    unet: UNetConfig
    autoencoder: AutoencoderConfig
    towers: tuple[Tower, ...]
    diffusion: DiffusionConfig | None
    """The process that models of this shape were trained for. None: models of this shape were trained with several
    predictions."""
    zeros: bool = False
    """Whether the null condition is zeros, and not the empty prompt."""
    aesthetics_score: bool = False
    low_res_diffusion: DiffusionConfig | None = None
    max_noise_level: int = LatentDiffusion.max_noise_level


SD_AUTOENCODER = AutoencoderConfig(sample_size=512)
SD2_AUTOENCODER = AutoencoderConfig(sample_size=768)
SDXL_AUTOENCODER = AutoencoderConfig(sample_size=1024, scaling_factor=0.13025)
X4_AUTOENCODER = AutoencoderConfig(block_out_channels=(128, 256, 512), scaling_factor=0.08333)
EPS = DiffusionConfig("eps")
X4_NOISE = DiffusionConfig("eps", beta_start=1e-4, beta_end=0.02)

LAYOUTS = {
    "sd1": Layout(SD1_UNET, SD_AUTOENCODER, (CLIP_L,), EPS),
    "sd1-inpaint": Layout(SD1_INPAINT_UNET, SD_AUTOENCODER, (CLIP_L,), EPS),
    "sd2": Layout(SD2_UNET, SD2_AUTOENCODER, (OPENCLIP_H,), None),
    "sd2-inpaint": Layout(
        dataclasses.replace(SD2_UNET, in_channels=9, sample_size=64), SD_AUTOENCODER, (OPENCLIP_H,), EPS
    ),
    "sdxl": Layout(SDXL_UNET, SDXL_AUTOENCODER, (SDXL_CLIP_L, SDXL_BIGG), EPS, zeros=True),
    "sdxl-inpaint": Layout(
        dataclasses.replace(SDXL_UNET, in_channels=9), SDXL_AUTOENCODER, (SDXL_CLIP_L, SDXL_BIGG), EPS, zeros=True
    ),
    "sdxl-refiner": Layout(SDXL_REFINER_UNET, SDXL_AUTOENCODER, (REFINER_BIGG,), EPS, aesthetics_score=True),
    "x4-upscaler": Layout(
        X4_UPSCALER_UNET,
        X4_AUTOENCODER,
        (OPENCLIP_H,),
        dataclasses.replace(X4_NOISE, prediction="v"),
        low_res_diffusion=X4_NOISE,
    ),
}
"""Layouts of the published models."""

# -- in ----------------------------------------------------------------------------------------------------------------


def load_single_file(
    path: Path,
    *,
    layout: Layout | None = None,
    prediction: Prediction | None = None,
    ema: bool = False,
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
) -> LatentDiffusion:
    """The model in an original checkpoint, on the CPU, ready to generate, its networks in `dtype`; with float16, the
    autoencoder of an SDXL stays float32.

    `layout` None: that of the published model with such parameters. `prediction` takes the place of the layout's; it
    has to be given for Stable Diffusion 2 ("v" for 768 pixels, "eps" for the base model), of which the file does not
    tell. `ema`: the moving average of the U-Net's weights, where the file has it beside them. `allow_pickle`: a .ckpt
    is read, as plain tensors only.

    Raises `FolderError` if the file is absent, corrupt, a pickle that is not asked for, of an unknown shape, or
    without one of the networks; `ConfigError` if the prediction is needed.
    """
    found = read_checkpoint(path, allow_pickle=allow_pickle)
    check_no_lora(path, found)
    if layout is None:
        layout = _published(found, path)
    parts = (UNET, AUTOENCODER, *(tower.prefix for tower in layout.towers))
    check_types(path, {name: found[name] for name in found if name.startswith(parts) and name.endswith(PARAMETERS)})
    diffusion = layout.diffusion or (DiffusionConfig(prediction) if prediction else None)
    if diffusion is None:
        raise ConfigError(f"{path} doesn't tell what it predicts: give prediction, 'eps' or 'v'")
    if prediction is not None:
        diffusion = dataclasses.replace(diffusion, prediction=prediction)
    unet = build_network(UNet2DCondition, layout.unet, _unet(found, layout, path, ema), dtype, path, "its layout")
    keys = autoencoder_keys(layout.autoencoder)
    weights = _linear(_renamed(_within(found, AUTOENCODER, path), keys))
    low_res = layout.low_res_diffusion
    # SDXL's activations are more than float16 can hold.
    of_pixels = torch.float32 if dtype == torch.float16 and layout.unet.takes_pooled else dtype
    return LatentDiffusion(
        unet=unet.eval(),
        autoencoder=build_network(AutoencoderKL, layout.autoencoder, weights, of_pixels, path, "its layout").eval(),
        text_encoder=_text(found, layout, path, dtype),
        diffusion=Diffusion(diffusion),
        low_res_diffusion=None if low_res is None else Diffusion(low_res),
        max_noise_level=layout.max_noise_level,
        aesthetics_score=layout.aesthetics_score,
    )


def layout_of(model: LatentDiffusion) -> Layout:
    """What `load_single_file` needs for this model beside its file, if that is none of `LAYOUTS`.

    Raises `FolderError` for encoders that original checkpoints have no place for.
    """
    low_res, pooled = model.low_res_diffusion, model.unet.config.takes_pooled
    return Layout(
        model.unet.config,
        autoencoder_to_save(model.autoencoder).config,
        _towers(_networks(model), pooled),
        model.diffusion.config,
        zeros=forces_zeros(model.text_encoder),
        aesthetics_score=model.aesthetics_score,
        low_res_diffusion=None if low_res is None else low_res.config,
        max_noise_level=model.max_noise_level,
    )


def _published(found: Mapping[str, Tensor], path: Path) -> Layout:
    """The layout of the published model with these parameters, with what the file tells of its training."""
    foreign = sorted(set(FOREIGN) & set(found))
    if foreign:
        raise FolderError(f"{path} has {foreign[0]}: it was trained in a way that is not known here, give its layout")
    layout = LAYOUTS[detect(found, path)]
    diffusion = layout.diffusion
    if V_PREDICTION in found:
        diffusion = dataclasses.replace(diffusion or EPS, prediction="v")
    if ZERO_SNR in found and diffusion is not None:
        diffusion = dataclasses.replace(diffusion, zero_terminal_snr=True)
    return dataclasses.replace(layout, diffusion=diffusion)


def detect(found: Mapping[str, Tensor], path: Path) -> str:
    """Which of `LAYOUTS` the checkpoint's U-Net has: by the channels it takes, and the widths of its conditions.

    Raises `FolderError` if it has none of them.
    """
    signature = _signature({name.removeprefix(UNET): value for name, value in found.items() if name.startswith(UNET)})
    name = _layout_name(signature)
    if name is not None:
        return name
    if signature[0] is None:
        raise FolderError(f"{path} has no {UNET}input_blocks: it is not an original checkpoint of Stable Diffusion")
    raise FolderError(
        f"{path} is of an unknown shape: its U-Net takes {signature[0]} channels, contexts {signature[1]} wide, "
        f"vectors {signature[2]} wide and {signature[3]} noise levels; known are {', '.join(LAYOUTS)}: give its layout"
    )


def _layout_name(signature: tuple[int | None, ...]) -> str | None:
    for name, layout in LAYOUTS.items():
        config = layout.unet
        if signature == (
            config.in_channels,
            config.cross_attention_dim,
            config.projection_class_embeddings_input_dim,
            config.num_class_embeds,
        ):
            return name
    return None


def _signature(unet: Mapping[str, Tensor]) -> tuple[int | None, ...]:
    def size(name: str, axis: int) -> int | None:
        return unet[name].shape[axis] if name in unet and unet[name].ndim > axis else None

    context = next((name for name in sorted(unet) if name.endswith("attn2.to_k.weight")), "")
    places = (("input_blocks.0.0.weight", 1), (context, 1), ("label_emb.0.0.weight", 1), ("label_emb.weight", 0))
    return tuple(size(name, axis) for name, axis in places)


def _unet(found: Mapping[str, Tensor], layout: Layout, path: Path, ema: bool) -> dict[str, Tensor]:
    keys = unet_keys(layout.unet)
    if not ema:
        return _renamed(_within(found, UNET, path), keys)
    averages = {ours: ema_key(theirs) for ours, theirs in keys.items()}
    own = {name: found[name] for name in averages.values() if name in found}
    if not own:
        raise FolderError(f"{path} has no {EMA}*: it is without a moving average, leave ema out")
    return _renamed(own, averages)


def _within(found: Mapping[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    own = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    if not own:
        raise FolderError(f"{path} has no {prefix}*: it is not a whole model")
    # Of the autoencoder's training: its discriminator and perceptual distance.
    return {name: value for name, value in own.items() if not name.startswith(("loss.", "model_ema."))}


def _renamed(found: Mapping[str, Tensor], keys: Mapping[str, str]) -> dict[str, Tensor]:
    """By our names; what has none keeps its own, to be told of."""
    ours = {theirs: name for name, theirs in keys.items()}
    return {ours.get(name, name): value for name, value in found.items()}


def _linear(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's attention: its 1x1 convolutions as linear layers."""
    return {
        name: value[:, :, 0, 0] if ".attentions." in name and value.shape[2:] == (1, 1) else value
        for name, value in weights.items()
    }


def _text(found: Mapping[str, Tensor], layout: Layout, path: Path, dtype: torch.dtype) -> TextEncoder:
    layers = (SDXL_FIRST, SDXL_SECOND)[-len(layout.towers) :] if layout.unet.takes_pooled else (ClipLayer(),)
    encoders = []
    for tower, layer in zip(layout.towers, layers, strict=True):
        name = "text_encoder_2" if layer == SDXL_SECOND else "text_encoder"
        network = tower_from_original(tower, found, path, dtype)
        encoders.append(ClipTextEncoder(network, _tokenizer(tower), name=name, layer=layer))
    if len(encoders) == 1:
        return encoders[0]
    return PairedTextEncoder(*encoders, null="zeros" if layout.zeros else "empty")


def _tokenizer(tower: Tower) -> Any:
    """CLIP's, as the published folders have it: after the end, its own towers read the end again, open_clip's "!"."""
    from transformers import CLIPTokenizer

    source = _vocabulary()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return CLIPTokenizer(
        vocab={special.get(token, token): number for token, number in source.encoder.items()},
        merges=list(source.bpe_ranks),
        pad_token="!" if tower.open_clip else "<|endoftext|>",
        model_max_length=source.context_length,
    )


@functools.cache
def _vocabulary() -> Any:
    """The tokenizer of open_clip, whose vocabulary takes longer to read than the networks of a small model."""
    try:
        from open_clip import SimpleTokenizer
    except ImportError as error:
        raise EncoderMissing(
            "CLIP's vocabulary comes in open_clip, which is not installed: pip install open_clip_torch"
        ) from error
    return SimpleTokenizer()


# -- out ---------------------------------------------------------------------------------------------------------------


def save_single_file(model: LatentDiffusion, path: Path, *, layout_kept: bool = False) -> None:
    """Write the model as one original checkpoint in safetensors, its weights in their dtypes.

    The file has no configuration, and keeps no spacing. A model of none of the published shapes is only loaded with its
    `layout_of`. `layout_kept`: so will this one be, though it has a published model's shape.

    Raises `FolderError` for another suffix, for encoders that such checkpoints have no place for, and, without
    `layout_kept`, for a model that would be taken for the published one of its shape, and isn't.
    """
    if path.suffix != ".safetensors":
        raise FolderError(f"{path}: original checkpoints are written as .safetensors only")
    networks = _networks(model)
    weights: dict[str, Tensor] = {}
    for tower, network in zip(_towers(networks, model.unet.config.takes_pooled), networks, strict=True):
        weights |= tower_to_original(tower, network)
    keys = unet_keys(model.unet.config)
    weights |= {UNET + keys[name]: value for name, value in model.unet.state_dict().items()}
    autoencoder = autoencoder_to_save(model.autoencoder)
    keys = autoencoder_keys(autoencoder.config)
    for name, value in autoencoder.state_dict().items():
        convolution = ".attentions." in name and value.ndim == 2
        weights[AUTOENCODER + keys[name]] = value[:, :, None, None] if convolution else value
    process = model.diffusion.config
    if process.prediction == "v":
        marks = [V_PREDICTION, *([ZERO_SNR] if process.zero_terminal_snr else [])]
        weights |= {name: torch.zeros(0) for name in marks}
    if not layout_kept:
        _check_told(model, weights, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, weights)


def _check_told(model: LatentDiffusion, weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises `FolderError` if the weights are of a published shape, but would be loaded as another model."""
    own = {name.removeprefix(UNET): value for name, value in weights.items() if name.startswith(UNET)}
    if _layout_name(_signature(own)) is None:
        return
    known = _published(weights, path)
    if known.diffusion is None:  # then the caller says the prediction, and nothing else
        known = dataclasses.replace(known, diffusion=DiffusionConfig("v" if V_PREDICTION in weights else "eps"))
    ours, theirs = _by_name(layout_of(model)), _by_name(known)
    lost = [f"{name} = {ours[name]!r} (loaded as {theirs[name]!r})" for name in ours if ours[name] != theirs[name]]
    if lost:
        raise FolderError(
            f"{path}: would be taken for a published model, as the file can't tell {', '.join(lost)}: save a folder, by"
            " save_model, or give layout_kept=True, and layout_of(model) to load_single_file"
        )


def _by_name(layout: Layout) -> dict[str, object]:
    """All that a layout says, by name; but the sizes of training images, by which no weight is read otherwise."""
    said: dict[str, object] = {}
    for part in dataclasses.fields(layout):
        value = getattr(layout, part.name)
        if isinstance(value, NetworkConfig):
            inner = {name: each for name, each in value.to_dict().items() if name != "sample_size"}
        elif isinstance(value, DiffusionConfig):
            inner = {"prediction": value.prediction} | value.process
        elif part.name == "low_res_diffusion":
            inner = dict.fromkeys(("prediction", *EPS.process))
        else:
            said[part.name] = value
            continue
        said |= {f"{part.name}.{name}": each for name, each in inner.items()}
    return said


def _networks(model: LatentDiffusion) -> list[Any]:
    if model.image_encoder is not None:
        raise FolderError("image variation models have no original checkpoint here: save a folder, by save_model")
    check_text(model.text_encoder, towers=model.unet.config.takes_pooled)
    networks = [part.network for part in text_parts(model.text_encoder).values()]
    for network in networks:
        if network.config.model_type != "clip_text_model":
            raise FolderError(
                f"{type(network).__name__} has no place in an original checkpoint, only CLIP's towers have"
            )
    return networks


def _towers(networks: list[Any], pooled: bool) -> tuple[Tower, ...]:
    if pooled:
        return LAYOUTS["sdxl" if len(networks) == 2 else "sdxl-refiner"].towers
    # Of the two, only CLIP's own has this activation.
    return (CLIP_L,) if networks[0].config.hidden_act == "quick_gelu" else (OPENCLIP_H,)
