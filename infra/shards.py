"""Training state in shards: each rank writes the pieces of the parameters that it owns, under the parameters' names.

A shard is one safetensors file. Its tensors are called `<kind>/<parameter>` and are flat fp32 pieces; where a piece
begins in its flattened parameter is in the file's metadata. Pieces are found by name and position, never by rank, so
that any number of ranks, partitioned in any way, can read what any other number has written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

Kind = Literal["weight", "exp_avg", "exp_avg_sq", "ema"]
KINDS: tuple[Kind, ...] = get_args(Kind)
STARTS_KEY = "starts"


class StateMismatch(Exception):
    """A saved training state does not fit what it is loaded into; the message says where they differ."""


@dataclass(frozen=True)
class Fragment:
    """The piece of a flattened parameter that one rank owns: elements `start` to `start + length`, possibly none."""

    start: int
    length: int


def shard_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def write_shard(
    path: Path, fragments: Mapping[str, Fragment], tensors: Mapping[Kind, Mapping[str, torch.Tensor]]
) -> None:
    """Write one rank's pieces. `tensors[kind][name]` is flat, as long as `fragments[name]` says."""
    owned = {name: fragment for name, fragment in fragments.items() if fragment.length}
    pieces = {f"{kind}/{name}": tensors[kind][name] for kind in KINDS for name in owned}
    starts = {name: fragment.start for name, fragment in owned.items()}
    save_file(pieces, str(path), metadata={STARTS_KEY: json.dumps(starts)})


def read_shards(
    paths: Iterable[Path], fragments: Mapping[str, Fragment], tensors: Mapping[Kind, Mapping[str, torch.Tensor]]
) -> None:
    """Fill `tensors` in place with what the shards at `paths` hold of `fragments`.

    Stops at the first path after which nothing is missing, so give the likeliest first.
    Raises `StateMismatch` if elements are missing in all of the shards, or a shard is no such file.
    """
    missing = {name: fragment.length for name, fragment in fragments.items() if fragment.length}
    for path in paths:
        if not missing:
            return
        try:
            _read_shard(path, fragments, tensors, missing)
        except FileNotFoundError as error:
            raise StateMismatch(f"{path} is missing: the saved state has more ranks' shards than are here") from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StateMismatch(f"{path} can't be read as a shard of a training state: {error!r}") from error
    if missing:
        name, count = next(iter(missing.items()))
        raise StateMismatch(
            f"the saved state lacks {count} elements of {name!r}, and elements of {len(missing) - 1} other parameters;"
            " a shard file is missing, or the files of two checkpoints were mixed"
        )


def _read_shard(
    path: Path,
    fragments: Mapping[str, Fragment],
    tensors: Mapping[Kind, Mapping[str, torch.Tensor]],
    missing: dict[str, int],
) -> None:
    with safe_open(str(path), framework="pt") as shard:
        starts: dict[str, int] = json.loads(shard.metadata()[STARTS_KEY])
        for name in starts.keys() & missing.keys():
            wanted, saved_start = fragments[name], starts[name]
            (saved_length,) = shard.get_slice(f"{KINDS[0]}/{name}").get_shape()
            begin = max(wanted.start, saved_start)
            end = min(wanted.start + wanted.length, saved_start + saved_length)
            if begin >= end:
                continue
            for kind in KINDS:
                piece = shard.get_slice(f"{kind}/{name}")[begin - saved_start : end - saved_start]
                tensors[kind][name].narrow(0, begin - wanted.start, end - begin).copy_(piece)
            missing[name] -= end - begin
            if not missing[name]:
                del missing[name]
