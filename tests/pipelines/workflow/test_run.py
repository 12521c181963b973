"""A run that planned without a cluster never starts one by the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.storage import Store
from pipelines.artifacts import ArtifactError
from pipelines.recipe.file import load_recipe
from pipelines.workflow.graph import build_graph
from pipelines.workflow.run import Prepared, _Runner


def test_what_was_up_to_date_and_is_to_do_now_is_told(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart")
    prepared = Prepared(recipe, build_graph(recipe), Store(tmp_path), [], {})
    nothing: Any = None
    runner = _Runner(prepared, nothing, nothing, nothing, nothing, nothing, on_cluster=False)
    with pytest.raises(ArtifactError, match=r"acquire was up to date .* run the same command again"):
        runner._run(prepared.nodes["acquire"], {})
