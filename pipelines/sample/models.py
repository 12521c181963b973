"""`ldm sample`: pictures from prompts, with a model folder, with what a recipe released, or with a registered model."""

from __future__ import annotations

import os
import re
from pathlib import Path

from infra.registry import location_of
from infra.storage import Store
from infra.tracking import TrackingSpec
from pipelines.artifacts import fetch_unit, find_unit
from pipelines.recipe import Recipe

REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>[^/@]+)")


class UsageError(Exception):
    """An argument can't be used; the message says which and what would do."""


def resolve_model(model: str) -> Path:
    """The local diffusers folder that MODEL means: a folder, a recipe with an up-to-date release, "models:/NAME@ALIAS".

    Raises `UsageError` if it is none of them, `infra.registry.RegistryError` if MLflow has no such model.
    """
    if model.startswith("models:"):
        return _registered(model)
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UsageError(f"{model} has no model_index.json: give a model folder as diffusers lays it out")
        return folder
    from pipelines.graph import build_graph
    from pipelines.plan import plan
    from pipelines.recipe_file import RecipeError, load_recipe

    try:
        recipe = load_recipe(model)
    except RecipeError as error:
        raise UsageError(f"MODEL {model!r} is neither a folder nor a recipe: {error}") from error
    store = Store(recipe.store)
    artifacts = {row.node: row.artifact for row in plan(build_graph(recipe), store, recipe.name)}
    released = artifacts.get("release")
    if released is None:
        raise UsageError(f"recipe {model!r} has released no model yet; `ldm run {model}` makes one")
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


def sample(
    model: str,
    prompts: list[str],
    *,
    out: Path,
    grid: Path | None,
    seed: int,
    guidance_scale: float,
    sampler: str,
    steps: int,
    batch_size: int,
) -> list[Path]:
    """Write one PNG a prompt into `out`, and `grid` if given; the paths written.

    The first picture's seed is `seed`, the next ones count up.
    """
    from ldm.generate import text_to_image
    from ldm.images import image_grid, save_png
    from ldm.interchange import load_model, model_hash

    folder = resolve_model(model)
    loaded = load_model(folder)
    seeds = [seed + index for index in range(len(prompts))]
    images = text_to_image(
        loaded,
        prompts,
        seeds=seeds,
        guidance_scale=guidance_scale,
        sampler=sampler,
        steps=steps,
        batch_size=batch_size,
    )
    facts = {"sampler": sampler, "steps": steps, "guidance_scale": guidance_scale, "model": model_hash(folder)}
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        path = out / f"{index:05d}.png"
        save_png(image, path, facts | {"prompt": prompt, "seed": seeds[index]})
        written.append(path)
    if grid is not None:
        grid.parent.mkdir(parents=True, exist_ok=True)
        save_png(image_grid(images, columns=min(8, len(prompts))), grid, facts)
        written.append(grid)
    return written
