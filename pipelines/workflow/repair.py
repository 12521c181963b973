"""What `pipelines.workflow.verification` found damaged, mended: what the rest says is written again, and what nothing
says is made to do again, exactly these units and no others.

A unit's record goes first, so that half a repair never leaves what looks whole. The files of `acquire` stay without it:
its next run takes over from them the rows that are sound, so that one bad image costs one download. While a repair
goes on, no run makes the same artifacts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.checkpoints import complete_checkpoints
from infra.locks import lock
from infra.storage import Store
from pipelines.again import ask_again
from pipelines.artifacts import ANSWER, ArtifactError, load, read_sealed, record_path
from pipelines.building import LOCK_WAIT_S
from pipelines.publishing import publish_revision
from pipelines.terminal.words import duration
from pipelines.workflow.verification import NodeCheck

ROWS_ARE_REUSED = "acquire"
"""Stage whose runs take over rows from what is left of a unit."""


@dataclass(frozen=True)
class Cost:
    """What a repair of one node asks for."""

    node: str
    units: int
    rows: int
    """Rows of these units, as they were counted: URLs of `acquire`, images of others."""
    before_s: float
    """How long the whole node took, when it was made."""
    restored: int
    """Files that are written again from what the others say."""
    goes_on_at: int | None = None
    """Step of the checkpoint at which a training goes on."""

    @property
    def words(self) -> str:
        parts = []
        if self.restored:
            parts.append(f"{several(self.restored, 'file')} written again from what the others say")
        stage = self.node.partition(".")[0]
        if self.units and stage == "acquire":
            parts.append(
                f"{several(self.units, 'shard')} made again: up to {several(self.rows, 'URL')} asked again (rows that"
                " are sound are taken over)"
            )
        elif self.units and stage == "train":
            start = f"from step {self.goes_on_at:,}" if self.goes_on_at else "from nothing"
            parts.append(f"trained again {start} (all of it took {duration(self.before_s)})")
        elif self.units:
            parts.append(f"{several(self.units, 'unit')} made again ({several(self.rows, 'row')})")
        return "; ".join(parts) or "published again from what is there"


def cost(store: Store, check: NodeCheck) -> Cost:
    redo = set(check.redo)
    rows = sum(unit.counts.total for unit in check.units if unit.key in redo)
    before_s = float(check.manifest["duration_s"]) if check.manifest else 0.0
    steps = [
        ref.step
        for unit_key in (redo if check.node.startswith("train.") else ())
        for ref in complete_checkpoints(store, f"{check.node}/unfinished/{unit_key}/checkpoints")
    ]
    restored = len(check.restore) + check.tables_lost
    return Cost(check.node, len(redo), rows, before_s, restored, max(steps, default=None))


def repair(store: Store, checks: Sequence[NodeCheck]) -> None:
    """Mend what was found. Raises `infra.locks.Locked` if a run is making one of the artifacts."""
    for check in checks:
        if check.damages:
            keys = sorted({str(check.key), *_keys_with(store, check)})
            with _locked(store, check, keys):
                _make_way(store, check)
                _restore(store, check)
                _redo(store, check, keys)


def _make_way(store: Store, check: NodeCheck) -> None:
    """Where a folder lies in place of a file, nothing can be written."""
    for damage in check.damages:
        if store.is_local and Path(store.location(damage.path)).is_dir():
            store.delete(damage.path)


def _restore(store: Store, check: NodeCheck) -> None:
    for path, data in check.restore.items():
        store.publish_bytes(path, data)
    if check.tables_lost:
        assert check.manifest is not None
        publish_revision(store, check.node, check.manifest, check.units, check.bases)


def _redo(store: Store, check: NodeCheck, keys: Sequence[str]) -> None:
    """Records first, then word of it for all whose revision lists them, then the files."""
    for unit_key in check.redo:
        store.delete(record_path(check.node, unit_key))
    for key in keys if check.redo else [str(check.key)] if check.ask else []:
        ask_again(store, check.node, key, "repair")
    if check.node.partition(".")[0] != ROWS_ARE_REUSED:
        for unit_key in check.redo:
            store.delete(f"{check.node}/units/{unit_key}")


def _keys_with(store: Store, check: NodeCheck) -> Iterator[str]:
    """The questions, of any recipe in the store, whose answer lists one of the units that are to be made again."""
    redo, stage = set(check.redo), check.node
    listed = {str(check.revision): bool(redo)}
    for name in store.listdir(f"{stage}/keys") if redo else ():
        if not name.endswith(".json"):
            continue
        with contextlib.suppress(ArtifactError, FileNotFoundError):
            revision = str(read_sealed(store, f"{stage}/keys/{name}", ANSWER)["revision"])
            if revision not in listed:
                listed[revision] = any(unit.key in redo for unit in load(store, stage, revision).units)
            if listed[revision]:
                yield name.removesuffix(".json")


@contextlib.contextmanager
def _locked(store: Store, check: NodeCheck, keys: Sequence[str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for key in [*keys, *([check.revision] if check.revision else [])]:
            stack.enter_context(lock(store, f"{check.node}/{key}", wait_s=LOCK_WAIT_S))
        yield


def several(number: int, noun: str) -> str:
    """ "1 unit", "2 folders of checkpoints"."""
    first, _, rest = noun.partition(" ")
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {first}s {rest}".rstrip()
