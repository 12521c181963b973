"""Encoders of conditions in diffusers' model folders: which states of which networks each pipeline reads.

text_encoder/ tokenizer/    text_encoder_2/ tokenizer_2/    image_encoder/ feature_extractor/
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.conditioning import Conditioning, TextEncoder
from ldm.conditioning.clip_text import SDXL_FIRST, SDXL_SECOND, ClipLayer, ClipTextEncoder, PairedTextEncoder
from ldm.conditioning.image import BICUBIC, PREPROCESSOR, ImageEncoder, ImagePreprocessing
from ldm.conditioning.pretrained import load_processor, quiet, read_config, read_json
from ldm.conditioning.text import TransformersTextEncoder, load_text_folders
from ldm.errors import ConfigError, FolderError, InputError
from ldm.interchange.files import in_file, read_weights, write_json
from ldm.interchange.index import check_class, flag, tokenizer_class
from ldm.interchange.networks import CONFIG
from ldm.interchange.towers import build_transformer

WEIGHTS = "model.safetensors"
PICKLE = "pytorch_model.bin"
CLIP_TYPES = ("clip_text_model", "clip")
FORCE_ZEROS = "force_zeros_for_empty_prompt"

Entries = dict[str, list[str | None]]
"""Components of model_index.json: name to (library, class)."""


@dataclass(frozen=True)
class Source:
    """A model folder, whose encoders are read in one dtype, by one variant, and with pickles or without."""

    folder: Path
    dtype: torch.dtype
    variant: str | None
    allow_pickle: bool

    def transformer(self, part: str, kind: str) -> Any:
        """The network in the sub-folder `part`, as transformers' class `kind`. Raises `FolderError`."""
        import transformers
        from huggingface_hub.errors import StrictDataclassError

        path = self.folder / part / CONFIG
        check_class(self.folder, part, (kind,))
        read_config(path)
        try:
            config = getattr(transformers, kind).config_class.from_pretrained(path.parent)
        except (OSError, ValueError, TypeError, StrictDataclassError) as error:
            raise FolderError(f"{path} is not of a {kind}: {error}") from error
        config.return_dict = True  # the form of outputs, which is read by name here
        file, weights = read_weights(
            path.parent / WEIGHTS, variant=self.variant, allow_pickle=self.allow_pickle, pickle_name=PICKLE
        )
        return build_transformer(kind, config, weights, self.dtype, str(file))

    def tower(self, number: str, layer: ClipLayer) -> ClipTextEncoder:
        """The tower in text_encoder`number`, with its tokenizer."""
        kind = "CLIPTextModelWithProjection" if layer.pooled else "CLIPTextModel"
        network = self.transformer(f"text_encoder{number}", kind)
        if layer != ClipLayer():
            network.config.use_attention_mask = False  # the stock pipelines of XL don't ask
        folder = self.folder / f"tokenizer{number}"
        tokenizer = load_processor(folder, tokenizer_class(self.folder, folder.name, "CLIPTokenizer"))
        try:
            return ClipTextEncoder(network, tokenizer, name=f"text_encoder{number}", layer=layer)
        except ConfigError as error:
            raise ConfigError(f"{folder}: model_max_length = {tokenizer.model_max_length}: {error}") from error


class NoTextEncoder:
    """Stands in for the text encoder of a model that reads images, and says so when it is asked to read a prompt."""

    width = 0
    length = 0
    identity = "none"

    def encode(self, prompts: list[str]) -> Conditioning:
        """Raises `InputError`."""
        raise InputError(f"{len(prompts)} prompts for a model that reads images and no text: give images")

    def null(self, count: int) -> Conditioning:
        """Raises `InputError`."""
        return self.encode([""] * count)


# -- text --------------------------------------------------------------------------------------------------------------


def load_text(source: Source) -> TextEncoder:
    """The one text encoder of a Stable Diffusion 1 or 2: a tower of CLIP, or any encoder of transformers, of which no
    pickle is read."""
    path = source.folder / "text_encoder" / CONFIG
    if read_json(path).get("model_type") in CLIP_TYPES:
        return source.tower("", ClipLayer())
    tokenizer = source.folder / "tokenizer"
    kind = tokenizer_class(source.folder, "tokenizer", "AutoTokenizer")
    try:
        encoder = load_text_folders(
            path.parent, tokenizer, name="text_encoder", variant=source.variant, tokenizer_kind=kind
        )
    except ConfigError as error:
        raise ConfigError(f"{tokenizer}: model_max_length: {error}") from error
    check_class(source.folder, "text_encoder", (type(encoder.network).__name__,))
    encoder.network.to(source.dtype)
    return encoder


