"""Scores beside the ledgers' rows, and what the selection makes of them: means, and a distance of image features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infra.storage import Store
from pipelines.artifacts import Artifact
from pipelines.dataset.ahead import ahead
from pipelines.dataset.errors import ScoresDamaged
from pipelines.dataset.figures import FRECHET_DISTANCE, Figure
from pipelines.dataset.scores import AGAIN, ROW_COLUMNS, Scores
from pipelines.dataset.selection import rows_by_shard
from pipelines.select.select import Selection

FEATURES_AT_ONCE = 4096


def score_types(scores: Scores) -> dict[str, Any]:
    """Arrow types of the scores by column; none without a `score` node. Such a column hides a ledger's of its name."""
    return {name: column_type for name, column_type in scores.types.items() if name not in ROW_COLUMNS}


def averaged(types: Mapping[str, Any]) -> list[str]:
    """The columns whose means tell something: similarities and probabilities, not hashes."""
    return [name for name, column_type in types.items() if pa.types.is_floating(column_type)]


def with_scores(tables: Iterable[Any], scores: Scores, columns: Sequence[str]) -> Iterator[Any]:
    """The tables of `kept_rows`, one a shard, each with these columns of its scores.

    Raises `pipelines.dataset.errors.ScoresDamaged` if a row has no scores.
    """
    return ahead(lambda table: _joined(table, scores, columns), tables)


def means(selection: Selection, columns: Sequence[str]) -> list[Figure]:
    """The mean of each column over the selected rows ("selected") and over all ("acquired")."""
    selected = selection.rows.filter(pa.array(selection.stays))
    found = []
    for column in columns:
        for subject, rows in (("selected", selected), ("acquired", selection.rows)):
            values = rows.column(column)
            mean = pc.mean(values).as_py()
            if mean is not None:
                found.append(Figure(f"mean_{column}", subject, float(mean), count=len(values) - values.null_count))
    return found


def feature_distance(selected: Any, scored: Artifact, store: Store) -> list[Figure]:
    """Frechet distance of the selected images' features from those of all acquired ones.

    `selected` has shard and key, and is sorted by them. Empty if there are no features, or of fewer than two images.

    Raises `ScoresDamaged` if a selected pair has none.
    """
    scores = Scores(scored, store)
    if not scores.has_features or min(selected.num_rows, scored.counts.kept) < 2:
        return []
    import torch

    from ldm.metrics import FeatureMoments, frechet_distance, frechet_distance_of_features

    parts = _features(selected, scores)
    if scored.counts.kept <= FEATURES_AT_ONCE:  # by a matrix of rows, which is the smaller one for a few
        every, stays = (np.concatenate(own) for own in zip(*parts, strict=True))
        distance = frechet_distance_of_features(torch.from_numpy(every[stays]), torch.from_numpy(every))
    else:
        moments = [FeatureMoments(scores.width) for _ in range(2)]
        for every, stays in parts:
            moments[0].add(torch.from_numpy(every))
            moments[1].add(torch.from_numpy(every[stays]))
        distance = frechet_distance(moments[1], moments[0])
    extractor = str(scored.info["scorers"]["features"]["model"])
    return [Figure(FRECHET_DISTANCE, "selected", distance, extractor, count=selected.num_rows)]


def _features(selected: Any, scores: Scores) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Of all acquired images, `FEATURES_AT_ONCE` rows at most each time, and which of them are selected."""
    selected_of, found = rows_by_shard(selected), 0
    for shard in scores.shards:
        keys = scores.read(shard, ["key"]).column("key").combine_chunks()
        chosen = selected_of.get(shard, selected.slice(0, 0)).column("key").combine_chunks()
        stays = pc.is_in(keys, chosen).to_numpy(zero_copy_only=False)
        found += int(stays.sum())
        for first in range(0, len(keys), FEATURES_AT_ONCE):
            wanted = [(shard, key) for key in keys[first : first + FEATURES_AT_ONCE].to_pylist()]
            yield scores.features(wanted), stays[first : first + FEATURES_AT_ONCE]
    if found != selected.num_rows:
        raise ScoresDamaged(f"there are features of {found:,} of {selected.num_rows:,} selected pairs; {AGAIN}")


def _joined(table: Any, scores: Scores, columns: Sequence[str]) -> Any:
    if not table.num_rows:
        for name in columns:
            table = table.append_column(name, pa.nulls(0, scores.types[name]))
        return table
    own = scores.read(str(table.column("shard")[0].as_py()), columns, table.column("key").to_pylist())
    for name in columns:
        table = table.append_column(name, own.column(name))
    return table
