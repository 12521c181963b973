"""What MODEL means: a folder, a single-file checkpoint, a recipe's release, a registered model; and loading it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from infra.registry import location_of
from infra.storage import Store
from infra.tracking import TrackingSpec
from pipelines.artifacts import fetch_unit, file_sha256, find_unit
from pipelines.errors import UsageError
from pipelines.recipe import Recipe
from pipelines.results import Asked

if TYPE_CHECKING:
    import torch

    from ldm.diffusion import Prediction
    from ldm.generate import LatentDiffusion

REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>[^/@]+)")


CHECKPOINTS = (".safetensors", ".ckpt")
"""Ends of names of single-file checkpoints."""


def ignored(message: str) -> None:
    """For who has nobody to tell."""


def resolve_model(model: str, overrides: Sequence[str] = (), tell: Callable[[str], None] = ignored) -> Path:
    """The local diffusers folder or checkpoint file that MODEL means: a folder, a file, "models:/NAME@ALIAS", or a
    recipe: its release with `overrides`, or without any its newest one, whatever settings that had. `tell` is told
    which release it is.

    Raises `UsageError` if it is none of them, `infra.registry.RegistryError` if MLflow has no such model.
    """
    folder = Path(model)
    is_recipe = not (model.startswith("models:") or folder.is_dir() or _is_checkpoint(folder))
    if overrides and not is_recipe:
        raise UsageError(f"--set with {model}: leave it out, it is of recipes")
    if is_recipe:
        return _released(model, overrides, tell)
    if model.startswith("models:"):
        return _registered(model)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UsageError(f"{model} has no model_index.json: give a model folder as diffusers lays it out")
    return folder


def _is_checkpoint(path: Path) -> bool:
    return path.is_file() and path.suffix in CHECKPOINTS


def _released(model: str, overrides: Sequence[str], tell: Callable[[str], None]) -> Path:
    from pipelines.recipe.errors import RecipeError
    from pipelines.recipe.file import load_recipe
    from pipelines.workflow.graph import build_graph
    from pipelines.workflow.plan import plan
    from pipelines.workflow.records import newest_release

    try:
        recipe = load_recipe(model, overrides)
    except RecipeError as error:
        if overrides:
            raise
        raise UsageError(f"MODEL {model!r} is neither a folder nor a recipe: {error}") from error
    store = Store(recipe.store)
    if overrides:
        rows = plan(build_graph(recipe), store, recipe.name)
        released = next((row.artifact for row in rows if row.node == "release"), None)
    else:
        released = newest_release(store, recipe.name)
    if released is None:
        which = f"recipe {model!r} with these settings" if overrides else f"recipe {model!r}"
        command = Asked(model, tuple(overrides)).command("run")
        raise UsageError(f"{which} has released no model yet in {store.url}; `{command}` makes one")
    finished = str(released.manifest["finished_at"]).replace("T", " ").replace("Z", " UTC")
    tell(f"model: release {released.revision[:12]} of {recipe.name}, made {finished}")
    return fetch_unit(store, released.units[0])


def _registered(model: str) -> Path:
    """What MLflow's registry leads to: that of MLFLOW_TRACKING_URI, or of the default state folder."""
    asked = REGISTERED.fullmatch(model)
    if asked is None:
        raise UsageError(f"MODEL {model!r} must be models:/NAME@ALIAS, such as models:/quickstart@champion")
    state_dir = Path(Recipe.model_fields["state_dir"].default)
    spec = TrackingSpec(os.environ.get("MLFLOW_TRACKING_URI"), asked["name"], state_dir)
    if spec.uri is None and not (state_dir / "mlflow.db").is_file():
        raise UsageError(f"no registry for {model}: there is no {state_dir}/mlflow.db here; set MLFLOW_TRACKING_URI")
    location = location_of(spec.resolved_uri, asked["name"], asked["alias"])
    url, _, key = location.rpartition("/release/units/")
    store = Store(url)
    unit = find_unit(store, "release", key) if url else None
    if unit is None:
        raise UsageError(f"{model} leads to {location}, where no model is; `ldm run` makes it again")
    return fetch_unit(store, unit)


def load(
    path: Path, dtype: torch.dtype, *, prediction: Prediction | None, variant: str | None, allow_pickle: bool
) -> LatentDiffusion:
    """The model of a folder or a single file. `prediction` is of a file: it can't be told from the weights. `variant`
    is of a folder.

    Raises `ldm.errors.LdmError` if it can't be read, `UsageError` for a prediction that the folder itself says.
    """
    from ldm.interchange import load_model, load_single_file

    if path.is_dir():
        if prediction is not None:
            raise UsageError(f"--prediction {prediction} with a folder: leave it out, the folder says it")
        return load_model(path, dtype, variant=variant, allow_pickle=allow_pickle)
    return load_single_file(path, dtype=dtype, prediction=prediction, allow_pickle=allow_pickle)


def hash_of(path: Path) -> str:
    """sha256 of a model's files, hex."""
    from ldm.interchange import model_hash

    return model_hash(path) if path.is_dir() else file_sha256(path)
