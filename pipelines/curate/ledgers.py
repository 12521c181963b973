"""Ledgers of `acquire` as one table: kept rows only, and only the columns that are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.storage import Store
from pipelines.artifacts import Artifact
from pipelines.curate.errors import NothingSelected, SelectError

SHARD = pa.field("shard", pa.int32())


def ledger_schema(acquired: Artifact, store: Store) -> Any:
    """Names and types of the columns that the ledgers have between them, dictionaries as plain values.

    Raises:
        SelectError: a column has types that can't be brought together.
        NothingSelected: there are no ledgers.
    """
    if not acquired.units:
        raise NothingSelected("no pair is left to train on: `acquire` has published no shards")
    schemas = []
    for unit in acquired.units:
        with store.open(unit.only(".parquet")) as file:
            schemas.append(pa.schema([field for field in map(_plain, pq.read_schema(file)) if field.name != "shard"]))
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").append(SHARD)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SelectError(
            f"the ledgers have columns of one name and different types ({error}); give the source's files the same"
            " types and acquire them again"
        ) from error


def kept_rows(acquired: Artifact, store: Store, schema: Any, columns: Sequence[str]) -> Iterator[Any]:
    """For each shard a table of the rows that were kept, with `columns` and `shard`, of the types of `schema`.

    A column that one ledger lacks is null there.
    """
    wanted = pa.schema([schema.field(name) for name in columns if name != "shard"])
    for unit in acquired.units:
        with store.open(unit.only(".parquet")) as file:
            ledger = pq.ParquetFile(file)
            table = ledger.read([name for name in ("outcome", *wanted.names) if name in ledger.schema_arrow.names])
        table = table.filter(pc.equal(table.column("outcome"), "kept"))
        arrays = [
            table.column(field.name).cast(field.type)
            if field.name in table.column_names
            else pa.nulls(table.num_rows, field.type)
            for field in wanted
        ]
        shard = pa.array([int(unit.info["shard"])] * table.num_rows, pa.int32())
        yield pa.table([*arrays, shard], schema=wanted.append(SHARD))


def _plain(field: Any) -> Any:
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
