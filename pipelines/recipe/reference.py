"""The reference of recipes as a page: a section per block, a row per field, all of it read from the models.

What a value may be comes from their JSON schema: page, schema and what is refused can't say different things.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from pipelines.recipe import Recipe
from pipelines.recipe.block import MOST, Block, is_manner

INTRODUCTION = """\
# Recipe reference

Every field that a recipe may have, block by block. This page is made of the models in `pipelines/recipe/`, by
`ldm recipe reference > docs/recipe.md`.

A field that isn't listed here is refused, and so is a value of another type. A block that is `{}` by default has the
defaults of its fields. `--set acquire.shard_size=500` gives a field another value for one run. `ldm recipe show
quickstart` prints a recipe with all defaults, `ldm recipe schema` this page as a JSON schema for editors; whether
fields go together, `ldm recipe validate` says.

What says *how* something is come by, and not *what* comes out, is no part of the key under which a node's result is
kept: changing it makes nothing anew. Such fields are marked *no part of any key*.
"""
MANNER_MARK = "*No part of any key.*"
HEAD = "| Field | Value | Default | Meaning |\n|---|---|---|---|\n"
WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}
PLURALS = {"text": "texts", "whole number": "whole numbers", "number": "numbers", "block": "blocks"}

Shape = Mapping[str, Any]
"""A JSON schema."""


@dataclass(frozen=True)
class Place:
    """A block where it stands in a recipe. `kind` is its own, or that of the block around it; `is_manner`: whether it
    is no part of any key."""

    path: str
    block: type[Block]
    kind: str | None = None
    is_manner: bool = False


def reference() -> str:
    """The page, as Markdown."""
    schema = Recipe.model_json_schema()
    shapes = {**schema["$defs"], Recipe.__name__: schema}
    places: dict[str, list[Place]] = {}
    for place in _places(Place("", Recipe)):
        places.setdefault(place.block.__name__, []).append(place)
    titles = {name: _title(found) for name, found in places.items()}
    sections = (_section(found[0], titles[name], shapes[name], titles) for name, found in places.items())
    return "\n".join([INTRODUCTION, *sections])


def anchor(title: str) -> str:
    """The fragment by which a heading is linked to, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


# -- blocks ------------------------------------------------------------------------------------------------------------


def _places(place: Place) -> Iterator[Place]:
    """This place, and those of all blocks within, in a recipe's order."""
    yield place
    for name, field in place.block.model_fields.items():
        path = ".".join(filter(None, (place.path, name, "<name>" if get_origin(field.annotation) is dict else "")))
        for block in _blocks(field.annotation):
            yield from _places(Place(path, block, _kind(block) or place.kind, place.is_manner or is_manner(field)))


def _blocks(annotation: Any) -> Iterator[type[Block]]:
    if isinstance(annotation, type) and issubclass(annotation, Block):
        yield annotation
    for argument in get_args(annotation):
        yield from _blocks(argument)


def _kind(block: type[Block]) -> str | None:
    field = block.model_fields.get("kind")
    annotation = None if field is None else field.annotation
    return str(get_args(annotation)[0]) if get_origin(annotation) is Literal else None


def _title(places: Sequence[Place]) -> str:
    """The path of the first of a block's places, with its kind if all of them are of one."""
    path, kinds = places[0].path, {place.kind for place in places}
    if not path:
        return "The recipe"
    return f"`{path}`" if len(kinds) > 1 or None in kinds else f"`{path}` ({places[0].kind})"


def _section(place: Place, title: str, shape: Shape, titles: Mapping[str, str]) -> str:
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(place.block.__doc__ or "").split("\n\n")]
    if place.is_manner:
        paragraphs.append(MANNER_MARK)
    rows = [
        f"| `{name}` | {_value(shape['properties'][name], titles)} | {_default(shape, name)} | {_meaning(field)} |\n"
        for name, field in place.block.model_fields.items()
    ]
    return "\n\n".join([f"## {title}", *paragraphs, HEAD + "".join(rows)])


# -- fields ------------------------------------------------------------------------------------------------------------


def _meaning(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"{text} {MANNER_MARK}" if is_manner(field) else text


def _default(shape: Shape, name: str) -> str:
    if name in shape.get("required", ()):
        return "required"
    default = shape["properties"][name].get("default", {})  # a schema leaves empty mappings out
    return "`{}`" if isinstance(default, dict) else f"`{json.dumps(default)}`"


def _value(shape: Shape, titles: Mapping[str, str]) -> str:
    """What a value may be, in words."""
    if "anyOf" in shape:
        return ", or ".join(_value(each, titles) for each in shape["anyOf"])
    if "oneOf" in shape or "$ref" in shape:
        return "block " + _either([_link(each["$ref"], titles) for each in shape.get("oneOf", [shape])])
    if "enum" in shape or "const" in shape:
        return _either([f"`{choice}`" for choice in shape.get("enum", [shape.get("const")])])
    if shape.get("type") == "array":
        return _list(shape, titles)
    if shape.get("type") == "object":
        of = shape["additionalProperties"]
        return "by name: " + (_value(of, titles) if of is not True else "any values")
    return WORDS.get(shape.get("type", ""), "any value") + _bounds(shape)


def _list(shape: Shape, titles: Mapping[str, str]) -> str:
    least, most = shape.get("minItems", 0), shape.get("maxItems")
    of = _value(shape.get("prefixItems", [shape.get("items")])[0], titles)
    for word, plural in PLURALS.items():
        if of.startswith(word):
            of = plural + of.removeprefix(word)
    if least and least == most:
        return f"list of {least} {of}"
    many = f"; {least} to {most} entries" if most else f"; {least} or more entries" if least else ""
    return f"list of {of}{many}"


def _bounds(shape: Shape) -> str:
    if {"minimum", "maximum"} <= shape.keys():
        return f" from {shape['minimum']:g} to {shape['maximum']:g}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {shape[key]:g}" for key, sign in signs.items() if shape.get(key, MOST) != MOST]
    return " " + " and ".join(limits) if limits else ""


def _either(choices: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))


def _link(target: str, titles: Mapping[str, str]) -> str:
    title = titles[target.rpartition("/")[2]]
    return f"[{title}](#{anchor(title)})"


if __name__ == "__main__":
    print(reference(), end="")  # noqa: T201
