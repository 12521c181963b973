"""Whatever is given for whatever field, the message is a plain sentence with the key, the value and the rule."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pipelines.recipe import Recipe
from pipelines.recipe.file import load_recipe
from pipelines.recipe.mistakes import problems_of
from pipelines.recipe.problems import Problem, told

WRONG = (None, True, -1, 0, 2.5, 10**30, float("inf"), "", "abc", [], [1], ["abc", {}], {}, {"abc": 1}, {"kind": "x"})
FOREIGN = re.compile(
    "input should|valid (dictionary|tuple|integer|string)|discriminator|union|field required|extra inputs|instance of"
    "|\\btag\\b|ctx|error_|_type",
    re.IGNORECASE,
)


def whole(name: str) -> dict[str, Any]:
    """A recipe with every field written out."""
    return dict(load_recipe(name).model_dump(mode="json"))


RECIPES = {
    "quickstart": whole("quickstart"),
    "urls": whole("quickstart") | {"source": {"kind": "urls", "files": ["a.csv"]}},
    "folder": whole("quickstart") | {"source": {"kind": "folder", "path": "a", "captions": "metadata"}},
}


def keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value below."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from keys(entry, (*path, key))


def problems(data: dict[str, Any]) -> tuple[Problem, ...]:
    try:
        Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        return problems_of(error, data)
    return ()


def with_value(data: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(data)
    here = changed
    for part in path[:-1]:
        here = here[part]
    here[path[-1]] = value
    return changed


@pytest.mark.parametrize("name", RECIPES)
def test_wrong_values_are_told_in_plain_words_at_their_key(name: str) -> None:
    refused = 0
    for path in keys(RECIPES[name]):
        dotted = ".".join(map(str, path))
        for wrong in WRONG:
            data = with_value(RECIPES[name], path, wrong)
            for problem in problems(data):
                refused += 1
                assert problem.path.startswith(dotted) or problem.path == f"{dotted}.kind", (dotted, wrong, problem)
                assert re.match("must be |missing|unknown key ", problem.message), problem
                assert not FOREIGN.search(problem.message), problem
                assert len(problem.message) < 700, problem
    assert refused > 1000


@pytest.mark.parametrize("name", RECIPES)
def test_keys_that_are_left_out_or_misspelled_are_told_by_name(name: str) -> None:
    for path in keys(RECIPES[name]):
        *around, last = path
        if not isinstance(last, str) or around == ["models"]:
            continue
        data = copy.deepcopy(RECIPES[name])
        here: Any = data
        for part in around:
            here = here[part]
        here[f"{last}x"] = here.pop(last)
        found = {problem.path: problem.message for problem in problems(data)}
        dotted = ".".join(map(str, path))
        if last == "kind":
            assert found[dotted].startswith("missing; one of ")
        else:
            assert found[f"{dotted}x"] == f"unknown key '{last}x'; did you mean '{last}'?", found


def test_a_rule_is_told_by_its_name() -> None:
    data = with_value(RECIPES["quickstart"], ("select", "where", 1, "missing"), "never")
    (problem,) = problems(data)
    message = 'select.where.1.missing (not_safe): must be one of drop, keep, got "never"'
    assert told((problem,)) == message


def test_more_than_a_screen_of_problems_is_counted() -> None:
    lines = told([Problem(f"a.{number}", "is wrong") for number in range(30)], "mine.yaml").splitlines()
    assert lines[0] == "mine.yaml: 30 errors"
    assert lines[-1].strip() == "... and 18 more"
    assert len(lines) == 14


def test_values_are_shown_as_they_stand_in_a_recipe() -> None:
    (problem,) = problems(with_value(RECIPES["quickstart"], ("report",), yaml.safe_load("[yes, {a: Größe}]")))
    assert problem.message == 'must be true or false, got [true, {"a": "Größe"}]'
