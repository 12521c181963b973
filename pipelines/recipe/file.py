"""Recipes as files: read YAML strictly, apply `--set` overrides, and say exactly what is wrong and where.

The recipe's own rules are in `pipelines.recipe`; here is where they meet a person's file.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.recipe import Recipe
from pipelines.recipe.errors import RecipeError

MAX_ERRORS_SHOWN = 12


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-4 is a number, `no` and `2026-01-01` are strings. Duplicate keys are errors."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - none of YAML 1.1's

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise RecipeError(f"line {line}: a key must be a word, got {key!r}; quote it if it is meant")
            if key in seen:
                raise RecipeError(f"line {line}: duplicate key {key!r}, given before in line {seen[key]}; keep one")
            seen[key] = line
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|false|True|False|TRUE|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", "~nN"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^$"), [""])
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _loader, node: float(node.value.replace("_", "")))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _loader, node: int(node.value.replace("_", "")))


def shipped_recipes() -> dict[str, str]:
    """Text of each recipe that comes with the package, by name."""
    folder = resources.files("configs")
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in files}


def recipe_text(name_or_path: str) -> tuple[str, str]:
    """(label for messages, text) of a shipped recipe's name or of a file. Raises `RecipeError` if there is neither."""
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
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
    """Read, override, and check a recipe.

    `overrides` are `dotted.path=value`, the value in YAML.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown, duplicate or mistyped key, a value out of its range.
    """
    label, text = recipe_text(name_or_path)
    try:
        root = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{label}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecipeError as error:
        raise RecipeError(f"{label}, {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{label}: a recipe is a mapping (name: ..., source: ...), got {type(data).__name__}")
    for override in overrides:
        _apply_override(data, override)
    try:
        # Strict mode takes lists for tuples and integers for floats in JSON alone.
        return Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        overridden = [override.partition("=")[0] for override in overrides]
        places = {path.rsplit(".", depth)[0]: "--set" for path in overridden for depth in range(path.count(".") + 1)}
        places |= {path: f"line {line}" for path, line in _lines(root) if path not in overridden}
        raise RecipeError(_explained(error, label, places, data)) from None


def _names() -> str:
    return ", ".join(shipped_recipes())


def _apply_override(data: dict[str, Any], override: str) -> None:
    path, separator, value_text = override.partition("=")
    if not separator or not path:
        raise RecipeError(f"--set {override!r}: expected dotted.path=value, such as models.base.train.steps=500")
    try:
        value = yaml.load(value_text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not valid YAML: {' '.join(str(error).split())}") from error
    *parents, last = path.split(".")
    here: Any = data
    for depth, part in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(here, list):
            here = here[_index(here, part, override)]
        elif isinstance(here, dict):
            here = here.setdefault(part, {})
        if not isinstance(here, dict | list):
            raise RecipeError(f"--set {override!r}: {where} is {here!r}, which has no parts")
    if isinstance(here, list):
        here[_index(here, last, override)] = value
    else:
        here[last] = value


def _index(values: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(values):
        raise RecipeError(f"--set {override!r}: {part!r} is no position in a list of {len(values)} (0 is the first)")
    return int(part)


def _lines(node: yaml.Node | None, path: str = "") -> Iterator[tuple[str, int]]:
    """(dotted path, line) of every key and list entry of the file."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = f"{path}.{key.value}" if path else str(key.value)
            yield child, key.start_mark.line + 1
            yield from _lines(value, child)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{path}.{index}", value.start_mark.line + 1
            yield from _lines(value, f"{path}.{index}")


def _explained(error: ValidationError, label: str, places: Mapping[str, str], data: dict[str, Any]) -> str:
    problems = error.errors(include_url=False)
    rows = [_problem(problem, places, data) for problem in problems[:MAX_ERRORS_SHOWN]]
    if len(problems) > MAX_ERRORS_SHOWN:
        rows.append(f"... and {len(problems) - MAX_ERRORS_SHOWN} more")
    if len(rows) == 1:
        return f"{label}: {rows[0]}"
    return "\n  ".join([f"{label}: {len(problems)} errors", *rows])


def _problem(problem: Any, places: Mapping[str, str], data: dict[str, Any]) -> str:
    path = _dotted(problem["loc"], data)
    place = places.get(path) or places.get(path.rpartition(".")[0])
    where = f"{path} ({place})" if place else path
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        key = path.rpartition(".")[2]
        known = _known_keys(problem["loc"])
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{where}: unknown key {key!r}; {hint}"
    if kind == "missing":
        return f"{where}: missing; add this key"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if kind == "value_error":
        return f"{where}: {message}" if path else message
    return f"{where}: {message}, got {json.dumps(value, ensure_ascii=False)}"


def _dotted(location: Sequence[str | int], data: Any) -> str:
    """pydantic's location without the tags of unions, which are no part of the file."""
    parts: list[str] = []
    here = data
    for index, part in enumerate(location):
        if isinstance(here, Mapping) and part not in here and here.get("kind") == part:
            continue
        parts.append(str(part))
        is_last = index == len(location) - 1
        if not is_last:
            try:
                here = here[part]
            except (KeyError, IndexError, TypeError):
                here = None
    return ".".join(parts)


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """The keys of the block that `location`'s last part is not a key of."""
    candidates: list[Any] = [Recipe]
    for part in location[:-1]:
        candidates = [inner for block in candidates for inner in _inside(block, part)]
    return sorted({key for block in candidates if _is_block(block) for key in block.model_fields})


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
