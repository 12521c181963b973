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
from pipelines.recipe.model_checks import CHECKS
from pipelines.recipe.problems import Findings, told
from pipelines.recipe.references import reference_problems
from pipelines.recipe.registered import name_problems

LEAST_FLOAT, GREATEST_FLOAT = 1.1754944e-38, 3.4028234e38
"""Least and greatest of float32's normal numbers."""


def check_recipe(recipe: Recipe) -> list[str]:
    """Notes on what is worth a look, though it can be run.

    Raises `InvalidRecipe` with all problems that were found, if there are any.
    """
    findings = Findings([*reference_problems(recipe), *name_problems(recipe)])
    _check_texts(recipe, findings)
    _check_numbers(recipe, findings)
    check_data(recipe, findings)
    for name, model in recipe.models.items():
        CHECKS[model.kind](recipe, name, model, findings)
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


def _check_numbers(recipe: Recipe, findings: Findings) -> None:
    """Numbers of models are computed with in float32, where what it can't hold becomes 0 or infinite."""
    for path, number in _numbers(recipe.model_dump(mode="json")["models"], "models"):
        if number and not LEAST_FLOAT <= abs(number) <= GREATEST_FLOAT:
            findings.refuse(
                path,
                f"{number:g} can't be computed with: training knows numbers from {LEAST_FLOAT:.1e} to"
                f" {GREATEST_FLOAT:.1e}; give one in between",
            )


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """All fractions, by dotted path."""
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(entry, f"{path}.{key}")


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(entry, f"{path}.{key}" if path else str(key))
