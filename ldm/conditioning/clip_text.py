"""Text by the text towers of CLIP (Radford et al. 2021), as the Stable Diffusion models read it.

Which of a tower's states are the context differs:

- Stable Diffusion 1 (CLIP ViT-L/14): the last layer's, after the final norm;
- Stable Diffusion 2 (OpenCLIP ViT-H/14): the penultimate layer's, after the final norm. Diffusers folders have the
  tower without its last layer, to be read as Stable Diffusion 1's; an open_clip folder has the whole tower;
- Stable Diffusion XL (CLIP ViT-L/14 and OpenCLIP ViT-bigG/14): the penultimate layers' of both towers, side by side,
  without the final norms, and the second tower's projected embedding of the whole (Podell et al. 2023, section 2.1).

Prompts fill 77 tokens, and all positions are attended to. Causal attention makes padding harmless to what precedes it,
so it is not hidden from the towers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from ldm.clip import CONFIG, WEIGHTS
from ldm.conditioning import Conditioning, TextEncoder
from ldm.conditioning.pretrained import device_of, load_pretrained, load_processor, read_json, weights_sha256
from ldm.conditioning.prompts import LongPrompts, Tokens, check_prompts, warn_of_cuts
from ldm.conditioning.text import MOST_TOKENS, EmptyPrompt, TransformersTextEncoder
from ldm.errors import ConfigError, FolderError, InputError

Null = Literal["empty", "zeros"]


@dataclass(frozen=True)
class ClipLayer:
    """Which states of a tower are the context."""

    skipped: int = 0
    """Layers from the last that are left out; `clip_skip` of user interfaces that count from 1 is this and one."""
    final_norm: bool = True
    pooled: bool = False
    """Give the tower's projected embedding too: of the last layer, whatever is skipped."""

    def __post_init__(self) -> None:
        if self.skipped < 0:
            raise ConfigError(f"skipped layers = {self.skipped}: must be 0 or more")

    def check(self, layers: int) -> None:
        """Raises `ConfigError` if a tower of so many layers has no such states."""
        if self.skipped >= layers:
            raise ConfigError(f"skipped layers = {self.skipped}: the tower has {layers}, at least one must be left")

    @property
    def suffix(self) -> str:
        """What an identity has after the weights', so that other states are another encoder's."""
        return "" if self == ClipLayer() else f"#skip={self.skipped},norm={self.final_norm},pooled={self.pooled}"


STABLE_DIFFUSION = ClipLayer()
OPENCLIP = ClipLayer(skipped=1, pooled=True)
SDXL_FIRST = ClipLayer(skipped=1, final_norm=False)
SDXL_SECOND = ClipLayer(skipped=1, final_norm=False, pooled=True)


# -- transformers ------------------------------------------------------------------------------------------------------


def load_clip_text(
    model: Path,
    tokenizer: Path,
    *,
    name: str,
    layer: ClipLayer = STABLE_DIFFUSION,
    long_prompts: LongPrompts = "cut",
) -> ClipTextEncoder:
    """The tower and tokenizer of a diffusers model's `text_encoder` and `tokenizer` folders.

    Raises `FolderError` if files are absent or corrupt, weights are pickles or don't fit; `ConfigError` for a layer
    that the tower lacks.
    """
    kind = "CLIPTextModelWithProjection" if layer.pooled else "CLIPTextModel"
    if read_json(model / "config.json").get("model_type") not in ("clip_text_model", "clip"):
        raise FolderError(f"{model / 'config.json'}: model_type must be clip_text_model or clip, for a tower of CLIP")
    # transformers takes an empty folder for a tokenizer without words.
    if not (tokenizer / "tokenizer.json").is_file() and not (tokenizer / "vocab.json").is_file():
        raise FolderError(f"{tokenizer} has neither tokenizer.json, nor vocab.json with merges.txt: not a tokenizer")
    network = load_pretrained(model, kind)
    reader = load_processor(tokenizer, "CLIPTokenizer")
    return ClipTextEncoder(network, reader, name=name, layer=layer, long_prompts=long_prompts)


