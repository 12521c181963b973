"""Scores beside the ledgers' rows, and what the selection makes of them: means, and a distance of image features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.storage import Store
from pipelines.artifacts import Artifact, Unit
from pipelines.dataset.ledgers import by_shard, shard_of
from pipelines.dataset.scores import FEATURES, SCORES, load_features, score_columns
from pipelines.select.errors import SelectError
from pipelines.select.select import Selection

ROW_COLUMNS = ("uid", "key")
FEATURES_AT_ONCE = 4096


def score_types(scored: Artifact | None, store: Store) -> dict[str, Any]:
    """Arrow types of the scores by column; none without a `score` node. Such a column hides a ledger's of its name."""
    types = {} if scored is None else score_columns(scored, store)
    return {name: column_type for name, column_type in types.items() if name not in ROW_COLUMNS}


def averaged(types: Mapping[str, Any]) -> list[str]:
    """The columns whose means tell something: similarities and probabilities, not hashes."""
    return [name for name, column_type in types.items() if pa.types.is_floating(column_type)]


def with_scores(tables: Iterable[Any], scored: Artifact, store: Store, types: Mapping[str, Any]) -> Iterator[Any]:
    """The tables of `kept_rows`, one a shard, each with the columns of its scores that `types` has.

    Raises `SelectError` if a row has no scores.
    """
    units = by_shard(scored)
    for table in tables:
        yield _joined(table, units, store, types)


def means(selection: Selection, columns: Sequence[str]) -> dict[str, float]:
    """Of each column over all rows and over the selected ones: `<column>_acquired` and `<column>_selected`."""
    selected = selection.rows.filter(pa.array(selection.stays))
    found = {}
    for column in columns:
        for name, rows in (("acquired", selection.rows), ("selected", selected)):
            mean = pc.mean(rows.column(column)).as_py()
            if mean is not None:
                found[f"{column}_{name}"] = float(mean)
    return found


def feature_distance(selected: Any, scored: Artifact, store: Store) -> dict[str, float]:
    """`fd_selected_<extractor>`: Frechet distance of the selected images' features from those of all acquired ones.

    `selected` has shard and key. Empty if there are no features, or of fewer than two images.
    """
    if not all(any(entry.name == FEATURES for entry in unit.files) for unit in scored.units):
        return {}
    import torch

    from ldm.metrics import FeatureMoments, frechet_distance

    moments: list[FeatureMoments] = []
    for unit in scored.units:
        shard = shard_of(unit)
        with store.open(unit.path(SCORES)) as file:
            keys = pq.read_table(file, columns=["key"]).column("key").combine_chunks()
        chosen = selected.filter(pc.equal(selected.column("shard"), shard)).column("key").combine_chunks()
        stays = pc.is_in(keys, chosen).to_numpy(zero_copy_only=False)
        for first in range(0, len(keys), FEATURES_AT_ONCE):
            wanted = [(shard, key) for key in keys[first : first + FEATURES_AT_ONCE].to_pylist()]
            features = torch.from_numpy(load_features(scored, store, wanted))
            moments = moments or [FeatureMoments(features.shape[1]) for _ in range(2)]
            moments[0].add(features)
            moments[1].add(features[torch.from_numpy(stays[first : first + FEATURES_AT_ONCE])])
    if not moments or min(each.count for each in moments) < 2:
        return {}
    name = scored.info["scorers"]["features"]["model"]
    return {f"fd_selected_{name}": frechet_distance(moments[1], moments[0])}


def _joined(table: Any, units: Mapping[str, Unit], store: Store, types: Mapping[str, Any]) -> Any:
    if not table.num_rows:
        for name, column_type in types.items():
            table = table.append_column(name, pa.nulls(0, column_type))
        return table
    shard = str(table.column("shard")[0].as_py())
    if shard not in units:
        raise SelectError(f"there are no scores of shard {shard}; score again with `--force score`")
    with store.open(units[shard].path(SCORES)) as file:
        scores = pq.read_table(file, columns=["key", *types])
    places = pc.index_in(table.column("key").combine_chunks(), scores.column("key").combine_chunks())
    if places.null_count:
        missing = table.column("key")[int(np.argmax(places.is_null().to_numpy(zero_copy_only=False)))]
        raise SelectError(f"shard {shard} has no scores of {missing.as_py()!r}; score again with `--force score`")
    for name in types:
        table = table.append_column(name, scores.column(name).take(places))
    return table
