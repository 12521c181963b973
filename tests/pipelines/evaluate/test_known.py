"""What earlier evaluations know is not made again: pictures made and images looked at are counted."""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from infra.storage import Store
from pipelines.again import ask_again
from pipelines.artifacts import Artifact, artifact_key
from pipelines.dataset.earlier import inputs_of
from pipelines.dataset.figures import figures_of
from pipelines.evaluate import stage, worker
from pipelines.evaluate.known import Known, unpacked
from pipelines.evaluate.pairs import choose_pairs
from pipelines.recipe import EvaluateSpec, Execution, TextToImageModel

pytestmark = pytest.mark.usefixtures("in_process")
NUM_IMAGES, NUM_PROMPTS, NUM_SAMPLES = 12, 10, 4


class Averages:
    """Stands for an extractor: an image's features are the averages of its sixteen parts."""

    name, width, sha256 = "averages_4px", 48, "0" * 64

    def __call__(self, images_BHWC: Tensor) -> Tensor:
        parts = torch.nn.functional.adaptive_avg_pool2d(images_BHWC.permute(0, 3, 1, 2).float() / 255, 4)
        return parts.flatten(1)


class Colours:
    """Stands for a judge: an image is its colours, and a text its length."""

    identity = "colours@1"

    def images(self, images_BHWC: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images_BHWC.float().mean(dim=(1, 2)) + 1, dim=1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.nn.functional.normalize(torch.tensor([[len(text), 1.0, 2.0] for text in texts]), dim=1)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Pictures made by "trained" and "initial", and "real" images looked at, since it was last cleared."""
    counted: Counter[str] = Counter()

    class Counting(worker.Measurer):
        def measure(self, task: worker.Task) -> Any:
            if isinstance(task, worker.PicturesTask):
                counted[task.network] += len(task.shots)
            elif isinstance(task, worker.ImagesTask):
                counted["real"] += len(task.rows)
            return super().measure(task)

    monkeypatch.setattr(worker, "Measurer", Counting)
    monkeypatch.setattr(worker, "load_extractor", lambda name, device: Averages())
    monkeypatch.setitem(sys.modules, "ldm.clip", types.SimpleNamespace(load_clip=lambda source, device: Colours()))
    return counted


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
    spec = EvaluateSpec(images=NUM_IMAGES, prompts=NUM_PROMPTS, derangements=5, batch_size=5)
    return model.model_copy(update={"evaluate": spec, "sampling": model.sampling.model_copy(update={"steps": 1})})


def changed(model: TextToImageModel, **settings: Any) -> TextToImageModel:
    assert model.evaluate is not None
    return model.model_copy(update={"evaluate": model.evaluate.model_copy(update=settings)})


def evaluate(inputs: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any) -> Artifact:
    return stage.evaluate("base", model, inputs, store, report, Execution(device="cpu"))


ALL = {"trained": NUM_SAMPLES + NUM_IMAGES + NUM_PROMPTS, "initial": NUM_IMAGES, "real": 2 * NUM_IMAGES + NUM_PROMPTS}


def test_other_questions_about_the_same_pictures_make_none(
    inputs: dict[str, Artifact], store: Store, measured_model: TextToImageModel, report: Any, made: Counter[str]
) -> None:
    first = evaluate(inputs, store, measured_model, report)
    assert made == ALL
    made.clear()
    for other in (changed(measured_model, derangements=7), changed(measured_model, prompts=4, batch_size=3)):
        again = evaluate(inputs, store, other, report)
        assert again.key != first.key
        assert made == {}
        assert report.notes[-1] == (
            f"evaluate.base: {again.counts.total + 2 * NUM_IMAGES + other.evaluate.prompts:,} of"
            f" {again.counts.total + 2 * NUM_IMAGES + other.evaluate.prompts:,} pictures and images are known from an"
            " earlier one"
        )
        assert {name: value for name, value in again.info.items() if "averages" in name} == {
            name: value for name, value in first.info.items() if "averages" in name
        }
        assert hash_of(again, "grid.png") == hash_of(first, "grid.png")
        same_pairs = hash_of(again, "pairs.png") == hash_of(first, "pairs.png")
        assert same_pairs == (other.evaluate.prompts == NUM_PROMPTS)
    more = evaluate(inputs, store, changed(measured_model, images=15), report)
    assert more.info["images"] == 15
    assert 0 < made["trained"] <= 15
    assert made["trained"] < ALL["trained"] - NUM_SAMPLES - NUM_PROMPTS + 3


def hash_of(artifact: Artifact, name: str) -> str:
    return next(entry.sha256 for entry in artifact.units[0].files if entry.name == name)


def test_of_a_model_trained_longer_its_own_pictures_alone_are_made(
    inputs: dict[str, Artifact],
    store: Store,
    measured_model: TextToImageModel,
    report: Any,
    made: Counter[str],
    published: Any,
) -> None:
    evaluate(inputs, store, measured_model, report)
    made.clear()
    evaluate(inputs | {"train.base": published.unet(seed=1)}, store, measured_model, report)
    assert made == {"trained": ALL["trained"]}
    made.clear()
    sampling = measured_model.sampling.model_copy(update={"guidance_scale": 1.5})
    evaluate(inputs, store, measured_model.model_copy(update={"sampling": sampling}), report)
    assert made == {"trained": ALL["trained"], "initial": ALL["initial"]}


def test_a_judge_looks_at_pictures_anew_and_features_stay(
    inputs: dict[str, Artifact], store: Store, measured_model: TextToImageModel, report: Any, made: Counter[str]
) -> None:
    without = evaluate(inputs, store, measured_model, report)
    made.clear()
    judged = evaluate(inputs, store, changed(measured_model, judge="hub:colours"), report)
    assert made == {
        "trained": NUM_IMAGES + NUM_PROMPTS,
        "initial": NUM_IMAGES,
        "real": NUM_IMAGES,
    }
    assert f"{3 * NUM_IMAGES + NUM_PROMPTS} pictures and images whose features are known" in report.notes[-1]
    label = "frechet_distance/seen/averages_4px"
    before, after = ({figure.label: figure for figure in figures_of(one)} for one in (without, judged))
    assert after[label] == before[label]
    assert "clip_score/seen/hub:colours" in after.keys() - before.keys()
    made.clear()
    store.delete(f"evaluate.base/units/{without.units[0].key}")
    evaluate(inputs, store, changed(measured_model, derangements=7), report)  # and a judge's view is no hindrance
    assert made == {}


def test_what_a_killed_evaluation_made_serves_another_question(
    inputs: dict[str, Artifact],
    store: Store,
    measured_model: TextToImageModel,
    report: Any,
    made: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Mortal(worker.Measurer):
        def measure(self, task: worker.Task) -> Any:
            if task.number == 3:
                raise KeyboardInterrupt
            return super().measure(task)

    with monkeypatch.context() as context:
        context.setattr(worker, "Measurer", Mortal)
        with pytest.raises(KeyboardInterrupt):
            evaluate(inputs, store, measured_model, report)
    assert 0 < made["trained"] < ALL["trained"]
    evaluate(inputs, store, changed(measured_model, derangements=7), report)
    assert made == ALL


def test_force_takes_nothing_over(
    inputs: dict[str, Artifact], store: Store, measured_model: TextToImageModel, report: Any, made: Counter[str]
) -> None:
    first = evaluate(inputs, store, measured_model, report)
    made.clear()
    key = artifact_key("evaluate.base", stage.FORMAT_VERSION, stage.identity(measured_model).content, inputs)
    ask_again(store, "evaluate.base", key, "force")
    again = evaluate(inputs, store, measured_model, report)
    assert made == ALL
    assert again.revision == first.revision


def test_a_damaged_file_is_not_taken_over(
    inputs: dict[str, Artifact], store: Store, measured_model: TextToImageModel, report: Any, made: Counter[str]
) -> None:
    (unit,) = evaluate(inputs, store, measured_model, report).units
    made.clear()
    path = store.fetch(unit.path("features.npz"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    evaluate(inputs, store, changed(measured_model, derangements=7), report)
    assert made == ALL


def test_the_pictures_of_the_prompts_are_known_to_an_evaluation_with_figures(
    inputs: dict[str, Artifact], store: Store, measured_model: TextToImageModel, report: Any, made: Counter[str]
) -> None:
    grid = evaluate(inputs, store, measured_model.model_copy(update={"evaluate": None}), report)
    assert made == {"trained": NUM_SAMPLES}
    with_figures = evaluate(inputs, store, measured_model, report)
    assert made == ALL
    assert hash_of(with_figures, "grid.png") == hash_of(grid, "grid.png")


def test_features_are_published_with_whose_they_are(
    inputs: dict[str, Artifact], store: Store, measured_model: TextToImageModel, report: Any, made: Counter[str]
) -> None:
    (unit,) = evaluate(inputs, store, measured_model, report).units
    assert set(unit.info["columns"]) == {"trained.pictures", "trained.features", "initial.features", "real.features"}
    data = store.read_bytes(unit.path("features.npz"))
    columns = unpacked(data)
    assert set(columns) == set(unit.info["columns"])
    shapes = {name: values.shape for name, (_, values) in columns.items()}
    assert shapes == {
        "trained.features": (NUM_IMAGES + NUM_PROMPTS, 48),
        "initial.features": (NUM_IMAGES, 48),
        "real.features": (2 * NUM_IMAGES + NUM_PROMPTS, 48),
        "trained.pictures": (16, 16, 16, 3),
    }
    comparison = choose_pairs(inputs["acquire"], inputs["select"], store, measured_model.evaluate)
    with np.load(store.open(unit.path("features.npz")), allow_pickle=False) as file:
        assert file["seen.uid"].tolist() == [pair.uid for pair in comparison.described]
        assert file["unseen.uid"].tolist() == [pair.uid for pair in comparison.held_out]
        assert len(file["seen.seed"]) == NUM_IMAGES


def test_a_result_that_was_cut_short_is_made_again(store: Store) -> None:
    rows = inputs_of(["a", "b"])
    known = Known(store, "work")
    known.add({"column": np.arange(6.0).reshape(2, 3)}, rows)
    (name,) = store.listdir("work")
    again = Known(store, "work")
    np.testing.assert_array_equal(again.values("column", rows[::-1]), [[3, 4, 5], [0, 1, 2]])
    data = store.read_bytes(f"work/{name}")
    for spoiled in (data[:-30], b"", data[: len(data) // 2] + b"\xff" + data[len(data) // 2 + 1 :]):
        store.publish_bytes(f"work/{name}", spoiled)
        assert not Known(store, "work").has("column", rows[0])
