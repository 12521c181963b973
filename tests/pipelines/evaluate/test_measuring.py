"""`evaluate` with figures: what is measured, that it repeats, that it goes on where it was killed."""

from __future__ import annotations

import io
import json
import math
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from asked import asked
from PIL import Image

from infra.storage import Store
from ldm.features import load_extractor
from ldm.metrics import frechet_distance_of_features
from ldm.unet import UNet2DCondition
from pipelines.artifacts import Artifact, Counts, fetch_folder
from pipelines.building import building
from pipelines.dataset.figures import Figure, figures_of, metrics_of
from pipelines.dataset.images import SelectedImages
from pipelines.dataset.scores import features_bytes, load_features, scores_bytes
from pipelines.evaluate import stage, worker
from pipelines.evaluate.pairs import choose_pairs
from pipelines.publishing import publish_unit
from pipelines.recipe import EvaluateSpec, Execution, Split, TextToImageModel
from pipelines.recipe.networks import initial_unet

pytestmark = pytest.mark.usefixtures("in_process")
X = "efficientnet_lite0_128px"
JUDGE = "hub:colours"
KID, FD, CLIP = f"kernel_distance/seen/{X}", f"frechet_distance/seen/{X}", f"clip_score/seen/{JUDGE}"
NUM_IMAGES, NUM_PROMPTS = 12, 10
NUM_PICTURES = 2 * NUM_IMAGES + NUM_PROMPTS


