"""`ldm sample`: pictures from prompts, with a model folder or with what a recipe released."""

from __future__ import annotations

from pathlib import Path

from infra.storage import Store
from pipelines.artifacts import fetch_unit


class UsageError(Exception):
    """An argument can't be used; the message says which and what would do."""


def resolve_model(model: str) -> Path:
    """The local diffusers folder that MODEL means: a folder, or a recipe whose `release` is up to date.

    Raises `UsageError` if it is neither.
    """
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
