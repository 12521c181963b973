"""Whether what a recipe has published is what was written: each file against its record, records, tables, manifests and
answers against each other and against their own sums.

What can be written again from the rest is in `NodeCheck.restore`, what has to be made again in `redo`;
`pipelines.workflow.repair` does both.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow.parquet as pq

from infra.storage import FileDamaged, Store
from infra.store_errors import reading
from pipelines.again import AGAIN, asked_again, read_renewed, renewed, renewed_path
from pipelines.artifacts import (
    ANSWER,
    FILES_TABLE,
    MANIFEST,
    OF_MANIFEST,
    OF_THE_ANSWER,
    UNITS_TABLE,
    UNREADABLE,
    Artifact,
    Damaged,
    Unit,
    again_path,
    digest,
    read_record,
    read_sealed,
    read_units,
    record_path,
    sealed,
)
from pipelines.workflow.node import Node
from pipelines.workflow.plan import LATEST, latest_path

READERS = 4
TABLES = (UNITS_TABLE, FILES_TABLE)

State = Literal["sound", "damaged", "to do", "waiting"]
Progress = Callable[[str, int, int], None]
"""Told of each node how many of its units are read: (node, done, total)."""


@dataclass(frozen=True)
class Damage:
    """A file that isn't what was written. `unit` is the key of its unit, if that has to be made again for it."""

    path: str
    what: str
    unit: str | None = None


@dataclass
class NodeCheck:
    """How one node stands. `restore` is what to write, by path, where the rest says what was there."""

    node: str
    key: str | None
    state: State
    why: str = ""
    revision: str | None = None
    manifest: Mapping[str, Any] | None = None
    units: tuple[Unit, ...] = ()
    bases: Mapping[str, str] = field(default_factory=dict)
    damages: list[Damage] = field(default_factory=list)
    restore: dict[str, bytes] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)
    """Files that lie beside those of its units: nobody has published them, and nothing reads them."""
    tables_lost: bool = False
    """The revision's tables and manifest are to be written anew, from `manifest` and `units`."""
    ask: bool = False
    """The node has to run once more, if only to publish what it has."""

    @property
    def num_files(self) -> int:
        return sum(len(unit.files) for unit in self.units)

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for unit in self.units for entry in unit.files)

    @property
    def folder(self) -> str:
        return f"{self.node}/revisions/{self.revision}"

    @property
    def redo(self) -> list[str]:
        """Keys of the units that have to be made again."""
        return list(dict.fromkeys(damage.unit for damage in self.damages if damage.unit is not None))


def verify(nodes: Mapping[str, Node], store: Store, recipe_name: str, progress: Progress) -> Iterator[NodeCheck]:
    """The nodes in order, each when it is checked. A node behind one that isn't made waits, and is not looked at.

    Raises `StorageError` if the store doesn't answer: then nothing is known of it.
    """
    revisions: dict[str, Artifact] = {}
    for node in nodes.values():
        missing = [name for name in node.inputs if name not in revisions]
        if missing:
            yield NodeCheck(node.name, None, "waiting", f"after {', '.join(missing)}")
            continue
        key = node.key(revisions)
        check = check_node(store, node.name, key, _remembered(store, recipe_name, node.name, key), progress)
        if check.revision is not None and check.state != "to do":
            revisions[node.name] = Artifact(node.name, key, check.revision, check.manifest or {}, store)
        yield check


def check_node(store: Store, stage: str, key: str, remembered: str | None, progress: Progress) -> NodeCheck:
    """What was published as `key`. `remembered` is its revision as noted elsewhere, for where the answer is lost.

    Raises `StorageError` if the store doesn't answer.
    """
    check = NodeCheck(stage, key, "sound")
    again = asked_again(store, stage, key)
    if again is not None:
        check.state, check.why = "to do", f"asked for again ({again.why})"
        if _sealed_or_damage(store, again_path(stage, key), check, AGAIN) is None:
            least = {"why": again.why, "salt": again.salt, "reasons": list(again.reasons)}
            check.restore[again_path(stage, key)] = sealed(least)
        return check
    answer_path = f"{stage}/keys/{key}.json"
    if remembered is None and not store.exists(answer_path):
        check.state, check.why = "to do", "not made yet"
        return check
    answer = _sealed_or_damage(store, answer_path, check, ANSWER, key=key)
    check.revision = answer["revision"] if answer else remembered
    if check.revision is None:
        check.ask = True
    else:
        _check_revision(store, check, answer)
        _check_units(store, check, progress)
        _check_renewed(store, check)
    if check.damages:
        check.state = "damaged"
    return check