class ClipTextEncoder(TransformersTextEncoder):
    """A frozen tower of transformers: CLIPTextModel, or CLIPTextModelWithProjection for pooled embeddings."""

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        *,
        name: str,
        layer: ClipLayer = STABLE_DIFFUSION,
        long_prompts: LongPrompts = "cut",
    ) -> None:
        """Prompts fill as many tokens as the tokenizer's `model_max_length` says, as in the stock pipelines; where it
        says nothing, the tower's positions.

        Raises `ConfigError` for a layer that the tower lacks, pooled embeddings of one without a projection, or a
        tokenizer of more tokens than the tower has positions."""
        told, positions = tokenizer.model_max_length, network.config.max_position_embeddings
        super().__init__(
            network,
            tokenizer,
            name=name,
            length=told if told <= MOST_TOKENS else positions,
            long_prompts=long_prompts,
        )
        layer.check(network.config.num_hidden_layers)
        if layer.pooled and not hasattr(network, "text_projection"):
            raise ConfigError(f"{name}: pooled embeddings need a tower with a projection, CLIPTextModelWithProjection")
        if getattr(network.config, "use_attention_mask", None) is None:
            network.config.use_attention_mask = False
        self.layer = layer

    @property
    def identity(self) -> str:
        """`name@sha256:…` over the weights, and which states are taken if not the last."""
        return super().identity + self.layer.suffix

    def _states(self, ids_NL: Tensor, seen_NL: Tensor | None) -> tuple[Tensor, Tensor | None]:
        mask = None if seen_NL is None else seen_NL.long()
        output = self.network(ids_NL, attention_mask=mask, output_hidden_states=True, return_dict=True)
        states: Tensor = output.hidden_states[-1 - self.layer.skipped]
        if self.layer.final_norm:
            tower = getattr(self.network, "text_model", self.network)
            states = tower.final_layer_norm(states)
        return states, output.text_embeds if self.layer.pooled else None


# -- open_clip ---------------------------------------------------------------------------------------------------------


def load_open_clip_text(
    folder: Path, *, layer: ClipLayer = OPENCLIP, long_prompts: LongPrompts = "cut"
) -> OpenClipTextEncoder:
    """The text tower of a folder in open_clip's layout: open_clip_config.json and open_clip_model.safetensors.

    Raises `FolderError` if a file is absent or corrupt, or the tower is not a transformer of open_clip's own;
    `ConfigError` for a layer that it lacks.
    """
    import open_clip
    from safetensors import SafetensorError

    for needed in (CONFIG, WEIGHTS):
        if not (folder / needed).is_file():
            raise FolderError(f"{folder / needed} is absent: give a folder of open_clip with weights in safetensors")
    text = read_json(folder / CONFIG).get("model_cfg", {}).get("text_cfg", {})
    foreign = sorted({"hf_model_name", "hf_tokenizer_name", "embed_cls"} & set(text))
    if foreign:
        raise FolderError(f"{folder / CONFIG}: {foreign[0]} is set, only open_clip's own text towers are supported")
    try:
        model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise FolderError(f"the open_clip model in {folder} can't be read: {error}") from error
    del model.visual
    return OpenClipTextEncoder(model, tokenizer, name=folder.name, layer=layer, long_prompts=long_prompts)


