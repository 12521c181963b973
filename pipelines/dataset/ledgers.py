"""The published ledgers of `acquire`, read: one shard's rows, or those of all shards that were kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra.storage import Store
from pipelines.artifacts import Artifact, Unit
from pipelines.dataset.acquired import Shards, source_of
from pipelines.dataset.ahead import ahead
from pipelines.dataset.errors import DatasetError, UnusableData
from pipelines.dataset.ledger import Outcome
from pipelines.dataset.tables import columns_of, open_table, read_table

LEDGER, TAR = ".parquet", ".tar"
"""How the names of a shard's two files end."""
SHARD = pa.field("shard", pa.string())
SOURCE = pa.field("source", pa.string())
"""Column of recipes with several sources: which of them a row came from."""
OUTCOME = "outcome"
NO_SHARDS = "`acquire` has published no shards"


def shard_of(unit: Unit) -> str:
    """Name of the shard that a unit is, or was made from."""
    return str(unit.info["shard"])


def by_shard(artifact: Artifact | Shards) -> dict[str, Unit]:
    """Units by the name of their shard; those without one are left out."""
    return {shard_of(unit): unit for unit in artifact.units if "shard" in unit.info}


def read_ledger(unit: Unit, store: Store, columns: Sequence[str], keys: Sequence[str] | None = None) -> Any:
    """A table of those of `columns` that the ledger has: of all its rows, or of those with these keys, in their order.
    Of several sources each ledger has a column `source`, the name of its own.

    Raises `UnusableData` if there is no row with one of the keys.
    """
    wanted = ("key", *columns) if keys is not None else columns
    table = _with_source(unit, read_table(store, unit.only(LEDGER), wanted), columns)
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
    kept = _kept(read_ledger(unit, store, (OUTCOME, *columns)))
    return kept.select([name for name in dict.fromkeys(columns) if name in kept.column_names])


@dataclass(frozen=True)
class KeptRows:
    """Kept rows of one ledger: `schema` of all its columns but the shard, dictionaries as plain values; `table` of the
    rows that were kept, with some of the columns."""

    shard: str
    schema: Any
    table: Any

    def of(self, schema: Any, columns: Sequence[str]) -> Any:
        """A table of `columns` and `shard`, of the types of `schema`; null where the ledger lacks a column."""
        wanted = pa.schema([schema.field(name) for name in columns if name != SHARD.name])
        arrays = [
            self.table.column(field.name).cast(field.type)
            if field.name in self.table.column_names
            else pa.nulls(self.table.num_rows, field.type)
            for field in wanted
        ]
        names = pa.array([self.shard] * self.table.num_rows, SHARD.type)
        return pa.table([*arrays, names], schema=wanted.append(SHARD))


def kept_rows_of(acquired: Shards, store: Store, columns: Sequence[str]) -> Iterator[KeptRows]:
    """The rows of each shard that were kept, with those of `columns` that its ledger has. Each ledger is opened once.

    Raises `DatasetError` if there are no ledgers.
    """
    if not acquired.units:
        raise DatasetError(NO_SHARDS)
    yield from ahead(lambda unit: _kept_rows(unit, store, columns), acquired.units)


def in_common(schemas: Iterable[Any]) -> Any:
    """Names and types of the columns that ledgers have between them, and `shard`.

    Raises `DatasetError` if a column has types that can't be brought together.
    """
    try:
        return pa.unify_schemas(list(schemas), promote_options="permissive").append(SHARD)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DatasetError(
            f"the ledgers have columns of one name and different types ({error}); give the sources' files the same"
            " types, or their columns other names, and acquire them again"
        ) from error


def common_schema(acquired: Shards, store: Store) -> Any:
    """`in_common` of the ledgers. Raises `DatasetError` if there are none."""
    if not acquired.units:
        raise DatasetError(NO_SHARDS)
    return in_common(ahead(lambda unit: _schema(unit, store), acquired.units))


def kept_rows(acquired: Shards, store: Store, schema: Any, columns: Sequence[str]) -> Iterator[Any]:
    """A table for each shard, of the rows that were kept, with `columns` and `shard`, of the types of `schema`."""
    return (rows.of(schema, columns) for rows in kept_rows_of(acquired, store, columns))


def _schema(unit: Unit, store: Store) -> Any:
    with open_table(store, unit.only(LEDGER)) as ledger:
        return _plain_schema(unit, ledger.schema_arrow)


def _kept_rows(unit: Unit, store: Store, columns: Sequence[str]) -> KeptRows:
    with open_table(store, unit.only(LEDGER)) as ledger:
        schema = _plain_schema(unit, ledger.schema_arrow)
        table = columns_of(ledger, (OUTCOME, *(name for name in columns if name != SHARD.name)))
    return KeptRows(shard_of(unit), schema, _with_source(unit, _kept(table), columns))


def _kept(table: Any) -> Any:
    return table.filter(pc.equal(table.column(OUTCOME), Outcome.KEPT.value))


def _with_source(unit: Unit, table: Any, columns: Sequence[str]) -> Any:
    """The table with the name of the unit's source, if that is among the columns, and there are several sources."""
    name = source_of(unit)
    if not name or SOURCE.name not in columns:
        return table
    return table.append_column(SOURCE, pa.array([name] * table.num_rows, SOURCE.type))


def _plain_schema(unit: Unit, schema: Any) -> Any:
    plain = pa.schema([_plain(field) for field in schema if field.name != SHARD.name])
    return plain.append(SOURCE) if source_of(unit) else plain


def _plain(field: Any) -> Any:
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
