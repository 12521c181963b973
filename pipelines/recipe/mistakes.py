"""What pydantic finds wrong with a recipe, in plain sentences: value, rule, and what would do."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from pipelines.recipe import Recipe
from pipelines.recipe.problems import Problem, meant, shown

Limits = Mapping[str, Any]
ABSENT = object()

SENTENCES: dict[str, Callable[[Limits], str]] = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), lambda _: "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), lambda _: "a number"),
    "finite_number": lambda _: "a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), lambda _: "true or false"),
    "string_type": lambda _: "text (put it in quotes)",
    **dict.fromkeys(("tuple_type", "list_type"), lambda _: "a list, such as [a, b]"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), lambda _: "a block of keys"),
    "greater_than": lambda limits: f"above {_number(limits['gt'])}",
    "greater_than_equal": lambda limits: f"{_number(limits['ge'])} or more",
    "less_than": lambda limits: f"below {_number(limits['lt'])}",
    "less_than_equal": lambda limits: f"{_number(limits['le'])} or less",
    "too_short": lambda limits: f"a list of {limits['min_length']} or more",
    "too_long": lambda limits: f"a list of {limits['max_length']} or fewer",
    "string_too_short": lambda _: "a text that is not empty",
    "string_too_long": lambda limits: f"a text of {limits['max_length']} characters or fewer",
    "string_pattern_mismatch": lambda _: "lower-case letters, digits, _ and -, beginning with a letter or a digit",
}
"""What a value must be, by the type of pydantic's error."""


def _number(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


def problems_of(error: ValidationError, data: Mapping[str, Any]) -> tuple[Problem, ...]:
    """A problem for each of pydantic's errors about the recipe `data`; it counts a list's wrong entries as absent
    too."""
    found = error.errors(include_url=False)
    around = {each["loc"][:depth] for each in found for depth in range(len(each["loc"]))}
    return tuple(_problem(each, data) for each in found if each["type"] != "too_short" or each["loc"] not in around)


def _problem(found: Any, data: Mapping[str, Any]) -> Problem:
    location, kind, value = found["loc"], found["type"], found["input"]
    path, name = _place(location, data)
    more = ""
    if kind in {"union_tag_not_found", "union_tag_invalid"}:
        if location[0] == "models" and "kind" not in value:  # as --set makes it of a name that isn't there
            more = _meant_model(str(location[1]), data)
        path, value = f"{path}.kind", value.get("kind", ABSENT)
    return Problem(path, _message(location, kind, value, found.get("ctx", {})) + more, name)


def _meant_model(name: str, data: Mapping[str, Any]) -> str:
    whole = [other for other, model in data["models"].items() if isinstance(model, Mapping) and "kind" in model]
    near = difflib.get_close_matches(name, whole, 1)
    return f"; did you mean models.{near[0]}?" if near else ""


def _message(location: Sequence[str | int], kind: str, value: Any, limits: Limits) -> str:
    if kind == "extra_forbidden":
        key, known = str(location[-1]), _known_keys(location)
        return f"unknown key {key!r}" + (meant(key, known) or f"; known here: {', '.join(known)}")
    if kind == "missing":
        return "missing; the list must have more entries" if isinstance(location[-1], int) else "missing; add this key"
    choices = _kinds(location) if kind.startswith("union_tag") else _choices(limits)
    if choices:
        expected = f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
        hint = meant(value, choices) if isinstance(value, str) and value not in choices else ""
        return f"missing; {expected}" if value is ABSENT else f"must be {expected}, got {shown(value)}{hint}"
    if kind in SENTENCES:
        return f"must be {SENTENCES[kind](limits)}, got {shown(value)}"
    return f"{limits.get('error', kind)}, got {shown(value)}"


def _choices(limits: Limits) -> list[str]:
    """Those of a literal: "'a', 'b' or 'c'"."""
    expected = str(limits.get("expected", ""))
    return [part.strip(" '") for part in expected.replace(" or ", ",").split(",") if part]


def _place(location: Sequence[str | int], data: Any) -> tuple[str, str]:
    """pydantic's location as a dotted path, without the tags of unions, which are no part of the file; and the name of
    the list entry that it is in, if that has one."""
    parts: list[str] = []
    name = ""
    here = data
    for part in location:
        if isinstance(here, Mapping) and part not in here and here.get("kind") == part:
            continue
        parts.append(str(part))
        try:
            here = here[part]
        except (KeyError, IndexError, TypeError):
            here = None
        if isinstance(part, int) and isinstance(here, Mapping) and isinstance(here.get("name"), str):
            name = here["name"]
    return ".".join(parts), name


def _kinds(location: Sequence[str | int]) -> list[str]:
    """What `kind` may be in the block at `location`."""
    return [
        str(choice)
        for block in _candidates(location)
        if _is_block(block) and "kind" in block.model_fields
        for choice in typing.get_args(block.model_fields["kind"].annotation)
    ]


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """The keys of the block that `location`'s last part is not a key of."""
    return sorted({key for block in _candidates(location[:-1]) if _is_block(block) for key in block.model_fields})


def _candidates(location: Sequence[str | int]) -> list[Any]:
    """The annotations that there may be at `location`."""
    candidates: list[Any] = [Recipe]
    for part in location:
        candidates = [inner for block in candidates for inner in _inside(block, part)]
    return candidates


def _inside(annotation: Any, part: str | int) -> list[Any]:
    if _is_block(annotation):
        field = annotation.model_fields.get(str(part))
        if field is not None:
            return _flattened(field.annotation)
        kind = annotation.model_fields.get("kind")
        return [annotation] if kind is not None and part in typing.get_args(kind.annotation) else []
    contents = [argument for argument in typing.get_args(annotation) if argument is not Ellipsis]
    return _flattened(contents[-1]) if contents else []


def _flattened(annotation: Any) -> list[Any]:
    """The members of unions, the contents of Annotated and of containers."""
    if _is_block(annotation):
        return [annotation]
    origin = typing.get_origin(annotation)
    if origin in {dict, tuple, list}:
        return [annotation]
    return [inner for argument in typing.get_args(annotation) for inner in _flattened(argument)]


def _is_block(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
