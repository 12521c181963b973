"""Licences and attributions are those of the selected samples, whatever else their ledgers list."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from asked import asked

from infra.storage import Store
from pipelines.artifacts import Artifact, Counts
from pipelines.building import building
from pipelines.dataset.licences import attributions, licences
from pipelines.publishing import publish_unit

LEDGERS: dict[str, dict[str, list[Any]]] = {
    "one": {"key": ["a", "b", "c"], "licence": ["CC0", None, "CC-BY"], "attribution": ["Ann", "", "Bob"]},
    "two": {"key": ["d", "e"], "licence": ["CC0", "CC-BY"], "attribution": ["Cleo", None]},
    "three": {"key": ["f"]},
}


def parquet(columns: dict[str, list[Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def published(store: Store, chosen: list[tuple[str, str]]) -> tuple[Artifact, Artifact]:
    with building(store, "acquire", asked(), {}, {}, 1) as build:
        units = [
            publish_unit(
                store,
                "acquire",
                build.unit_key({"shard": shard}),
                {f"{shard}.parquet": parquet(ledger)},
                Counts(len(ledger["key"]), len(ledger["key"])),
                {"shard": shard},
            )
            for shard, ledger in LEDGERS.items()
        ]
        acquired = build.publish(units)
    rows = sorted(chosen)
    columns = {"shard": [shard for shard, _ in rows], "key": [key for _, key in rows], "split": ["train"] * len(rows)}
    with building(store, "select", asked({"chosen": rows}), {}, {}, 1) as build:
        files: dict[str, Path | bytes] = {"selection.parquet": parquet(columns | {"uid": columns["key"]})}
        unit = publish_unit(store, "select", build.unit_key({"chosen": rows}), files, Counts(len(rows), len(rows)))
        return acquired, build.publish([unit])


def test_of_the_selected_samples_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    acquired, selected = published(store, [("one", "a"), ("one", "b"), ("two", "e"), ("three", "f")])
    assert licences(acquired, selected, store) == {"CC0": 1, "not stated": 2, "CC-BY": 1}
    assert attributions(acquired, selected, store) == {"Ann"}
    acquired, selected = published(store, [("one", "c"), ("two", "d")])
    assert licences(acquired, selected, store) == {"CC-BY": 1, "CC0": 1}
    assert attributions(acquired, selected, store) == {"Bob", "Cleo"}