class OpenClipTextEncoder(EmptyPrompt):
    """A frozen open_clip text tower with its tokenizer."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        layer: ClipLayer = OPENCLIP,
        long_prompts: LongPrompts = "cut",
    ) -> None:
        """`model` is an open_clip model, with or without its image tower. Raises `ConfigError` for a layer that it
        lacks, or an unknown way with long prompts."""
        if long_prompts not in get_args(LongPrompts):
            raise ConfigError(f"long_prompts = {long_prompts!r}: must be one of {', '.join(get_args(LongPrompts))}")
        network = model.text if hasattr(model, "text") else model
        layer.check(len(network.transformer.resblocks))
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.layer = layer
        self.long_prompts = long_prompts

    @property
    def width(self) -> int:
        return int(self.network.ln_final.weight.shape[0])

    @property
    def length(self) -> int:
        """Tokens of a prompt, or of each of its chunks."""
        return int(self.network.positional_embedding.shape[0])

    @property
    def identity(self) -> str:
        """`name@sha256:…` over the tower's weights, and which states are taken."""
        weights = {name: value for name, value in self.network.state_dict().items() if not name.startswith("visual.")}
        return f"{self.name}@sha256:{weights_sha256(weights)}{self.layer.suffix}"

    def to(self, device: torch.device | str) -> Self:
        """The same encoder, moved."""
        self.network.to(device)
        return self

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> Conditioning:
        """The prompts' states [len(prompts), length, width] and pooled embeddings, float32; long prompts as in
        `TransformersTextEncoder.encode`. Raises `InputError` if `prompts` is not a list of strings, or empty."""
        check_prompts(prompts)
        tokens = self._tokens(prompts)
        states, pooled = self._states(tokens.ids.to(device_of(self.network)))
        context, mask = tokens.context(states.float(), hide_padding=False)
        with torch.inference_mode(False):
            return Conditioning(
                context.clone(),
                None if mask is None else mask.clone(),
                tokens.first(pooled.float()).clone() if self.layer.pooled else None,
            )

    def _tokens(self, prompts: list[str]) -> Tokens:
        room = self.length - 2
        read = [self.tokenizer.encode(prompt) for prompt in prompts]
        if self.long_prompts == "cut":
            warn_of_cuts(prompts, [len(ids) + 2 for ids in read], self.length)
            read = [ids[:room] for ids in read]
        parts = [[ids[at : at + room] for at in range(0, len(ids) or 1, room)] for ids in read]
        rows = [[self.tokenizer.sot_token_id, *part, self.tokenizer.eot_token_id] for each in parts for part in each]
        padded = torch.tensor([row + [0] * (self.length - len(row)) for row in rows])
        real = torch.arange(self.length) < torch.tensor([len(row) for row in rows])[:, None]
        return Tokens(padded, real, tuple(len(each) for each in parts))

    def _states(self, ids_NL: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's states [N, L, width], and the projected embeddings [N, P]; one pass for both."""
        kept: list[Tensor] = []
        block = self.network.transformer.resblocks[-1 - self.layer.skipped]
        hook = block.register_forward_hook(lambda _module, _given, output: kept.append(output))
        try:
            pooled = (
                self.network(ids_NL) if not hasattr(self.network, "encode_text") else self.network.encode_text(ids_NL)
            )
        finally:
            hook.remove()
        (states,) = kept
        if not getattr(self.network.transformer, "batch_first", True):
            states = states.transpose(0, 1)
        return self.network.ln_final(states) if self.layer.final_norm else states, pooled


# -- two towers --------------------------------------------------------------------------------------------------------


class PairedTextEncoder:
    """Two towers on the same prompts: contexts side by side on the width, pooled embeddings of those that give them.

    The null is the empty prompt; or zeros, context and pooled, as models with `force_zeros_for_empty_prompt` were
    trained (the base model of Stable Diffusion XL).
    """

    def __init__(self, first: TextEncoder, second: TextEncoder, *, null: Null = "empty") -> None:
        """Raises `ConfigError` for towers of differing lengths, or an unknown null."""
        if first.length != second.length:
            raise ConfigError(f"the towers read {first.length} and {second.length} tokens: lengths must be equal")
        if null not in get_args(Null):
            raise ConfigError(f"null = {null!r}: must be one of {', '.join(get_args(Null))}")
        self.first, self.second = first, second
        self._null = null

    @property
    def width(self) -> int:
        return self.first.width + self.second.width

    @property
    def length(self) -> int:
        return self.first.length

    @property
    def identity(self) -> str:
        """The identities of both towers, and the null if it is zeros."""
        return f"{self.first.identity}+{self.second.identity}{'#zeros' if self._null == 'zeros' else ''}"

    def encode(self, prompts: list[str]) -> Conditioning:
        """The prompts' states [len(prompts), length, width] and pooled embeddings, float32. Raises `InputError` if
        `prompts` is not a list of strings, or empty, or the towers split them differently."""
        return self._paired(self.first.encode(prompts), self.second.encode(prompts))

    def _paired(self, first: Conditioning, second: Conditioning) -> Conditioning:
        if first.context.shape[1] != second.context.shape[1]:
            raise InputError(
                f"the towers have {first.context.shape[1]} and {second.context.shape[1]} positions for these prompts: "
                "tokenizers must split alike, use long_prompts = 'cut'"
            )
        pooled = [part.pooled for part in (first, second) if part.pooled is not None]
        return Conditioning(
            torch.cat([first.context, second.context], dim=2), first.mask, torch.cat(pooled, dim=1) if pooled else None
        )

    def null(self, count: int) -> Conditioning:
        """`count` times the null condition, sharing memory."""
        empty = self._paired(self.first.null(1), self.second.null(1))
        if self._null == "zeros":
            pooled = None if empty.pooled is None else torch.zeros_like(empty.pooled)
            empty = Conditioning(torch.zeros_like(empty.context), empty.mask, pooled)
        return empty.expand(count)


def load_sdxl_text(folder: Path, *, null: Null = "zeros", long_prompts: LongPrompts = "cut") -> PairedTextEncoder:
    """The two towers of a diffusers folder of Stable Diffusion XL. Raises `FolderError` as `load_clip_text`."""
    first, second = (
        load_clip_text(folder / f"text_encoder{n}", folder / f"tokenizer{n}", name=f"text_encoder{n}", layer=layer,
                       long_prompts=long_prompts)
        for n, layer in (("", SDXL_FIRST), ("_2", SDXL_SECOND))
    )  # fmt: skip
    return PairedTextEncoder(first, second, null=null)
