"""A recipe's text: strange YAML is one message with its line, never a traceback, and never much work."""

from __future__ import annotations

import pytest

from pipelines.recipe.document import read_document
from pipelines.recipe.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!binary aGVsbG8=", "line 1: tag !!binary is of no use in a recipe; leave it out"),
        ("a: 1\nb: !!set {x, y}", "line 2: tag !!set"),
        ("a: !!timestamp 2026-01-01", "line 1: tag !!timestamp"),
        (
            "a: !!python/object:os.system x",
            "tag !!python/object:os.system is of no use|could not determine a constructor",
        ),
        ("a: !!int abc", "not valid YAML: a value is not of the kind that its tag says"),
        ("a: !!float abc", "not valid YAML: a value is not of the kind"),
        ("a: !!map [b]", "not valid YAML: a value is not of the kind"),
        ("a: !!bool abc", "not valid YAML: a value is not of the kind"),
        ("a: &a [*a]", "line 1: a block within itself"),
        ("a: &a {b: *a}", "line 1: a block within itself"),
        ("a: [" + "[" * 100 + "]" * 100 + "]", "more than 64 deep"),
        ("a: " + "[" * 5000, "nested more than 64 deep|not valid YAML"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested more than 64 deep"),
        ('a: "\\ud800"', "halves of characters"),
        ("a: " + "9" * 5000, "a number of 5,000 digits"),
        ("a: 1\n? [b]\n: 2", "line 2: a key must be a word"),
        ("a: 1\n<<: {b: 2}\n<<: {c: 2}", "line 3: duplicate key '<<'"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: \0", "not valid YAML"),
        ("\t- a", "not valid YAML"),
    ],
)
def test_strange_yaml_is_one_message(text: str, message: str) -> None:
    for given in ((text, []), ("a: 1", [f"x={text}"])):
        if given[1] and "\n" in text:
            continue
        with pytest.raises(RecipeError, match=message.replace("line 2", "line [12]")):
            read_document("mine.yaml", *given)


def test_aliases_that_grow_without_bound_are_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(RecipeError, match="write out what the aliases"):
        read_document("mine.yaml", "\n".join(lines), [])


def test_aliases_may_be_used_as_they_are_meant() -> None:
    document = read_document("mine.yaml", "one: &split {by: name}\ntwo: *split\n", ["two.by=uid"])
    assert document.data["two"] == {"by": "uid"}
    assert document.data["one"] == {"by": "name"}


def test_places_are_those_of_the_file_or_of_the_override() -> None:
    document = read_document("mine.yaml", "\ufeffa:\n  b: [1,\n    {c: 2}]\n", ["a.d.e=3"])
    assert document.places["a.b.1.c"] == "line 3"
    assert document.places["a.d.e"] == document.places["a.d"] == "--set"
    assert document.places["a"] == "line 1"
    assert document.data == {"a": {"b": [1, {"c": 2}], "d": {"e": 3}}}


def test_what_an_override_replaces_has_no_line_any_more() -> None:
    document = read_document("mine.yaml", "a:\n  b: 1\nab:\n  c: 2\n", ["a={d: 1}"])
    assert "a.b" not in document.places
    assert document.places["a"] == "--set"
    assert document.places["ab.c"] == "line 4"
