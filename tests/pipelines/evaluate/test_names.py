"""Samplers and extractors by name in `evaluate`: what is known of pictures and features is of the same code and weights
alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from own_weights import own_extractor
from plugged import PLUGIN, no_plugins_left, plugin_at

from ldm.errors import FolderError
from pipelines.evaluate import stage
from pipelines.evaluate.parts import column_keys
from pipelines.evaluate.worker import Figures, MeasureJob, Measurer
from pipelines.recipe import EvaluateSpec, Execution, Sampling, TextToImageModel
from pipelines.recipe.plugins import use_plugins
from pipelines.recipe.registered import extractor_key


@pytest.fixture(autouse=True)
def _built_in_alone() -> Iterator[None]:
    with no_plugins_left():
        yield


def job_of(published: Any, model: TextToImageModel, extractor: str) -> MeasureJob:
    acquired = published.acquire()
    figures = Figures(acquired, published.select(acquired), extractor, None, extractor_key(extractor, "here"))
    (unet,), (autoencoder,) = published.unet().units, published.autoencoder().units
    return MeasureJob(published.store, unet, autoencoder, model, figures=figures)


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


WHO = {"text_encoder": "minilm", "extractor": "x", "extractor_sha256": "y"}


def test_pictures_of_another_text_of_the_samplers_plugin_are_others(
    published: Any, model: TextToImageModel, tmp_path: Path
) -> None:
    use_plugins([plugin_at(tmp_path)])
    own = model.model_copy(update={"sampling": model.sampling.model_copy(update={"sampler": "own_euler"})})
    job = job_of(published, own, "efficientnet_lite0")
    before = column_keys(job, WHO, 16)
    use_plugins([plugin_at(tmp_path, PLUGIN + "# changed\n")])
    assert changed(before, column_keys(job, WHO, 16)) == {"trained.pictures", "trained.features", "initial.features"}


def test_pictures_under_another_value_of_any_field_of_sampling_are_others(
    published: Any, model: TextToImageModel
) -> None:
    class LaterSampling(Sampling):
        """With a field that is added one day."""

        churn: float = 0.0

    job = job_of(published, model, "efficientnet_lite0")

    def keys_of(**changes: Any) -> Mapping[str, str]:
        sampling = LaterSampling(**model.sampling.model_dump() | changes)
        return column_keys(replace(job, model=model.model_copy(update={"sampling": sampling})), WHO, 16)

    before = column_keys(job, WHO, 16)
    assert keys_of() == before
    assert keys_of(prompts=("other",), seed=8) == before
    for change in ({"churn": 0.5}, {"steps": 7}, {"guidance_scale": 1.5}, {"sampler": "ddim"}):
        made = {"trained.pictures", "trained.features", "initial.features"}
        assert changed(before, keys_of(**change)) == made, change


def test_features_with_another_configuration_beside_the_same_weights_are_others(
    published: Any, model: TextToImageModel, tmp_path: Path
) -> None:
    """The extractor's own hash may be of its weights alone."""
    extractor = own_extractor("clip", tmp_path)
    job = job_of(published, model, extractor)
    before = column_keys(job, WHO, 16)
    (tmp_path / "clip" / "preprocessor_config.json").write_text("{}")
    assert job.figures is not None
    other = replace(job, figures=replace(job.figures, extractor_key=extractor_key(extractor, "here")))
    assert changed(before, column_keys(other, WHO, 16)) == {"trained.features", "initial.features", "real.features"}
    with pytest.raises(FolderError, match="is not what it was where the run began"):
        Measurer(job, "cpu", 1).identities()


@pytest.mark.usefixtures("in_process")
def test_figures_carry_the_name_of_ones_own_extractor(
    published: Any, model: TextToImageModel, report: Any, tmp_path: Path
) -> None:
    use_plugins([plugin_at(tmp_path)])
    acquired = published.acquire()
    spec = EvaluateSpec(images=4, prompts=4, extractor=own_extractor("clip", tmp_path), untrained=False)
    sampling = model.sampling.model_copy(update={"sampler": "own_euler"})
    own = model.model_copy(update={"sampling": sampling, "evaluate": spec})
    inputs = {
        "acquire": acquired,
        "select": published.select(acquired),
        "train.base": published.unet(),
        "train.autoencoder": published.autoencoder(),
    }
    found = stage.evaluate("base", own, inputs, published.store, report, Execution(device="cpu"))
    (unit,) = found.units
    facts = published.store.read_json(unit.path("metrics.json"))
    assert facts["extractor"].startswith("clip_")
    assert facts["extractor"] in str(facts["figures"])
    moved = (tmp_path / "clip").rename(tmp_path / "moved")
    elsewhere = spec.model_copy(update={"extractor": f"clip:{moved}"})
    again = stage.evaluate(
        "base", own.model_copy(update={"evaluate": elsewhere}), inputs, published.store, report, Execution(device="cpu")
    )
    assert again == found
