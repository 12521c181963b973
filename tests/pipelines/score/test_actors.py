"""`score` on a local Ray cluster: several workers, and their errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.storage import Store
from pipelines.artifacts import Artifact
from pipelines.dataset.errors import UnusableImage
from pipelines.dataset.scores import load_scores
from pipelines.recipe import Execution, ScoreSpec
from pipelines.score import stage


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_two_workers_score_as_one_does(
    published: Any,
    trained_clip: Artifact,
    store: Store,
    report: Any,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    spec = ScoreSpec(clip="clip", features="efficientnet_lite0", batch_size=4)
    inputs = {"acquire": published.acquire((4, 4, 4, 4)), "train.clip": trained_clip}
    scored = stage.score(spec, inputs, store, report, Execution(device="cpu", score_workers=2))
    assert [unit.info["shard"] for unit in scored.units[::3]] == ["00000", "00001", "00002", "00003"]
    more = stage.score(
        spec, inputs | {"acquire": published.acquire((4, 4, 4, 8))}, store, report, Execution(device="cpu")
    )
    assert [(unit.info["computed"], unit.info["copied"]) for unit in more.units[9:]] == [(3, 3)] * 3
    elsewhere = type(published)(Store(tmp_path / "other"), tmp_path / "networks")
    spoiled = {"acquire": elsewhere.acquire((4, 4), spoil="000000005")}
    with pytest.raises(UnusableImage, match="image '000000005'"):
        stage.score(ScoreSpec(), spoiled, elsewhere.store, report, Execution(device="cpu", score_workers=2))

    by_two = load_scores(scored, store, ["clip_similarity"]).column("clip_similarity").to_numpy()
    request.getfixturevalue("in_process")
    for unit in scored.units:
        store.delete(f"score/units/{unit.key}")
    store.delete(f"score/keys/{scored.key}.json")
    alone = stage.score(spec, inputs, store, report, Execution(device="cpu"))
    assert alone.revision == scored.revision
    by_one = load_scores(alone, store, ["clip_similarity"]).column("clip_similarity").to_numpy()
    assert by_two == pytest.approx(by_one, abs=1e-5)