def _remembered(store: Store, recipe_name: str, node: str, key: str) -> str | None:
    with contextlib.suppress(FileNotFoundError, Damaged, FileDamaged):
        latest = read_sealed(store, latest_path(recipe_name, node), LATEST)
        return str(latest["revision"]) if latest["key"] == key else None
    return None


def _sealed_or_damage(
    store: Store, path: str, check: NodeCheck, names: Mapping[str, type], **expected: str | None
) -> dict[str, Any] | None:
    """What the file says; None, and one damage more, if that is not what was written there."""
    try:
        value = read_sealed(store, path, names)
        if all(value.get(name) == wanted for name, wanted in expected.items()):
            return value
        check.damages.append(Damage(path, "another file's content"))
    except FileNotFoundError:
        check.damages.append(Damage(path, "missing"))
    except (Damaged, FileDamaged) as error:
        check.damages.append(Damage(path, _what(error)))
    return None


def _what(error: Exception) -> str:
    """ "can't be read (Is a directory)", "not what was written"."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    cause = error.__cause__
    return f"can't be read ({cause.strerror})" if isinstance(cause, OSError) else "not what was written"


# -- the revision ------------------------------------------------------------------------------------------------------


def _check_revision(store: Store, check: NodeCheck, answer: Mapping[str, Any] | None) -> None:
    """Manifest and tables; what they list goes into `check.units`, as far as it can be known."""
    manifest = _sealed_or_damage(store, f"{check.folder}/{MANIFEST}", check, OF_MANIFEST, revision=check.revision)
    sums = manifest["tables"] if manifest else {}
    tables = {name: _table(store, f"{check.folder}/{name}", sums.get(name), check) for name in TABLES}
    check.manifest = manifest or answer
    complete = _list_units(store, check, tables)
    damaged = {damage.path for damage in check.damages}
    if any(f"{check.folder}/{name}" in damaged for name in (MANIFEST, *TABLES)):
        check.tables_lost = complete and check.manifest is not None
        check.ask = not check.tables_lost
    if answer is None and manifest is not None and manifest["key"] == check.key:
        own = {name: manifest[name] for name in ("key", "revision", *OF_THE_ANSWER)}
        check.restore[f"{check.node}/keys/{check.key}.json"] = sealed(own)
    elif answer is None:
        check.ask = True  # the manifest has the settings of another question with the same answer


def _table(store: Store, path: str, sha256: str | None, check: NodeCheck) -> bytes | None:
    """The table's bytes; None if they are not what the manifest says. Without a manifest, whatever there is."""
    try:
        data = store.read_bytes(path)
    except (FileNotFoundError, FileDamaged) as error:
        check.damages.append(Damage(path, _what(error)))
        return None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        check.damages.append(Damage(path, "other sha256 than its manifest says"))
        return None
    return data


def _list_units(store: Store, check: NodeCheck, tables: Mapping[str, bytes | None]) -> bool:
    """Fill in the units and the base keys of those made anew; whether these are all of the revision.

    By the table of units, or, where that is lost, by the paths in the table of files and each unit's own record.
    """
    units_table, files_table = tables[UNITS_TABLE], tables[FILES_TABLE]
    if units_table is not None:
        with contextlib.suppress(Damaged, *UNREADABLE):
            check.units, check.bases = read_units(units_table), _bases(units_table)
            if _is_revision(check.units, check.revision):
                return True
        check.units, check.bases = (), {}
        check.damages.append(Damage(f"{check.folder}/{UNITS_TABLE}", "can't be read"))
    if files_table is None:
        return False
    try:
        paths = pq.ParquetFile(io.BytesIO(files_table), pre_buffer=False).read(["path"], use_threads=False)
        keys = dict.fromkeys(path.split("/")[2] for path in paths.column("path").to_pylist())
    except UNREADABLE:
        check.damages.append(Damage(f"{check.folder}/{FILES_TABLE}", "can't be read"))
        return False
    units = []
    for key in keys:
        try:
            units.append(read_record(store, check.node, key))
        except (FileNotFoundError, Damaged, FileDamaged) as error:
            check.damages.append(Damage(record_path(check.node, key), _what(error), key))
    check.units, check.bases = tuple(units), _renewed(store, check.node, keys)
    return _is_revision(check.units, check.revision)