class Colours:
    """A judge to whom an image is its colours, and a text the number in it."""

    identity = "colours@1"

    def images(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(images_BHWC.float().mean(dim=(1, 2)) + 1, dim=1)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        numbers = torch.tensor([[float("".join(filter(str.isdigit, text))), 1.0, 2.0] for text in texts])
        return torch.nn.functional.normalize(numbers, dim=1)


@pytest.fixture(autouse=True)
def _judge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "trained_judge" in request.fixturenames:
        return

    def load_clip(source: str, device: object) -> Colours:
        assert source == JUDGE
        return Colours()

    monkeypatch.setitem(sys.modules, "ldm.clip", types.SimpleNamespace(load_clip=load_clip))


@pytest.fixture
def inputs(published: Any) -> dict[str, Artifact]:
    acquired = published.acquire((40, 40, 16))
    return {
        "train.base": published.unet(),
        "train.autoencoder": published.autoencoder(),
        "acquire": acquired,
        "select": published.select(acquired),
    }


@pytest.fixture
def measured_model(model: TextToImageModel) -> TextToImageModel:
    spec = EvaluateSpec(images=NUM_IMAGES, prompts=NUM_PROMPTS, derangements=5, batch_size=5, judge=JUDGE)
    sampling = model.sampling.model_copy(update={"steps": 2, "prompts": ("red heart",)})
    return model.model_copy(update={"evaluate": spec, "sampling": sampling})


def changed(model: TextToImageModel, **settings: Any) -> TextToImageModel:
    assert model.evaluate is not None
    return model.model_copy(update={"evaluate": model.evaluate.model_copy(update=settings)})


def evaluate(inputs: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any) -> Artifact:
    return stage.evaluate("base", model, inputs, store, report, Execution(device="cpu"))


def described(store: Store, artifact: Artifact, name: str = "metrics.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(store.read_bytes(artifact.units[0].path(name)))
    return found


def measured(store: Store, artifact: Artifact) -> dict[str, Figure]:
    """The figures of `metrics.json`, by label."""
    found = [Figure.from_json(record) for record in described(store, artifact)["figures"]]
    return {figure.label: figure for figure in found}


def real_images(inputs: dict[str, Artifact], store: Store, pairs: Sequence[Any]) -> torch.Tensor:
    images = SelectedImages(store, inputs["acquire"], inputs["select"], split=pairs[0].split, size_px=16)
    return images.rows([pair.row for pair in pairs])


class Oracle(worker.Measurer):
    """For whom the trained network's pictures are the real images of their captions."""

    def _pictures(self, network: Any, shots: Any) -> torch.Tensor:
        if network != "trained" or not all("," in shot.prompt for shot in shots):
            return super()._pictures(network, shots)
        job, figures = self._job, self._figures
        found = []
        for shot in shots:
            for split, images in self._real.items():
                table = pq.read_table(job.store.open(figures.select.units[0].path("selection.parquet"))).to_pylist()
                keys = [row["key"] for row in table if row["split"] == split]
                key = f"{int(shot.prompt.split(', ')[1].split()[0]):09d}"
                if key in keys:
                    found.append(images.rows([keys.index(key)]))
        return torch.cat(found)


def test_figures_are_of_pictures_and_real_images_and_carry_what_made_them(
    inputs: dict[str, Artifact], store: Store, measured_model: TextToImageModel, report: Any
) -> None:
    artifact = evaluate(inputs, store, measured_model, report)
    (unit,) = artifact.units
    facts = described(store, artifact)
    figures = measured(store, artifact)
    assert list(figures) == [
        f"kernel_distance/seen/{X}", f"frechet_distance/seen/{X}", f"clip_score/seen/{JUDGE}",
        *(f"{name}/seen/{X}" for name in ("monge_distance", "precision", "recall")),
        *(f"faithfulness/{side}/{by}" for by in (JUDGE, X) for side in ("seen", "held_out")),
    ]  # fmt: skip
    for label, figure in figures.items():
        numbers = (figure.value, figure.floor, figure.untrained, figure.error)
        assert all(math.isfinite(value) for value in numbers if value is not None)
        assert figure.count == (NUM_IMAGES if "faithfulness" not in label else NUM_PROMPTS)
        is_faithfulness = figure.name == "faithfulness"
        assert is_faithfulness or None not in numbers[:3]
        assert (figure.error is not None) == (figure.name in {"kernel_distance", "clip_score"})
    assert figures_of(unit) == figures_of(artifact) == list(figures.values())
    assert report.values["images_per_s"] > 0
    assert (facts["images"], facts["prompts_seen"], facts["prompts_held_out"]) == (12, 10, 10)
    assert (facts["extractor"], facts["judge"], facts["sampler"]) == (X, "colours@1", "dpmpp_2m")
    assert facts["extractor_sha256"] == load_extractor("efficientnet_lite0").sha256
    assert artifact.counts.total == artifact.counts.kept == 2 + NUM_PICTURES

    comparison = choose_pairs(inputs["acquire"], inputs["select"], store, measured_model.evaluate)
    extract = load_extractor("efficientnet_lite0")
    a, b = (extract(real_images(inputs, store, half)) for half in (comparison.described, comparison.reference))
    assert figures[FD].floor == pytest.approx(frechet_distance_of_features(a, b), rel=1e-3)
    judge = Colours()
    real = (
        judge.images(real_images(inputs, store, comparison.described))
        * judge.texts([pair.caption for pair in comparison.described])
    ).sum(dim=1)
    assert figures[CLIP].floor == pytest.approx(100 * float(real.mean()), rel=1e-4)
    images = [step for step in report.steps if step[2] == "images"]
    assert images[-1][:2] == (images[0][1],) * 2 == (2 + NUM_PICTURES + 2 * NUM_IMAGES + NUM_PROMPTS,) * 2
    assert [step[0] for step in images] == sorted(step[0] for step in images)
    assert store.listdir("evaluate.base/unfinished") == []


def test_pairs_are_real_images_above_pictures_of_their_captions(
    inputs: dict[str, Artifact], store: Store, measured_model: TextToImageModel, report: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(worker, "Measurer", Oracle)
    artifact = evaluate(inputs, store, measured_model, report)
    grid = np.asarray(Image.open(io.BytesIO(store.read_bytes(artifact.units[0].path("pairs.png")))))
    assert report.figures["pairs.png"] == store.read_bytes(artifact.units[0].path("pairs.png"))
    assert grid.shape == (4 * 18 - 2, 8 * 18 - 2, 3)
    comparison = choose_pairs(inputs["acquire"], inputs["select"], store, measured_model.evaluate)
    sides = described(store, artifact, "samples.json")["pairs"]
    for row, (side, pairs) in enumerate(zip(sides, (comparison.described, comparison.held_out), strict=True)):
        assert [one["prompt"] for one in side] == [pair.caption for pair in pairs[:8]]
        for column, real in enumerate(real_images(inputs, store, pairs[:8])):
            for line in (2 * row, 2 * row + 1):  # the oracle's pictures are the real images
                tile = grid[18 * line : 18 * line + 16, 18 * column : 18 * column + 16]
                np.testing.assert_array_equal(tile, real)


def test_an_oracle_is_at_the_floor_and_faithful(
    inputs: dict[str, Artifact], store: Store, measured_model: TextToImageModel, report: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(worker, "Measurer", Oracle)
    best = measured(store, evaluate(inputs, store, measured_model, report))
    for name in ("kernel_distance", "frechet_distance", "monge_distance", "precision", "recall"):
        figure = best[f"{name}/seen/{X}"]
        assert figure.value == pytest.approx(figure.floor, rel=1e-6)
    assert best[FD].closed == pytest.approx(1, abs=1e-6)
    assert best[KID].closed == pytest.approx(1, abs=1e-6)
    assert best[f"faithfulness/seen/{X}"].value > 5
    assert best[f"faithfulness/held_out/{X}"].value > 5
    assert abs(best[f"faithfulness/seen/{X}"].untrained or 0) < 5
    assert best[CLIP].value == pytest.approx(best[CLIP].floor, rel=1e-6)


def test_untrained_is_the_network_that_training_begins_from(
    inputs: dict[str, Artifact], store: Store, measured_model: TextToImageModel, report: Any, published: Any
) -> None:
    def begin(network: UNet2DCondition) -> None:
        network.load_state_dict(initial_unet(network.config, measured_model.train.seed).state_dict())

    at_first = inputs | {"train.base": published.unet(change=begin)}
    found = measured(store, evaluate(at_first, store, measured_model, report))
    for label in (KID, FD):
        assert found[label].value == found[label].untrained > (found[label].floor or 0)
        assert found[label].closed == 0
    for label in (f"faithfulness/seen/{JUDGE}", CLIP):
        assert found[label].value == found[label].untrained


def test_figures_repeat_and_do_not_depend_on_the_batch(
    inputs: dict[str, Artifact], store: Store, measured_model: TextToImageModel, report: Any
) -> None:
    first = evaluate(inputs, store, measured_model, report)
    content = store.read_bytes(first.units[0].path("metrics.json"))
    forget(store, first)
    again = evaluate(inputs, store, measured_model, report)
    assert store.read_bytes(again.units[0].path("metrics.json")) == content
    assert again.revision == first.revision
    forget(store, again)
    others = measured(store, evaluate(inputs, store, changed(measured_model, batch_size=7), report))
    before = [Figure.from_json(record) for record in json.loads(content)["figures"]]
    smooth = [figure for figure in before if figure.name not in {"precision", "recall"}]  # these are counts of few
    expected = metrics_of(smooth)
    assert metrics_of([others[figure.label] for figure in smooth]) == pytest.approx(expected, rel=0.02, abs=0.02)


def test_it_goes_on_where_it_was_killed(
    inputs: dict[str, Artifact], store: Store, measured_model: TextToImageModel, report: Any, monkeypatch: Any
) -> None:
    undisturbed = evaluate(inputs, store, measured_model, report)
    forget(store, undisturbed)
    done: list[str] = []
    lives = 4

    class Mortal(worker.Measurer):
        def measure(self, task: Any) -> Any:
            if len(done) == lives:
                raise KeyboardInterrupt
            done.append(str(replace(task, number=0)))
            return super().measure(task)

    monkeypatch.setattr(worker, "Measurer", Mortal)
    with pytest.raises(KeyboardInterrupt):
        evaluate(inputs, store, measured_model, report)
    lives = 1000
    resumed = evaluate(inputs, store, measured_model, report)
    assert len(set(done)) == len(done) > 4
    assert resumed.revision == undisturbed.revision
    assert store.listdir("evaluate.base/unfinished") == []


def test_what_is_asked_for_is_what_is_measured(
    inputs: dict[str, Artifact], store: Store, measured_model: TextToImageModel, report: Any
) -> None:
    plain = evaluate(inputs, store, changed(measured_model, judge=None, untrained=False), report)
    figures = measured(store, plain)
    names = ("kernel_distance", "frechet_distance", "monge_distance", "precision", "recall")
    labels = [f"{name}/seen/{X}" for name in names]
    assert list(figures) == [*labels, f"faithfulness/seen/{X}", f"faithfulness/held_out/{X}"]
    assert all(figure.untrained is None for figure in figures.values())
    assert "judge" not in plain.units[0].info
    assert plain.counts.total == 2 + NUM_IMAGES + NUM_PROMPTS


def test_fewer_images_than_asked_for_are_told_and_too_few_give_no_figures(
    inputs: dict[str, Artifact], store: Store, measured_model: TextToImageModel, report: Any, published: Any
) -> None:
    few = evaluate(inputs, store, changed(measured_model, images=1000, judge=None), report)
    count = few.units[0].info["images"]
    assert 20 < count < 36
    assert any(f"{count} pictures are measured, not 1,000" in note for note in report.notes)
    acquired = published.acquire((4,))
    tiny = inputs | {"acquire": acquired, "select": published.select(acquired, split=Split(held_out=0.0))}
    none = evaluate(tiny, store, changed(measured_model, judge=None), report)
    assert [entry.name for entry in none.units[0].files if entry.name in {"metrics.json", "pairs.png"}] == []
    assert any("too few images" in note for note in report.notes)


def test_the_key_holds_all_that_matters(measured_model: TextToImageModel, model: TextToImageModel) -> None:
    key = stage.identity(measured_model).content
    assert set(stage.identity(model).content) == {"text", "diffusion", "sampling"}
    assert stage.identity(changed(measured_model, batch_size=7)).content == key
    other_start = measured_model.model_copy(update={"train": measured_model.train.model_copy(update={"seed": 5})})
    for other in (
        changed(measured_model, seed=1), changed(measured_model, images=9), changed(measured_model, judge=None),
        changed(measured_model, untrained=False), other_start,
    ):  # fmt: skip
        assert stage.identity(other).content != key
    without = changed(other_start, untrained=False)
    assert stage.identity(without).content == stage.identity(changed(measured_model, untrained=False)).content


def test_features_that_scoring_kept_are_used_where_images_lie_as_pictures_do(
    inputs: dict[str, Artifact], store: Store, measured_model: TextToImageModel, report: Any
) -> None:
    """Scores whose features are not the images' own show which were taken."""
    for size_px, used in ((16, True), (32, False)):
        acquired = with_sizes(store, inputs["acquire"], size_px)
        scored = scores_of(store, acquired)
        plain = changed(measured_model, judge=None, untrained=False)
        artifact = evaluate(inputs | {"acquire": acquired, "score": scored}, store, plain, report)
        comparison = choose_pairs(acquired, inputs["select"], store, plain.evaluate)
        halves = [
            torch.from_numpy(load_features(scored, store, [(pair.shard, pair.key) for pair in half]))
            for half in (comparison.described, comparison.reference)
        ]
        floor = measured(store, artifact)[FD].floor
        assert (floor == pytest.approx(frechet_distance_of_features(*halves), rel=1e-4)) == used
        looked_at = 0 if used else 2 * NUM_IMAGES + NUM_PROMPTS
        assert report.steps[-1][:2] == (2 + NUM_IMAGES + NUM_PROMPTS + looked_at,) * 2


@pytest.fixture
def trained_judge(store: Store, tmp_path: Path) -> Artifact:
    """A CLIP of random weights, as `train.judge` publishes one."""
    from ldm.clip import build_clip, save_clip

    torch.manual_seed(0)
    config = {
        "embed_dim": 8,
        "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16},
        "text_cfg": {"layers": 1, "width": 16, "heads": 2, "context_length": 16},
    }
    save_clip(build_clip(config).state_dict(), config, tmp_path / "clip")
    files: dict[str, Any] = {f"clip/{path.name}": path for path in (tmp_path / "clip").iterdir()}
    with building(store, "train.judge", asked(), {}, {}, 1) as build:
        unit = publish_unit(store, "train.judge", build.unit_key({}), files, Counts(1, 1))
        return build.publish([unit])


def test_a_clip_of_the_recipe_is_the_judge(
    inputs: dict[str, Artifact],
    store: Store,
    measured_model: TextToImageModel,
    report: Any,
    trained_judge: Artifact,
) -> None:
    from ldm.clip import load_clip

    model = changed(measured_model, judge="judge", images=6, prompts=4)
    artifact = evaluate(inputs | {"train.judge": trained_judge}, store, model, report)
    clip = load_clip(fetch_folder(store, trained_judge.units[0], "clip"))
    comparison = choose_pairs(inputs["acquire"], inputs["select"], store, model.evaluate)
    images = clip.images(real_images(inputs, store, comparison.described))
    texts = clip.texts([pair.caption for pair in comparison.described])
    facts, score = described(store, artifact), measured(store, artifact)["clip_score/seen/judge"]
    assert score.floor == pytest.approx(100 * float((images * texts).sum(1).mean()), abs=1e-3)
    assert facts["judge"] == artifact.units[0].info["judge"] == clip.identity


def with_sizes(store: Store, acquired: Artifact, size_px: int) -> Artifact:
    """The same shards, whose ledgers say how large the stored images are."""
    with building(store, "acquire", asked({"size_px": size_px}), {}, {}, 1) as build:
        units = []
        for unit in acquired.units:
            ledger = pq.read_table(store.open(unit.only(".parquet")))
            for name in ("width", "height"):
                ledger = ledger.append_column(name, pa.array([size_px] * len(ledger), pa.int32()))
            sink = io.BytesIO()
            pq.write_table(ledger, sink)
            number = int(unit.info["shard"])
            tar = store.read_bytes(unit.only(".tar"))
            files: dict[str, Any] = {f"{number:05d}.tar": tar, f"{number:05d}.parquet": sink.getvalue()}
            key = build.unit_key({"shard": number, "size_px": size_px})
            units.append(publish_unit(store, "acquire", key, files, unit.counts, unit.info))
        return build.publish(units)


def scores_of(store: Store, acquired: Artifact) -> Artifact:
    """Scores with random features."""
    with building(store, "score", asked(), {"acquire": acquired}, {}, 1) as build:
        units = []
        for unit in acquired.units:
            ledger = pq.read_table(store.open(unit.only(".parquet")))
            kept = ledger.filter(pc.equal(ledger.column("outcome"), "kept")).select(["uid", "key"]).to_pydict()
            number = int(unit.info["shard"])
            features = np.random.default_rng(number).normal(size=(len(kept["uid"]), 1280)).astype(np.float16)
            files: dict[str, Any] = {
                "scores.parquet": scores_bytes(kept, [], {}),
                "features.npy": features_bytes(features),
            }
            counts = Counts(len(kept["uid"]), len(kept["uid"]))
            key = build.unit_key({"shard": number})
            units.append(publish_unit(store, "score", key, files, counts, {"shard": unit.info["shard"]}))
        return build.publish(units)


def forget(store: Store, artifact: Artifact) -> None:
    """As if it had never been made."""
    store.delete(f"{artifact.stage}/units")
    store.delete(f"{artifact.stage}/revisions")
    store.delete(f"{artifact.stage}/keys")
