"""Published tables: what is read is what was written, or an error that names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from infra.storage import Store
from pipelines.dataset.errors import TableUnreadable
from pipelines.dataset.tables import open_table, read_table, table_bytes

TABLE = pa.table({"key": [f"{number:09d}" for number in range(400)], "score": np.linspace(0, 1, 400)})


def test_columns_come_back_and_those_that_are_not_there_are_left_out(store: Store) -> None:
    store.publish_bytes("a/t.parquet", table_bytes(TABLE))
    assert read_table(store, "a/t.parquet", ["score", "absent", "score"]).equals(TABLE.select(["score"]))
    with open_table(store, "a/t.parquet") as file:
        assert file.schema_arrow.names == ["key", "score"]


def test_a_flipped_bit_never_gives_other_values(tmp_path: Path) -> None:
    """But in the footer, where some bits mean nothing, and a few are of names and numbers."""
    store, whole = Store(tmp_path), table_bytes(TABLE)
    random, footer = np.random.default_rng(0), int.from_bytes(whole[-8:-4], "little") + 8
    for _ in range(200):
        data = bytearray(whole)
        data[random.integers(len(data) - footer)] ^= 1 << int(random.integers(8))
        store.publish_bytes("t.parquet", bytes(data))
        try:
            assert read_table(store, "t.parquet", TABLE.column_names).equals(TABLE)
        except TableUnreadable as error:
            assert f"{store.url}/t.parquet can't be read" in str(error)  # noqa: PT017 - most do raise


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_what_is_missing_or_cut_short_is_named(store: Store, keep: int) -> None:
    with pytest.raises(TableUnreadable, match=r"t\.parquet can't be read.*store verify"):
        read_table(store, "t.parquet", ["key"])
    store.publish_bytes("t.parquet", table_bytes(TABLE)[:keep])
    with pytest.raises(TableUnreadable, match=r"t\.parquet can't be read"):
        read_table(store, "t.parquet", ["key"])
