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


def recipe_text(name_or_path: str) -> tuple[str, str]:
    """(label for messages, text) of a shipped recipe's name or of a file. Raises `RecipeError` if there is neither."""
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} or os.path.isfile(name_or_path):  # noqa: PTH113 - never raises, as a Path may
        try:
            return str(path), path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(f"no file {name_or_path!r}; give the path of a recipe or one of {_names()}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{name_or_path}: can't be read as text: {error}") from error
    shipped = shipped_recipes()
    if name_or_path not in shipped:
        near = difflib.get_close_matches(name_or_path, shipped, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"no recipe {name_or_path!r}: give the path of a YAML file or one of {_names()}{hint}")
    return f"{name_or_path} (shipped)", shipped[name_or_path]


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and override a recipe, as far as its graph needs it: `checked_recipe` says more.

    `overrides` are `dotted.path=value`, the value in YAML.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown, duplicate or mistyped key, a value out of its range, a name
            that stands for nothing.
    """
    return _loaded(name_or_path, overrides)[0]


def checked_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> CheckedRecipe:
    """`load_recipe`, and everything that the recipe alone shows to be wrong; see `checks`.

    Raises `RecipeError` as `load_recipe` does, and with all problems of `check_recipe`.
    """
    from pipelines.recipe.checks import check_recipe

    recipe, document = _loaded(name_or_path, overrides)
    try:
        return CheckedRecipe(recipe, check_recipe(recipe))
    except InvalidRecipe as error:
        raise _placed(error.problems, document) from None


def _loaded(name_or_path: str, overrides: Sequence[str]) -> tuple[Recipe, Document]:
    label, text = recipe_text(name_or_path)
    document = read_document(label, text, overrides)
    try:
        # Strict mode takes lists for tuples and integers for floats in JSON alone.
        recipe = Recipe.model_validate_json(json.dumps(document.data))
    except ValidationError as error:
        raise _placed(problems_of(error, document.data), document) from None
    problems = tuple(reference_problems(recipe))
    if problems:
        raise _placed(problems, document)
    return recipe, document


def _placed(problems: tuple[Problem, ...], document: Document) -> InvalidRecipe:
    return InvalidRecipe(told(problems, document.label, document.places), problems)


def _names() -> str:
    return ", ".join(shipped_recipes())
