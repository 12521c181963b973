"""Shards of a training state: whatever the ranks and cuts, what was written is what is read."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.shards import KINDS, Fragment, Kind, StateMismatch, read_shards, shard_name, write_shard

State = dict[Kind, dict[str, torch.Tensor]]
SIZES = st.dictionaries(st.sampled_from(["conv.weight", "conv.bias", "head", "scale"]), st.integers(1, 30), min_size=1)


def whole_state(sizes: dict[str, int]) -> State:
    generator = torch.Generator().manual_seed(0)
    return {kind: {name: torch.randn(size, generator=generator) for name, size in sizes.items()} for kind in KINDS}


def cut(draw: st.DrawFn, sizes: dict[str, int]) -> list[dict[str, Fragment]]:
    """Any cut of each parameter into as many consecutive pieces, some empty, as there are ranks."""
    world_size = draw(st.integers(1, 4))
    ranks: list[dict[str, Fragment]] = [{} for _ in range(world_size)]
    for name, size in sizes.items():
        inner = sorted(draw(st.lists(st.integers(0, size), min_size=world_size - 1, max_size=world_size - 1)))
        for rank, start, end in zip(ranks, [0, *inner], [*inner, size], strict=True):
            rank[name] = Fragment(start, end - start)
    return ranks


def pieces(state: State, fragments: dict[str, Fragment]) -> State:
    return {
        kind: {name: state[kind][name].narrow(0, piece.start, piece.length) for name, piece in fragments.items()}
        for kind in KINDS
    }


@given(data=st.data(), sizes=SIZES)
@settings(max_examples=60, deadline=None)
def test_any_cut_is_read_from_any_other(data: st.DataObject, sizes: dict[str, int]) -> None:
    state = whole_state(sizes)
    old, new = (data.draw(st.composite(cut)(sizes)) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, shard_name(rank)) for rank in range(len(old))]
        for path, fragments in zip(paths, old, strict=True):
            write_shard(path, fragments, pieces(state, fragments))
        for fragments in new:
            found: State = {
                kind: {name: torch.full((piece.length,), torch.nan) for name, piece in fragments.items()}
                for kind in KINDS
            }
            read_shards(data.draw(st.permutations(paths)), fragments, found)
            wanted = pieces(state, fragments)
            assert all(torch.equal(found[kind][name], wanted[kind][name]) for kind in KINDS for name in fragments)


def test_stops_when_nothing_is_missing(tmp_path: Path) -> None:
    state, fragments = whole_state({"head": 5}), {"head": Fragment(0, 5)}
    write_shard(tmp_path / shard_name(0), fragments, state)
    found: State = {kind: {"head": torch.zeros(5)} for kind in KINDS}
    read_shards([tmp_path / shard_name(0), tmp_path / shard_name(1)], fragments, found)
    assert torch.equal(found["ema"]["head"], state["ema"]["head"])


def test_says_what_is_missing(tmp_path: Path) -> None:
    state = whole_state({"head": 5})
    half, whole = {"head": Fragment(0, 3)}, {"head": Fragment(0, 5)}
    write_shard(tmp_path / shard_name(0), half, pieces(state, half))
    with pytest.raises(StateMismatch, match="lacks 2 elements of 'head'"):
        read_shards([tmp_path / shard_name(0)], whole, whole_state({"head": 5}))
    with pytest.raises(StateMismatch, match=r"rank_00001\.safetensors is missing"):
        read_shards([tmp_path / shard_name(0), tmp_path / shard_name(1)], whole, whole_state({"head": 5}))


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_refuses_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / shard_name(0)).write_bytes(content)
    with pytest.raises(StateMismatch, match="can't be read as a shard"):
        read_shards([tmp_path / shard_name(0)], {"head": Fragment(0, 5)}, whole_state({"head": 5}))
