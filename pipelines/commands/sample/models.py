"""What MODEL means: a folder, a single-file checkpoint, a recipe's release, a registered model; and loading it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.registry import location_of
from infra.storage import Store
from infra.tracking import TrackingSpec
from pipelines.artifacts import Artifact, ArtifactError, fetch_unit, find_unit
from pipelines.artifacts import load as load_artifact
from pipelines.errors import UsageError
from pipelines.recipe import Recipe
from pipelines.recipe.registered import hashes_of
from pipelines.results import Asked

REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>[^/@]+)")


CHECKPOINTS = (".safetensors", ".ckpt")
"""Ends of names of single-file checkpoints."""


@dataclass(frozen=True)
class RecipeSampling:
    """How a recipe has a model of its own sample, in `evaluate` and in previews: its block `sampling`."""

    sampler: str
    steps: int
    guidance_scale: float
    plugin_sha256: str | None = None
    """Of the plugin that the sampler was of."""


@dataclass(frozen=True)
class Found:
    """What a MODEL means."""

    path: Path
    """A local folder as diffusers lays it out, or a single-file checkpoint."""
    sampling: RecipeSampling | None = None
    """The recipe's `sampling`. None: no recipe released the model."""


def ignored(message: str) -> None:
    """The `tell` of who has nobody to tell."""


def find_model(
    model: str, overrides: Sequence[str] = (), tell: Callable[[str], None] = ignored, allow_plugins: bool = False
) -> Found:
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
        return _released(model, overrides, tell, allow_plugins)
    if model.startswith("models:"):
        return _registered(model)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UsageError(f"{model} has no model_index.json: give a model folder as diffusers lays it out")
    return Found(folder)


def _is_checkpoint(path: Path) -> bool:
    return path.is_file() and path.suffix in CHECKPOINTS


def _released(model: str, overrides: Sequence[str], tell: Callable[[str], None], allow_plugins: bool) -> Found:
    from pipelines.recipe.errors import RecipeError
    from pipelines.recipe.file import load_recipe
    from pipelines.workflow.graph import build_graph
    from pipelines.workflow.plan import plan
    from pipelines.workflow.records import newest_release

    try:
        recipe = load_recipe(model, overrides, allow_plugins=allow_plugins)
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
    return Found(fetch_unit(store, released.units[0]), _sampling_of(released))


def _sampling_of(released: Artifact) -> RecipeSampling | None:
    """As the release's own evaluation sampled, whatever the recipe says by now; None if its manifest is gone."""
    name = f"evaluate.{released.settings['model']}"
    try:
        evaluated = load_artifact(released.store, name, released.manifest["inputs"][name])
    except ArtifactError:
        return None
    block = evaluated.settings["sampling"]
    sampler = block["sampler"]  # of a plugin: its name and the plugin's hash
    hashes = hashes_of(sampler)
    return RecipeSampling(
        sampler["name"] if hashes else sampler,
        block["steps"],
        block["guidance_scale"],
        hashes.get("plugin_sha256"),
    )


def _registered(model: str) -> Found:
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
    released = _release_with(store, key)
    return Found(fetch_unit(store, unit), None if released is None else _sampling_of(released))


def _release_with(store: Store, unit_key: str) -> Artifact | None:
    """The release whose unit it is; None if its manifest is gone."""
    for revision in store.listdir("release/revisions"):
        try:
            released = load_artifact(store, "release", revision)
            if any(unit.key == unit_key for unit in released.units):
                return released
        except ArtifactError:
            continue
    return None