def _renewed(store: Store, stage: str, keys: Container[str]) -> dict[str, str]:
    """Base keys of those of the units that were made anew."""
    found = {}
    for name in store.listdir(f"{stage}/renewed"):
        base_key = name.removesuffix(".json")
        with contextlib.suppress(Damaged, FileDamaged, FileNotFoundError):
            unit_key = read_renewed(store, stage, base_key)
            if unit_key in keys:
                found[unit_key] = base_key
    return found


def _is_revision(units: Sequence[Unit], revision: str | None) -> bool:
    return digest(sorted(unit.digest for unit in units)) == revision


def _bases(units_table: bytes) -> dict[str, str]:
    table = pq.ParquetFile(io.BytesIO(units_table), pre_buffer=False).read(["key", "base"], use_threads=False)
    pairs = zip(table.column("key").to_pylist(), table.column("base").to_pylist(), strict=True)
    return {key: base for key, base in pairs if key != base}


def _check_renewed(store: Store, check: NodeCheck) -> None:
    """What leads from base keys to units made anew: it may lead to newer ones, but has to lead somewhere."""
    for unit_key, base_key in check.bases.items():
        path = renewed_path(check.node, base_key)
        try:
            read_renewed(store, check.node, base_key)
        except (FileNotFoundError, Damaged, FileDamaged) as error:
            check.damages.append(Damage(path, _what(error)))
            check.restore[path] = renewed(base_key, unit_key)


# -- units -------------------------------------------------------------------------------------------------------------


def _check_units(store: Store, check: NodeCheck, progress: Progress) -> None:
    """One listing of all sizes, then each file whole."""
    total = len(check.units)
    sizes = store.sizes(f"{check.node}/units")
    progress(check.node, 0, total)
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda unit: _unit_damages(store, unit, sizes), check.units)
        for number, (unit, (damages, record)) in enumerate(zip(check.units, found, strict=True), 1):
            check.damages += damages
            if record == "lost" and not any(damage.unit for damage in damages):
                check.restore[record_path(unit.stage, unit.key)] = sealed(unit.to_json())
            elif record == "other":
                check.ask = True
            progress(check.node, number, total)
    published = {f"{unit.key}/{entry.name}" for unit in check.units for entry in unit.files}
    folders = {unit.key for unit in check.units}
    strays = (name for name in sizes if name.partition("/")[0] in folders and name not in published)
    check.strays = [f"{check.node}/units/{name}" for name in strays if name.partition("/")[2] != "record.json"]


def _unit_damages(
    store: Store, unit: Unit, sizes: Mapping[str, int]
) -> tuple[list[Damage], Literal["sound", "lost", "other"]]:
    """Of one unit, and how its record stands: "other" where the unit was made again since, and is not the one that the
    revision lists."""
    path = record_path(unit.stage, unit.key)
    try:
        own = read_record(store, unit.stage, unit.key)
    except (FileNotFoundError, Damaged, FileDamaged) as error:
        return [Damage(path, _what(error)), *_file_damages(store, unit, sizes)], "lost"
    damages = _file_damages(store, own, sizes)
    if own.to_json() == unit.to_json():
        return damages, "sound"
    return [Damage(path, "made again since, and not the one that is listed"), *damages], "other"


def _file_damages(store: Store, unit: Unit, sizes: Mapping[str, int]) -> list[Damage]:
    damages = []
    for entry in unit.files:
        path = unit.path(entry.name)
        found_bytes = sizes.get(f"{unit.key}/{entry.name}")
        if found_bytes is None:
            damages.append(Damage(path, "missing", unit.key))
        elif found_bytes != entry.size_bytes:
            damages.append(Damage(path, f"{found_bytes:,} of {entry.size_bytes:,} bytes", unit.key))
        elif (found := _sha256(store, path)) != entry.sha256:
            damages.append(Damage(path, found if " " in found else f"other sha256 ({found[:12]}...)", unit.key))
    return damages


def _sha256(store: Store, path: str) -> str:
    """Or, in words, why there is none."""
    try:
        with store.open(path) as file, reading(store.location(path)):
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except FileNotFoundError:
        return "missing since it was listed"
    except FileDamaged as error:
        return _what(error)
