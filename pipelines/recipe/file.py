"""Recipes by name or file: read, overridden, and checked, with the line of everything that is wrong.

The recipe's own rules are in its blocks and in `checks`; here is where they meet a person's file.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from pipelines.recipe import Recipe
from pipelines.recipe.document import Document, read_document
from pipelines.recipe.errors import InvalidRecipe, RecipeError
from pipelines.recipe.mistakes import problems_of
from pipelines.recipe.plugins import read_plugins, use_plugins
from pipelines.recipe.problems import Problem, told
from pipelines.recipe.references import reference_problems


class CheckedRecipe(NamedTuple):
    """A recipe in which nothing is wrong, and what is worth a person's look all the same."""

    recipe: Recipe
    notes: list[str]


def shipped_recipes() -> dict[str, str]:
    """Text of each recipe that comes with the package, by name."""
    folder = resources.files("configs")
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in files}


DEVICES = ("/dev/", "/proc/")


class RecipeText(NamedTuple):
    """A recipe as it was found: `label` is for messages, `folder` what its paths of plugins are seen from."""

    label: str
    text: str
    folder: Path
    is_local: bool
    """Whether it is a local file, or comes with the package: not what a pipe or a device brings."""


def recipe_text(name_or_path: str) -> RecipeText:
    """The text of a shipped recipe's name or of a file. Raises `RecipeError` if there is neither."""
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} or _is_readable(name_or_path):
        try:
            # What a shell redirects to a device may be a file, and is still none that the command names.
            is_local = path.is_file() and not os.path.abspath(path).startswith(DEVICES)  # noqa: PTH100
            folder = path.resolve().parent if is_local else Path.cwd()
            return RecipeText(str(path), path.read_text(encoding="utf-8"), folder, is_local)
        except FileNotFoundError:
            raise RecipeError(f"no file {name_or_path!r}; give the path of a recipe or one of {_names()}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{name_or_path}: can't be read as text: {error}") from error
    shipped = shipped_recipes()
    if name_or_path not in shipped:
        near = difflib.get_close_matches(name_or_path, shipped, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"no recipe {name_or_path!r}: give the path of a YAML file or one of {_names()}{hint}")
    return RecipeText(f"{name_or_path} (shipped)", shipped[name_or_path], Path.cwd(), True)


def _is_readable(path: str) -> bool:
    """A file, or something else that can be read, such as /dev/stdin. Never raises, as a `Path` may."""
    return os.path.exists(path) and not os.path.isdir(path)  # noqa: PTH110, PTH112


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), *, allow_plugins: bool = False) -> Recipe:
    """Read and override a recipe, as far as its graph needs it: `checked_recipe` says more. Its plugins are run, and
    no others' names are known any longer; their paths are then whole.

    `overrides` are `dotted.path=value`, the value in YAML. `allow_plugins`: of a recipe that is no local file too.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown, duplicate or mistyped key, a value out of its range, a name
            that stands for nothing, plugins that may not be run.
        PluginError: a plugin can't be run.
    """
    return _loaded(name_or_path, overrides, allow_plugins)[0]


def checked_recipe(name_or_path: str, overrides: Sequence[str] = (), *, allow_plugins: bool = False) -> CheckedRecipe:
    """`load_recipe`, and everything that the recipe alone shows to be wrong; see `checks`.

    Raises `RecipeError` as `load_recipe` does, and with all problems of `check_recipe`.
    """
    from pipelines.recipe.checks import check_recipe

    recipe, document = _loaded(name_or_path, overrides, allow_plugins)
    try:
        return CheckedRecipe(recipe, check_recipe(recipe))
    except InvalidRecipe as error:
        raise _placed(error.problems, document) from None


def _loaded(name_or_path: str, overrides: Sequence[str], allow_plugins: bool) -> tuple[Recipe, Document]:
    found = recipe_text(name_or_path)
    document = read_document(found.label, found.text, overrides)
    try:
        # Strict mode takes lists for tuples and integers for floats in JSON alone.
        recipe = Recipe.model_validate_json(json.dumps(document.data))
    except ValidationError as error:
        raise _placed(problems_of(error, document.data), document) from None
    problems = tuple(reference_problems(recipe))
    if problems:
        raise _placed(problems, document)
    return _with_plugins(recipe, document, found, allow_plugins), document


def _with_plugins(recipe: Recipe, document: Document, found: RecipeText, allow_plugins: bool) -> Recipe:
    """The recipe with the whole paths of its plugins, which are loaded."""
    if recipe.plugins and not (found.is_local or allow_plugins):
        files = ", ".join(recipe.plugins)
        why = f"{files}: plugins are code that runs as you, and this recipe is no local file"
        problem = Problem("plugins", f"{why}; read them, and give --allow-plugins if you trust them")
        raise _placed((problem,), document)
    plugins, problems = read_plugins(recipe.plugins, found.folder)
    if problems:
        raise _placed(tuple(problems), document)
    use_plugins(plugins)
    return recipe.model_copy(update={"plugins": tuple(plugin.path for plugin in plugins)})


def _placed(problems: tuple[Problem, ...], document: Document) -> InvalidRecipe:
    return InvalidRecipe(told(problems, document.label, document.places), problems)


def _names() -> str:
    return ", ".join(shipped_recipes())
