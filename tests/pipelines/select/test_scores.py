"""`select` with scores: rules over them, near-duplicates, and what it tells of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.linalg
from asked import asked

from infra.storage import Store
from pipelines.artifacts import Artifact, Counts, digest
from pipelines.building import building
from pipelines.dataset.errors import ScoresDamaged
from pipelines.dataset.figures import figures_of
from pipelines.dataset.scores import features_bytes, scores_bytes
from pipelines.publishing import publish_unit
from pipelines.recipe import Execution, NearDuplicates, Predicate, SelectSpec, Split
from pipelines.recipe.errors import UnknownColumn
from pipelines.reporting import LogReport
from pipelines.score.phash import PerceptualHash
from pipelines.select import stage
from pipelines.select.errors import NothingSelected

EXTRACTOR = "extractor_8px"
SHARDS = (12, 8, 5)
PHASH_FIELDS = list(PerceptualHash.fields)
FLOATS = [pa.field("clip_similarity", pa.float32()), pa.field("nsfw", pa.float32())]
ALL_KEPT = SelectSpec(duplicates=(), split=Split(held_out=0.0))
LOW = Predicate(name="low_similarity", column="clip_similarity", op=">=", value=0.3)


class Metrics(LogReport):
    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def metrics(self, values: Any, step: int | None = None) -> None:
        self.values |= values


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def ledger(shard: int, rows: int, kept: bool = True) -> pa.Table:
    numbers = [100 * shard + row for row in range(rows)]
    return pa.table(
        {
            "uid": [f"{number:032x}" for number in numbers],
            "key": [f"{number:09d}" for number in numbers],
            "caption": [f"picture {number}" for number in numbers],
            "outcome": ["kept" if kept and row % 4 != 3 else "failed" for row in range(rows)],
            "sha256": [f"{number:064x}" for number in numbers],
            "phash": pa.array([7] * rows, pa.uint64()),
            "original_width": pa.array([64 + number % 3 for number in numbers], pa.int32()),
            "original_height": pa.array([64] * rows, pa.int32()),
        }
    )


def published_ledgers(store: Store, *ledgers: pa.Table) -> Artifact:
    with building(store, "acquire", asked(), {}, {}, 1) as build:
        units = []
        for shard, table in enumerate(ledgers):
            sink = io.BytesIO()
            pq.write_table(table, sink)
            kept = table.column("outcome").to_pylist().count("kept")
            counts = Counts(table.num_rows, kept, {}, {"timeout": table.num_rows - kept})
            key = build.unit_key({"shard": f"{shard:05d}", "kept": kept})
            files: dict[str, Path | bytes] = {f"{shard:05d}.tar": b"", f"{shard:05d}.parquet": sink.getvalue()}
            units.append(publish_unit(store, "acquire", key, files, counts, {"shard": f"{shard:05d}"}))
        return build.publish(units)


def looks(number: int) -> tuple[int, bytes]:
    random = np.random.default_rng(number)
    return int(random.integers(0, 2**64, dtype=np.uint64)), random.integers(0, 256, 192, np.uint8).tobytes()


def published_scores(
    store: Store,
    acquired: Artifact,
    fields: list[Any],
    *,
    width: int = 0,
    like: dict[int, int] | None = None,
    **own: Any,
) -> Artifact:
    """Scores of what was kept. `like` gives a number the looks of another one; `own` functions give other columns."""
    makers = {
        "clip_similarity": lambda number: number % 10 / 10,
        "nsfw": lambda number: number % 7 / 7,
        "phash": lambda number: looks((like or {}).get(number, number))[0],
        "thumbnail": lambda number: looks((like or {}).get(number, number))[1],
    } | own
    with building(store, "score", asked(), {"acquire": acquired}, {}, 1) as build:
        units = []
        for unit in acquired.units:
            rows = pq.read_table(io.BytesIO(store.read_bytes(unit.only(".parquet"))))
            kept = [row for row in rows.to_pylist() if row["outcome"] == "kept"]
            columns: dict[str, Any] = {name: [row[name] for row in kept] for name in ("uid", "key")}
            columns |= {field.name: [makers[field.name](int(key)) for key in columns["key"]] for field in fields}
            files: dict[str, Path | bytes] = {"scores.parquet": scores_bytes(columns, fields, {})}
            if width:
                features = [np.random.default_rng(int(key)).normal(size=width) for key in columns["key"]]
                files["features.npy"] = features_bytes(np.array(features, np.float16).reshape(len(kept), width))
            key = build.unit_key({"files": {name: digest(data.hex()) for name, data in files.items()}})
            counts = Counts(len(kept), len(kept))
            units.append(publish_unit(store, "score", key, files, counts, {"shard": unit.info["shard"]}))
        features_by = {"model": EXTRACTOR, "version": "1", "sha256": ""}
        return build.publish(units, info={"scorers": {"features": features_by} if width else {}})


def run(
    store: Store, spec: SelectSpec, acquired: Artifact, scored: Artifact | None = None, report: Metrics | None = None
) -> Artifact:
    inputs = {"acquire": acquired} | ({} if scored is None else {"score": scored})
    return stage.select(spec, inputs, store, report or Metrics(), Execution())


def table(store: Store, artifact: Artifact, name: str) -> pa.Table:
    return pq.read_table(io.BytesIO(store.read_bytes(artifact.units[0].path(name))))


@pytest.fixture
def acquired(local: Store) -> Artifact:
    return published_ledgers(local, *(ledger(shard, rows) for shard, rows in enumerate(SHARDS)))


def test_rules_see_the_scores_of_their_own_row(local: Store, acquired: Artifact) -> None:
    scored = published_scores(local, acquired, FLOATS)
    report = Metrics()
    artifact = run(local, ALL_KEPT.model_copy(update={"where": (LOW,)}), acquired, scored, report)
    numbers = [int(key) for key in table(local, artifact, "selection.parquet").column("key").to_pylist()]
    kept = [100 * shard + row for shard, rows in enumerate(SHARDS) for row in range(rows) if row % 4 != 3]
    assert numbers == [number for number in kept if number % 10 >= 3]
    assert artifact.counts.dropped == {"low_similarity": len(kept) - len(numbers)}
    told = {figure.label: figure for figure in figures_of(artifact)}
    for name, expected in (
        ("mean_clip_similarity/acquired", np.mean([number % 10 / 10 for number in kept])),
        ("mean_clip_similarity/selected", np.mean([number % 10 / 10 for number in numbers])),
        ("mean_nsfw/acquired", np.mean([number % 7 / 7 for number in kept])),
    ):
        assert told[name].value == report.values[name] == pytest.approx(expected, abs=1e-6)
    assert set(artifact.units[0].info) == {"train", "held_out", "figures"}
    assert {label: figure.count for label, figure in told.items()} == {
        f"mean_{name}/{side}": len(own)
        for name in ("clip_similarity", "nsfw")
        for side, own in (("selected", numbers), ("acquired", kept))
    }


def test_figures_are_no_part_of_the_content(local: Store, acquired: Artifact) -> None:
    """Other scores that select the same pairs make nothing anew behind `select`."""
    first = run(local, ALL_KEPT, acquired, published_scores(local, acquired, FLOATS))
    second = run(local, ALL_KEPT, acquired, published_scores(local, acquired, FLOATS, nsfw=lambda number: 0.5))
    assert first.key != second.key
    assert first.revision == second.revision
    assert run(local, ALL_KEPT, acquired).revision == first.revision


def test_a_score_that_is_not_there_is_named_with_what_brings_it(local: Store, acquired: Artifact) -> None:
    spec = ALL_KEPT.model_copy(update={"where": (LOW,)})
    with pytest.raises(UnknownColumn, match=r"low_similarity.*'clip_similarity'.*needs score.clip in the recipe"):
        run(local, spec, acquired)
    with pytest.raises(UnknownColumn, match=r"score\.clip.*nsfw"):
        run(local, spec, acquired, published_scores(local, acquired, FLOATS[1:]))


def test_missing_rows_of_scores_are_refused(local: Store, acquired: Artifact) -> None:
    fewer = published_ledgers(local, ledger(0, SHARDS[0] - 2), *(ledger(1 + n, r) for n, r in enumerate(SHARDS[1:])))
    with pytest.raises(ScoresDamaged, match="shard 00000 has no scores of '000000010'"):
        run(local, ALL_KEPT, acquired, published_scores(local, fewer, FLOATS))
    with pytest.raises(ScoresDamaged, match="features of 18 of 19 selected pairs"):
        run(local, ALL_KEPT, acquired, published_scores(local, fewer, [], width=4))
    with pytest.raises(ScoresDamaged, match="scores have no shard 00001"):
        run(local, ALL_KEPT, acquired, published_scores(local, published_ledgers(local, ledger(0, 12)), FLOATS))


def test_shards_without_kept_pairs_do_no_harm(local: Store) -> None:
    acquired = published_ledgers(local, ledger(0, 8, kept=False), ledger(1, 8))
    artifact = run(local, ALL_KEPT, acquired, published_scores(local, acquired, FLOATS))
    assert artifact.counts.kept == 6
    none = published_ledgers(local, ledger(0, 8, kept=False))
    with pytest.raises(NothingSelected, match="`acquire` kept none"):
        run(local, ALL_KEPT, none, published_scores(local, none, FLOATS))


def test_near_duplicates_go_last_and_name_their_winner(local: Store, acquired: Artifact) -> None:
    """0, 101 and 2 look like 200, which `sha256` knows nothing of; 2 is dropped by a rule before."""
    scored = published_scores(local, acquired, PHASH_FIELDS, like={0: 200, 101: 200, 2: 200})
    rule = Predicate(name="not_two", column="key", op="!=", value="000000002")
    spec = SelectSpec(near_duplicates=NearDuplicates(), where=(rule,), split=Split(held_out=0.0))
    artifact = run(local, spec, acquired, scored)
    assert artifact.counts.dropped == {"near_duplicate": 2, "not_two": 1}
    dropped = table(local, artifact, "dropped.parquet")
    assert dict(zip(dropped["key"].to_pylist(), dropped["reason"].to_pylist(), strict=True)) == {
        "000000000": "near_duplicate",
        "000000002": "not_two",
        "000000200": "near_duplicate",
    }
    pairs = table(local, artifact, "near_duplicates.parquet").to_pylist()
    # Originals are 64 + number % 3 wide: 101 and 200 are the largest, of which 101 has the lower uid.
    assert [(pair["key"], pair["winner_shard"], pair["winner_key"]) for pair in pairs] == [
        ("000000000", "00001", "000000101"),
        ("000000200", "00001", "000000101"),
    ]
    assert [(pair["bits"], pair["rms"], pair["uid"]) for pair in pairs] == [
        (0, 0.0, f"{0:032x}"),
        (0, 0.0, f"{200:032x}"),
    ]


def test_hashes_of_the_scores_hide_those_of_the_ledgers(local: Store, acquired: Artifact) -> None:
    """All ledgers here say 7: were it not for the scores, everything would be left alone."""
    scored = published_scores(local, acquired, PHASH_FIELDS, like=dict.fromkeys(range(1000), 0))
    spec = ALL_KEPT.model_copy(update={"near_duplicates": NearDuplicates()})
    assert run(local, spec, acquired, scored).counts.kept == 1


def test_selection_with_near_duplicates_is_the_same_bytes_every_time(local: Store, tmp_path: Path) -> None:
    revisions = []
    for store in (local, Store(tmp_path / "other")):
        acquired = published_ledgers(store, *(ledger(shard, rows) for shard, rows in enumerate(SHARDS)))
        scored = published_scores(store, acquired, [*FLOATS, *PHASH_FIELDS], like={1: 0, 100: 0})
        spec = SelectSpec(near_duplicates=NearDuplicates(max_bits=4), where=(LOW,))
        revisions.append(run(store, spec, acquired, scored).revision)
    assert revisions[0] == revisions[1]


@pytest.mark.parametrize("few", [4096, 5])
def test_distance_of_what_is_selected_from_what_was_acquired(
    local: Store, acquired: Artifact, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.select.scores.FEATURES_AT_ONCE", few)
    scored = published_scores(local, acquired, FLOATS, width=4)
    spec = ALL_KEPT.model_copy(update={"where": (LOW,)})
    artifact = run(local, spec, acquired, scored)
    kept = [100 * shard + row for shard, rows in enumerate(SHARDS) for row in range(rows) if row % 4 != 3]
    every = np.array([np.random.default_rng(number).normal(size=4) for number in kept]).astype(np.float16)
    some = every[[number % 10 >= 3 for number in kept]]
    a, b = some.astype(np.float64), every.astype(np.float64)
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    distance = figures_of(artifact)[0]
    assert distance.label == f"frechet_distance/selected/{EXTRACTOR}"
    assert (distance.value, distance.count) == (pytest.approx(expected, rel=1e-6), len(some))
    all_of_them = run(local, ALL_KEPT, acquired, scored)
    assert figures_of(all_of_them)[0].value == pytest.approx(0.0, abs=1e-9)
