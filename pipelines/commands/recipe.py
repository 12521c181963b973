"""`ldm recipe`: look at recipes, and copy them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.options import AllowPluginsOption, RecipeArgument, SetOption, examples

recipe_app = typer.Typer(help="Look at recipes: list, show, validate, schema, reference, copy.", no_args_is_help=True)


@recipe_app.command("list", epilog=examples("ldm recipe list"))
def list_recipes() -> None:
    """The recipes that come with the package."""
    from pipelines.recipe.file import load_recipe, shipped_recipes

    for name in shipped_recipes():
        print(f"{name:<16} {load_recipe(name).description}")  # noqa: T201


@recipe_app.command(
    "show", epilog=examples("ldm recipe show quickstart", "ldm recipe show mine.yaml --set acquire.shard_size=500")
)
def show(recipe: RecipeArgument, set_: SetOption = None, allow_plugins: AllowPluginsOption = False) -> None:
    """The recipe in full, defaults included."""
    import yaml

    from pipelines.recipe.file import load_recipe

    resolved = load_recipe(recipe, set_ or [], allow_plugins=allow_plugins).model_dump(mode="json")
    print(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), end="")  # noqa: T201


@recipe_app.command(
    "validate",
    epilog=examples("ldm recipe validate quickstart", "ldm recipe validate mine.yaml --set execution.ranks=4"),
)
def validate(recipe: RecipeArgument, set_: SetOption = None, allow_plugins: AllowPluginsOption = False) -> None:
    """Check all that the recipe alone can tell, the same on every machine.

    What is wrong on this machine, `ldm run RECIPE --dry-run` says.
    """
    from pipelines.recipe.file import checked_recipe
    from pipelines.workflow.graph import build_graph

    checked = checked_recipe(recipe, set_ or [], allow_plugins=allow_plugins)
    for note in checked.notes:
        print(f"note: {note}")  # noqa: T201
    print(f"{checked.recipe.name}: valid; nodes: {', '.join(build_graph(checked.recipe))}")  # noqa: T201


@recipe_app.command("schema", epilog=examples("ldm recipe schema > recipe.schema.json"))
def schema() -> None:
    """The JSON schema of recipes, with each key's meaning: for editors."""
    from pipelines.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))  # noqa: T201


@recipe_app.command("reference", epilog=examples("ldm recipe reference > docs/recipe.md"))
def reference_page() -> None:
    """A page on all keys of recipes: what each is, what it may be, its default. As Markdown."""
    from pipelines.recipe.reference import reference

    print(reference(), end="")  # noqa: T201


@recipe_app.command("copy", epilog=examples("ldm recipe copy quickstart mine.yaml"))
def copy(
    recipe: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe's name.")],
    to: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; an existing file is not overwritten.")],
) -> None:
    """Copy a shipped recipe to a file of your own, to change it."""
    from pipelines.recipe.errors import RecipeError
    from pipelines.recipe.file import recipe_text

    text = recipe_text(recipe).text
    target = to / f"{recipe}.yaml" if to.is_dir() else to
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{target} exists; give another name, or remove it first") from None
    except OSError as error:
        raise RecipeError(f"can't write {target}: {error}") from error
    print(target)  # noqa: T201