def load_towers(source: Source, index: Mapping[str, Any]) -> TextEncoder:
    """The towers of a Stable Diffusion XL: both, or the second alone as in its refiner."""
    second = source.tower("_2", SDXL_SECOND)
    zeros = flag(index, FORCE_ZEROS, True)
    first = index.get("text_encoder")
    if not isinstance(first, list | None):
        raise ConfigError(f"text_encoder = {first!r}: must be a list of library and class")
    if any((first or [None])[1:2]):
        return PairedTextEncoder(source.tower("", SDXL_FIRST), second, null="zeros" if zeros else "empty")
    if zeros:
        raise ConfigError(f"{FORCE_ZEROS} = true with text_encoder_2 alone: only false is supported")
    return second


def save_text(encoder: TextEncoder, folder: Path) -> Entries:
    """Write the encoder's folders. Raises `FolderError` if it is of no kind that diffusers' pipelines have."""
    parts = text_parts(encoder)
    entries: Entries = {}
    for number, each in parts.items():
        assert isinstance(each, TransformersTextEncoder)
        each.save(folder / f"text_encoder{number}", folder / f"tokenizer{number}")
        entries[f"text_encoder{number}"] = ["transformers", type(each.network).__name__]
        entries[f"tokenizer{number}"] = ["transformers", type(each.tokenizer).__name__]
    return entries


def check_text(encoder: TextEncoder, *, towers: bool) -> None:
    """Raises `FolderError` unless the encoder can be saved, and is what its pipeline reads: SDXL's `towers`, or not."""
    layers = [getattr(part, "layer", ClipLayer()) for part in text_parts(encoder).values()]
    expected = [SDXL_FIRST, SDXL_SECOND][-len(layers) :] if towers else [ClipLayer()]
    if layers != expected:
        raise FolderError(f"the text encoder reads {layers}, the stock pipeline {expected}: it would make other images")
    for part in text_parts(encoder).values():
        if part.form != "padded" or part.long_prompts != "cut":
            found = f"form = {part.form!r}, long_prompts = {part.long_prompts!r}"
            raise FolderError(f"{found}: the stock pipeline has padded contexts of prompts that are cut, and no others")


def forces_zeros(encoder: TextEncoder) -> bool:
    """Whether the null condition is zeros instead of the empty prompt."""
    return not bool(encoder.null(1).context.any())


def text_parts(encoder: TextEncoder) -> dict[str, TransformersTextEncoder]:
    """The encoder's networks by the ends of their folders' names."""
    if isinstance(encoder, PairedTextEncoder):
        parts = {"": encoder.first, "_2": encoder.second}
    else:
        parts = {"_2" if getattr(encoder, "layer", None) == SDXL_SECOND else "": encoder}
    found = {}
    for number, part in parts.items():
        if not isinstance(part, TransformersTextEncoder):
            raise FolderError(f"{type(part).__name__} can't be saved: only transformers encoders can")
        found[number] = part
    return found


# -- images ------------------------------------------------------------------------------------------------------------


def load_image(source: Source) -> ImageEncoder:
    """The vision tower of an image variation model."""
    path = source.folder / "feature_extractor" / PREPROCESSOR
    preprocessing = in_file(path, ImagePreprocessing.from_dict, read_json(path))
    network = source.transformer("image_encoder", "CLIPVisionModelWithProjection")
    return ImageEncoder(network, preprocessing, name="image_encoder")


def save_image(encoder: ImageEncoder, folder: Path) -> Entries:
    """Write the tower and its preprocessing. Raises `FolderError` for contexts that the stock pipeline doesn't have."""
    if encoder.form != "embedding":
        raise FolderError(f"form = {encoder.form!r}: the stock pipeline reads embeddings, and would make other images")
    with quiet():
        encoder.network.save_pretrained(folder / "image_encoder")
    (folder / "feature_extractor").mkdir(exist_ok=True)
    write_json(folder / "feature_extractor" / PREPROCESSOR, _preprocessor(encoder.preprocessing))
    return {
        "image_encoder": ["transformers", type(encoder.network).__name__],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }


def _preprocessor(preprocessing: ImagePreprocessing) -> dict[str, Any]:
    height, width = preprocessing.crop
    crop = {"height": height, "width": width}
    edge = preprocessing.shortest_edge
    return {
        "crop_size": crop,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(preprocessing.mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(preprocessing.std),
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
        "size": crop if edge is None else {"shortest_edge": edge},
    }
