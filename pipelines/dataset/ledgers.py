"""The published ledgers of `acquire`, read: one shard's rows, or those of all shards that were kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.storage import Store
from pipelines.artifacts import Artifact, Unit
from pipelines.dataset.errors import DatasetError, UnusableData
from pipelines.dataset.ledger import Outcome

LEDGER, TAR = ".parquet", ".tar"
"""How the names of a shard's two files end."""
SHARD = pa.field("shard", pa.string())


def shard_of(unit: Unit) -> str:
    """Name of the shard that a unit is, or was made from."""
    return str(unit.info["shard"])


def by_shard(artifact: Artifact) -> dict[str, Unit]:
    """Units by the name of their shard; those without one are left out."""
    return {shard_of(unit): unit for unit in artifact.units if "shard" in unit.info}


def read_ledger(unit: Unit, store: Store, columns: Sequence[str], keys: Sequence[str] | None = None) -> Any:
    """A table of those of `columns` that the ledger has: of all its rows, or of the rows with these keys, in their order.

    Raises `UnusableData` if there is no row with one of the keys.
    """
    wanted = dict.fromkeys(("key", *columns) if keys is not None else columns)
    with store.open(unit.only(LEDGER)) as file:
        ledger = pq.ParquetFile(file, pre_buffer=False)
        table = ledger.read([name for name in wanted if name in ledger.schema_arrow.names], use_threads=False)
    if keys is None:
        return table
    places = pc.index_in(pa.array(keys, pa.string()), table.column("key").combine_chunks())
    if places.null_count:
        missing = keys[places.is_null().to_pylist().index(True)]
        raise UnusableData(
            f"shard {shard_of(unit)} has no {missing!r} in its ledger, which is listed; select again with"
            " `--force select`"
        )
    return table.take(places)


def kept_ledger(unit: Unit, store: Store, columns: Sequence[str]) -> Any:
    """A table of those of `columns` that the ledger has, of the rows that were kept, in the ledger's order."""
    table = read_ledger(unit, store, ("outcome", *columns))
    kept = table.filter(pc.equal(table.column("outcome"), Outcome.KEPT.value))
    return kept.select([name for name in dict.fromkeys(columns) if name in kept.column_names])


def common_schema(acquired: Artifact, store: Store) -> Any:
    """Names and types of the columns that the ledgers have between them, dictionaries as plain values.

    Raises `DatasetError` if there are no ledgers, or a column has types that can't be brought together.
    """
    if not acquired.units:
        raise DatasetError("`acquire` has published no shards")
    schemas = []
    for unit in acquired.units:
        with store.open(unit.only(LEDGER)) as file:
            schemas.append(pa.schema([field for field in map(_plain, pq.read_schema(file)) if field.name != "shard"]))
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").append(SHARD)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DatasetError(
            f"the ledgers have columns of one name and different types ({error}); give the source's files the same"
            " types and acquire them again"
        ) from error


def kept_rows(acquired: Artifact, store: Store, schema: Any, columns: Sequence[str]) -> Iterator[Any]:
    """For each shard a table of the rows that were kept, with `columns` and `shard`, of the types of `schema`.

    A column that one ledger lacks is null there.
    """
    wanted = pa.schema([schema.field(name) for name in columns if name != "shard"])
    for unit in acquired.units:
        table = kept_ledger(unit, store, wanted.names or ["key"])
        arrays = [
            table.column(field.name).cast(field.type)
            if field.name in table.column_names
            else pa.nulls(table.num_rows, field.type)
            for field in wanted
        ]
        shard = pa.array([shard_of(unit)] * table.num_rows, pa.string())
        yield pa.table([*arrays, shard], schema=wanted.append(SHARD))


def _plain(field: Any) -> Any:
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
