"""The real pairs that a model's pictures are made for and measured against, chosen by hashes of their uids.

The train split's are cut in two: pictures are made for the captions of one half and compared with the images of the
other, so that the two halves' own distance is the least that a perfect model could be expected to have.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from infra.storage import Store
from pipelines.artifacts import Artifact
from pipelines.dataset.acquired import Shards
from pipelines.dataset.errors import UnusableData
from pipelines.dataset.ledgers import by_shard, read_ledger
from pipelines.dataset.selection import SIDES, Side, read_selection
from pipelines.recipe import EvaluateSpec

SIZE_COLUMNS = ("width", "height")
STORED = "stored_sha256"


@dataclass(frozen=True)
class Pair:
    """A selected image and its caption. `row` counts within its split, in the selection's order (shard, key)."""

    uid: str
    shard: str
    key: str
    split: Side
    row: int
    caption: str = ""
    content: str = ""
    """What tells the image as it is stored from any other, in any shard."""
    stored_px: tuple[int, int] | None = None
    """(width, height) of the image in its shard, if the ledger has them."""


@dataclass(frozen=True)
class Comparison:
    """What is compared with what. `described` and `reference` are equally many, and share no pair."""

    described: tuple[Pair, ...]
    """Pairs of the train split: pictures are made for their captions."""
    reference: tuple[Pair, ...]
    """Pairs of the train split: pictures are compared with their images."""
    held_out: tuple[Pair, ...]
    """Pairs with captions that differ: pictures are made for them too, for faithfulness alone."""
    seen: tuple[int, ...]
    """Places in `described` whose captions differ, for faithfulness."""
    num_train: int
    """Images of the train split."""

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return (*self.described, *self.reference, *self.held_out)


def choose_pairs(acquire: Shards, select: Artifact, store: Store, spec: EvaluateSpec) -> Comparison:
    """The pairs to measure on, as many as `spec` asks for, or there are. The same for the same selection, and for most
    of a similar one."""
    table = read_selection(select, store, ["uid", "shard", "key", "split"])
    train, held_out = (_pairs(table, split) for split in SIDES)
    num_images = min(spec.images, len(train) // 2)
    drawn = _drawn(train, 2 * num_images, spec.seed)
    # Captions that repeat are left out below: draw some more, so that enough are left.
    others = _with_ledger(_drawn(held_out, 4 * spec.prompts, spec.seed), acquire, store)
    described, reference = (_with_ledger(drawn[side::2], acquire, store) for side in (0, 1))
    return Comparison(
        tuple(described),
        tuple(reference),
        tuple(others[place] for place in _distinct(others, spec.prompts)),
        tuple(_distinct(described, spec.prompts)),
        len(train),
    )


def _pairs(selection: pa.Table, split: Side) -> list[Pair]:
    table = selection.filter(pc.equal(selection.column("split"), split))
    return [Pair(**values, row=row) for row, values in enumerate(table.to_pylist())]


def _drawn(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """The `count` pairs with the lowest hashes, in the order of these."""

    def place(pair: Pair) -> bytes:
        return hashlib.sha256(f"evaluate\0{seed}\0{pair.uid}".encode()).digest()

    return heapq.nsmallest(count, pairs, key=place)


def _distinct(pairs: Sequence[Pair], count: int) -> list[int]:
    """The first places of so many captions that differ."""
    first: dict[str, int] = {}
    for place, pair in enumerate(pairs):
        first.setdefault(pair.caption, place)
    return list(first.values())[:count]


def _with_ledger(pairs: Sequence[Pair], acquire: Shards, store: Store) -> list[Pair]:
    """The pairs with what their shards' ledgers know of them. Raises `UnusableData` if a ledger lacks one."""
    keys: dict[str, list[str]] = {}
    for pair in pairs:
        keys.setdefault(pair.shard, []).append(pair.key)
    units = by_shard(acquire)
    known: dict[tuple[str, str], dict[str, object]] = {}
    for shard, own in keys.items():
        if shard not in units:
            raise UnusableData(f"the selection lists shard {shard}, which `acquire` did not publish")
        rows = read_ledger(units[shard], store, ("caption", STORED, *SIZE_COLUMNS), own)
        for row in rows.to_pylist():
            stored = row.get(STORED) or f"{units[shard].digest}/{row['key']}"
            known[shard, str(row["key"])] = row | {STORED: stored}
    return [_known(pair, known[pair.shard, pair.key]) for pair in pairs]


def _known(pair: Pair, row: dict[str, object]) -> Pair:
    width, height = (row.get(name) for name in SIZE_COLUMNS)
    stored = (width, height) if isinstance(width, int) and isinstance(height, int) else None
    return replace(pair, caption=str(row["caption"] or ""), content=str(row[STORED]), stored_px=stored)
