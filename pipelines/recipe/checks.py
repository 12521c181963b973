"""The first circle of checks: everything that the recipe alone shows to be wrong.

The answer is the same on every machine: no file is looked at but the package's own, no package that is optional, no
network, no device. What is true here and now is the second circle, `pipelines.workflow.here`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.recipe import Recipe
from pipelines.recipe.data_checks import check_data
from pipelines.recipe.errors import InvalidRecipe
from pipelines.recipe.execution_checks import check_execution
from pipelines.recipe.model_checks import check_models
from pipelines.recipe.problems import Findings, told
from pipelines.recipe.references import reference_problems


def check_recipe(recipe: Recipe) -> list[str]:
    """Notes on what is worth a look, though it can be run.

    Raises `InvalidRecipe` with all problems that were found, if there are any.
    """
    findings = Findings(list(reference_problems(recipe)))
    _check_texts(recipe, findings)
    check_data(recipe, findings)
    check_models(recipe, findings)
    check_execution(recipe, findings)
    problems = tuple(dict.fromkeys(findings.problems))
    if problems:
        raise InvalidRecipe(told(problems, f"recipe {recipe.name}"), problems)
    return findings.notes


def _check_texts(recipe: Recipe, findings: Findings) -> None:
    """No text has a null character: no path, URL, header or database takes one."""
    for path, text in _texts(recipe.model_dump(mode="json"), ""):
        if "\0" in text:
            findings.refuse(path, f"{text!r} has a null character; leave it out")


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(entry, f"{path}.{key}" if path else str(key))
