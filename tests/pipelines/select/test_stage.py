"""`select` as a stage: from published ledgers to one published selection."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from asked import asked

from infra.storage import Store
from pipelines.artifacts import Artifact, Counts, artifact_key
from pipelines.building import building
from pipelines.dataset.errors import DatasetError
from pipelines.publishing import publish_unit
from pipelines.recipe import Execution, Predicate, SelectSpec, Split
from pipelines.recipe.errors import UnknownColumn
from pipelines.reporting import LogReport
from pipelines.select import stage
from pipelines.select.errors import NothingSelected


class Metrics(LogReport):
    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def metrics(self, values: Any, step: int | None = None) -> None:
        self.values |= values


def ledger(shard: int, n: int, **columns: Any) -> pa.Table:
    own = {
        "uid": [f"{shard:02x}{i:06x}" for i in range(n)],
        "key": [f"{shard:05d}{i:04d}" for i in range(n)],
        "url": [f"http://127.0.0.1/{shard}/{i}" for i in range(n)],
        "caption": [f"picture {i} of shard {shard}" for i in range(n)],
        "outcome": ["failed" if i % 5 == 4 else "dropped" if i % 5 == 3 else "kept" for i in range(n)],
        "sha256": [f"{(shard * n + i) // 2:064x}" for i in range(n)],
        "original_width": pa.array([64 + i for i in range(n)], pa.int32()),
        "original_height": pa.array([64] * n, pa.int32()),
    }
    return pa.table(own | columns)


def publish(store: Store, *ledgers: pa.Table) -> Artifact:
    spec = {"source": "test"}
    with building(store, "acquire", asked(spec), {}, {}, 1) as build:
        units = []
        for shard, table in enumerate(ledgers):
            sink = io.BytesIO()
            pq.write_table(table, sink)
            outcomes = table.column("outcome").to_pylist()
            counts = Counts(
                len(outcomes),
                outcomes.count("kept"),
                {"too_small": outcomes.count("dropped")},
                {"timeout": outcomes.count("failed")},
            )
            key = build.unit_key({"shard": f"{shard:05d}", "bytes": sink.getvalue().hex()[:64], "rows": table.num_rows})
            files: dict[str, Path | bytes] = {f"{shard:05d}.tar": b"", f"{shard:05d}.parquet": sink.getvalue()}
            units.append(publish_unit(store, "acquire", key, files, counts, {"shard": f"{shard:05d}"}))
        return build.publish(units)


def run(store: Store, acquired: Artifact, spec: SelectSpec, report: Metrics | None = None) -> Artifact:
    return stage.select(spec, {"acquire": acquired}, store, report or Metrics(), Execution())


def table(store: Store, artifact: Artifact, name: str) -> pa.Table:
    return pq.read_table(io.BytesIO(store.read_bytes(artifact.units[0].path(name))))


SPEC = SelectSpec(
    where=(Predicate(name="not_the_first", column="key", op="not_matches", value="0000$"),), split=Split(held_out=0.2)
)


def test_selection_accounts_for_every_kept_pair(store: Store) -> None:
    acquired = publish(store, ledger(0, 50), ledger(1, 30))
    report = Metrics()
    artifact = run(store, acquired, SPEC, report)
    selection, dropped = table(store, artifact, "selection.parquet"), table(store, artifact, "dropped.parquet")

    assert artifact.counts.total == acquired.counts.kept == selection.num_rows + dropped.num_rows
    assert artifact.counts.kept == selection.num_rows
    assert artifact.counts.dropped["not_the_first"] == 2
    assert set(artifact.counts.dropped) == {"not_the_first", "duplicate_sha256"}
    assert selection.column_names == ["uid", "shard", "key", "split"]
    assert selection.schema.field("shard").type == pa.string()
    assert dropped.column_names == ["uid", "shard", "key", "reason"]
    assert selection.equals(selection.sort_by([("shard", "ascending"), ("key", "ascending")]))
    sides = selection.column("split").to_pylist()
    assert artifact.info == {"train": sides.count("train"), "held_out": sides.count("held_out"), "figures": []}
    assert 0 < artifact.info["held_out"] < artifact.info["train"]
    assert report.values["pairs/train"] == sides.count("train")
    assert report.values["pairs/dropped/duplicate_sha256"] == artifact.counts.dropped["duplicate_sha256"]


def test_same_question_is_answered_from_the_manifest(store: Store) -> None:
    acquired = publish(store, ledger(0, 50))
    first = run(store, acquired, SPEC)
    for unit in acquired.units:  # the ledgers are not looked at again
        store.delete(unit.only(".parquet"))
    assert run(store, acquired, SPEC) == first


def test_selection_is_the_same_bytes_every_time(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    revisions = [run(s, publish(s, ledger(0, 50), ledger(1, 30)), SPEC).revision for s in (store, other)]
    assert revisions[0] == revisions[1]


def test_rules_that_change_nothing_give_an_equal_revision(store: Store) -> None:
    """So nothing that follows is made anew."""
    acquired = publish(store, ledger(0, 50))
    stricter = SPEC.model_copy(
        update={"where": (*SPEC.where, Predicate(name="any", column="caption", op="min_chars", value=1))}
    )
    first, second = run(store, acquired, SPEC), run(store, acquired, stricter)
    assert first.key != second.key
    assert first.revision == second.revision


def test_sides_stay_when_pairs_are_added(store: Store) -> None:
    spec = SelectSpec(duplicates=(), split=Split(held_out=0.3))
    small = table(store, run(store, publish(store, ledger(0, 50)), spec), "selection.parquet")
    large = table(store, run(store, publish(store, ledger(0, 50), ledger(1, 30)), spec), "selection.parquet")
    assert large.slice(0, small.num_rows).equals(small)


def test_columns_may_be_absent_or_empty_in_some_ledgers(store: Store) -> None:
    first = ledger(
        0, 20, score=pa.array([0.1 * i for i in range(20)]), vendor=pa.array(["Goog"] * 20).dictionary_encode()
    )
    second = ledger(1, 20, score=pa.nulls(20), licence=["cc0"] * 20)
    spec = SelectSpec(
        duplicates=(),
        where=(
            Predicate(name="score", column="score", op=">=", value=0, missing="keep"),
            Predicate(name="vendor", column="vendor", op="==", value="Goog", missing="drop"),
        ),
        split=Split(held_out=0.0),
    )
    artifact = run(store, publish(store, first, second), spec)
    assert (artifact.counts.kept, artifact.counts.dropped) == (12, {"vendor": 12})


def test_unfit_rules_and_empty_results_publish_nothing(store: Store) -> None:
    acquired = publish(store, ledger(0, 10))
    wrong = SPEC.model_copy(update={"duplicates": ("md5",)})
    with pytest.raises(UnknownColumn, match=r"'md5'.*caption"):
        run(store, acquired, wrong)
    none_left = SelectSpec(where=(Predicate(name="huge", column="original_width", op=">", value=9000),))
    with pytest.raises(NothingSelected, match="huge 6"):
        run(store, acquired, none_left)
    nothing_kept = publish(store, ledger(0, 4, outcome=["failed"] * 4))
    with pytest.raises(NothingSelected, match="acquire"):
        run(store, nothing_kept, SelectSpec())
    assert store.listdir("select/units") == []
    assert store.listdir("select/revisions") == []


def test_ledgers_whose_types_contradict_are_refused(store: Store) -> None:
    acquired = publish(store, ledger(0, 4, score=[1, 2, 3, 4]), ledger(1, 4, score=["a", "b", "c", "d"]))
    with pytest.raises(DatasetError, match="score"):
        run(store, acquired, SelectSpec())


def test_no_shards_is_nothing_selected(store: Store) -> None:
    with pytest.raises(DatasetError, match="no shards"):
        run(store, publish(store), SelectSpec())


def test_key_is_the_one_that_a_plan_computes(store: Store) -> None:
    acquired = publish(store, ledger(0, 50))
    expected = artifact_key("select", stage.FORMAT_VERSION, stage.identity(SPEC).content, {"acquire": acquired})
    assert run(store, acquired, SPEC).key == expected
