"""Measuring on real Ray actors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from infra.storage import Store
from pipelines.dataset.figures import Figure, metrics_of
from pipelines.evaluate import stage
from pipelines.recipe import EvaluateSpec, Execution, TextToImageModel


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_two_workers_measure_what_one_does(published: Any, store: Store, model: TextToImageModel, report: Any) -> None:
    acquired = published.acquire((40, 40, 16))
    inputs = {
        "train.base": published.unet(),
        "train.autoencoder": published.autoencoder(),
        "acquire": acquired,
        "select": published.select(acquired),
    }
    asked = model.model_copy(update={"evaluate": EvaluateSpec(images=20, prompts=10, batch_size=4)})
    found = []
    for workers in (1, 2):
        execution = Execution(device="cpu", evaluate_workers=workers)
        (unit,) = stage.evaluate("base", asked, inputs, store, report, execution).units
        found.append(json.loads(store.read_bytes(unit.path("metrics.json"))))
        for folder in ("units", "revisions", "keys"):
            store.delete(f"evaluate.base/{folder}")
    one, two = (metrics_of([Figure.from_json(record) for record in facts.pop("figures")]) for facts in found)
    assert found[0] == found[1]
    assert two == pytest.approx(one, rel=0.02, abs=0.02)  # threads differ, and with them the rounding
