"""`execution.extractor` by name: what the cache decodes to is measured with weights of one's own, or of a plugin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from own_weights import own_extractor
from plugged import no_plugins_left, plugin_at

from infra.storage import Store
from pipelines.dataset.figures import figures_of
from pipelines.encode import stage
from pipelines.recipe import Execution, TextToImageModel
from pipelines.recipe.plugins import use_plugins

PLUGIN = """
from pipelines.plugins import register_extractor


class MeanColour:
    name, width, sha256 = "mean_colour_1x1", 3, ""

    def __call__(self, images):
        return images.float().mean(dim=(1, 2)).cpu()


register_extractor("mean_colour", lambda device: MeanColour())
"""


@pytest.fixture(autouse=True)
def _built_in_alone() -> Iterator[None]:
    with no_plugins_left():
        yield


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("kind", ["clip", "clip_of_transformers", "dinov2", "plugin"])
def test_what_the_cache_decodes_to_is_measured_with_ones_own_extractor(
    kind: str, published: Any, store: Store, model: TextToImageModel, report: Any, tmp_path: Path
) -> None:
    if kind == "plugin":
        use_plugins([plugin_at(tmp_path, PLUGIN)])
    name = "mean_colour" if kind == "plugin" else own_extractor(kind, tmp_path)
    acquired = published.acquire()
    inputs = {
        "acquire": acquired,
        "select": published.select(acquired),
        "train.autoencoder": published.autoencoder(),
    }
    encoded = stage.encode("base", model, inputs, store, report, Execution(device="cpu", extractor=name))
    (figure,) = [figure for figure in figures_of(encoded) if figure.name == "frechet_distance"]
    assert figure.extractor is not None
    assert figure.extractor.startswith(name.partition(":")[0])
    assert figure.value >= 0
