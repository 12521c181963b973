"""Prompts as tokens, for encoders that take so many at once and no more.

A prompt over the limit is cut and a warning logged, or kept in chunks: each chunk is read alone, with its own special
tokens, and the chunks' states follow one another in the context.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ldm.errors import ConfigError, InputError

logger = logging.getLogger(__name__)

LongPrompts = Literal["cut", "chunks"]


@dataclass(frozen=True)
class Tokens:
    """Prompts as N chunks of L tokens, each prompt's in a row."""

    ids: Tensor
    """Int64 [N, L]."""
    real: Tensor
    """Bool [N, L]: false for padding."""
    chunks: tuple[int, ...]
    """How many chunks each prompt has."""

    def context(self, states_NLD: Tensor, *, hide_padding: bool) -> tuple[Tensor, Tensor | None]:
        """States [B, chunks·L, D] and mask of prompts, from those of chunks.

        Prompts with fewer chunks than the batch's longest are filled up, and what fills them is masked, so that a
        prompt does not depend on its batch. There is no mask where all may be attended to.
        """
        device, most = states_NLD.device, max(self.chunks)
        counts = torch.tensor(self.chunks, device=device)
        position = torch.arange(most, device=device).expand(len(counts), most)
        rows = (counts.cumsum(0) - counts)[:, None] + position.minimum(counts[:, None] - 1)
        mask = (position < counts[:, None])[:, :, None].expand(*rows.shape, self.ids.shape[1])
        if hide_padding:
            mask = mask & self.real.to(device)[rows]
        whole = not hide_padding and min(self.chunks) == most
        return states_NLD[rows].flatten(1, 2), None if whole else mask.flatten(1)

    def first(self, vectors_NP: Tensor) -> Tensor:
        """Each prompt's first chunk's vector [B, P]: what stands for a whole prompt of several."""
        counts = torch.tensor(self.chunks, device=vectors_NP.device)
        return vectors_NP[counts.cumsum(0) - counts]


def check_prompts(prompts: object) -> None:
    """Raises `InputError` if `prompts` is not a list of strings, or empty."""
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"prompts = {prompts!r:.80}: must be a list of at least one string")


def check_long_prompts(long_prompts: str, tokenizer: Any) -> None:
    """Raises `ConfigError` for an unknown way, or a tokenizer that can't give chunks."""
    if long_prompts not in get_args(LongPrompts):
        raise ConfigError(f"long_prompts = {long_prompts!r}: must be one of {', '.join(get_args(LongPrompts))}")
    if long_prompts == "chunks" and not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"{type(tokenizer).__name__} can't split prompts: use long_prompts = 'cut'")


def all_vectors(tokenizer: Any, prompts: list[str]) -> list[str]:
    """The prompts with each token of several learned vectors (textual inversion, Gal et al. 2022) written out, as
    diffusers does: `<cat>` as `<cat> <cat>_1 <cat>_2`, if those were added to the tokenizer's vocabulary."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    several = sorted(token for token in added if f"{token}_1" in added)
    if not several:
        return prompts

    def written_out(prompt: str) -> str:
        present = set(tokenizer.tokenize(prompt))
        for token in several:
            if token in present:
                count = next(number for number in range(1, len(added) + 1) if f"{token}_{number}" not in added)
                prompt = prompt.replace(token, " ".join([token, *(f"{token}_{number}" for number in range(1, count))]))
        return prompt

    return [written_out(prompt) for prompt in prompts]


def check_embedded(ids_NL: Tensor, tokenizer: Any, embeddings: int) -> None:
    """Raises `InputError` for a token without an embedding in the encoder: one that the tokenizer alone was given."""
    beyond = ids_NL[ids_NL >= embeddings].tolist()
    if beyond:
        token = tokenizer.convert_ids_to_tokens(beyond[0])
        raise InputError(
            f"token {token!r} has number {beyond[0]}, the text encoder only {embeddings} embeddings: its folder is of a"
            " tokenizer with more tokens"
        )


def tokens_of(tokenizer: Any, prompts: list[str], length: int, long_prompts: LongPrompts) -> Tokens:
    """The prompts by a tokenizer of transformers, padded to `length` tokens as it does that."""
    split = long_prompts == "chunks"
    if not split:
        warn_of_cuts(prompts, num_tokens(tokenizer, prompts), length)
    read = tokenizer(
        prompts,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
        **({"return_overflowing_tokens": True} if split else {}),
    )
    owners = read["overflow_to_sample_mapping"] if split else torch.arange(len(prompts))
    chunks = tuple(torch.bincount(owners, minlength=len(prompts)).tolist())
    real = read["attention_mask"].bool()
    # Attention needs something to look at, and a tokenizer without special tokens has nothing for the empty prompt.
    return Tokens(read["input_ids"], real | ~real.any(dim=1, keepdim=True), chunks)


def num_tokens(tokenizer: Any, prompts: list[str]) -> list[int]:
    """Tokens of each prompt before any cut, special ones included."""
    if not prompts:
        return []
    return [len(ids) for ids in tokenizer(prompts, truncation=False, padding=False, verbose=False)["input_ids"]]


def warn_of_cuts(prompts: Sequence[str], counts: Sequence[int], length: int) -> None:
    """Log how many prompts have more than `length` tokens."""
    over = [prompt for prompt, count in zip(prompts, counts, strict=True) if count > length]
    if over:
        logger.warning(
            "%d of %d prompts have more than %d tokens and are cut, the first is %r",
            len(over), len(prompts), length, over[0],
        )  # fmt: skip
