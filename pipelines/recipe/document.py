"""A recipe's text: YAML read strictly, overridden by `--set`, with the place where each key was given.

What the keys mean is left to others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pipelines.recipe.errors import RecipeError

MAX_DEPTH = 64
MAX_NODES = 100_000
MAX_DIGITS = 400
TAG = "tag:yaml.org,2002:"
TAGS = frozenset(TAG + kind for kind in ("bool", "int", "float", "null", "str", "seq", "map"))
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """A recipe's keys and values. `label` names the file; `places` are where keys were given ("line 12", "--set")."""

    label: str
    data: dict[str, Any]
    places: dict[str, str]


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


for _kind, _pattern, _first in (
    ("bool", r"true|false|True|False|TRUE|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", "~nN"),
):
    _Loader.add_implicit_resolver(TAG + _kind, re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver(TAG + "null", re.compile(r"^$"), [""])
_Loader.add_constructor(TAG + "float", lambda _loader, node: float(node.value.replace("_", "")))
_Loader.add_constructor(TAG + "int", lambda _loader, node: int(node.value.replace("_", "")))


def read_document(label: str, text: str, overrides: Sequence[str]) -> Document:
    """Raises `RecipeError`: not YAML, no mapping, a duplicate key, or an override that can't be applied."""
    try:
        root, data = _read(text)
    except RecipeError as error:
        raise RecipeError(f"{label}, {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{label}: not valid YAML: {_in_a_line(error)}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{label}: a recipe is a mapping (name: ..., source: ...), got {type(data).__name__}")
    data = json.loads(json.dumps(data))  # what an alias repeats is then a block of its own, and overridden alone
    for override in overrides:
        _apply(data, override)
    overridden = [override.partition("=")[0] for override in overrides]
    places = {path.rsplit(".", depth)[0]: "--set" for path in overridden for depth in range(path.count(".") + 1)}
    places |= {path: f"line {line}" for path, line in _lines(root) if not _is_within(path, overridden)}
    return Document(label, data, places)


def _read(text: str) -> tuple[yaml.Node | None, Any]:
    """Raises `RecipeError`, which names the line, or `YAMLError`."""
    try:
        root = yaml.compose(text, Loader=_Loader)
        _check(root)
        return root, yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise RecipeError(f"line 1: blocks are nested more than {MAX_DEPTH} deep; a recipe has fewer") from None
    except (ValueError, KeyError, TypeError) as error:  # of an explicit tag: !!int abc, !!map [a]
        raise yaml.YAMLError(f"a value is not of the kind that its tag says ({error})") from error


def _check(root: yaml.Node | None) -> None:
    """Raises `RecipeError` for what a recipe has no use for: tags of other kinds, blocks in themselves, too much."""
    pending: list[tuple[yaml.Node, tuple[int, ...]]] = [] if root is None else [(root, ())]
    count = 0
    while pending:
        node, around = pending.pop()
        line = node.start_mark.line + 1
        count += 1
        if id(node) in around or count > MAX_NODES or len(around) > MAX_DEPTH:
            raise RecipeError(
                f"line {line}: a block within itself, more than {MAX_DEPTH} deep, or more than {MAX_NODES:,} values in"
                " all; write out what the aliases (*name) stand for"
            )
        if node.tag not in TAGS:
            raise RecipeError(f"line {line}: tag {node.tag.replace(TAG, '!!')} is of no use in a recipe; leave it out")
        if isinstance(node, yaml.ScalarNode):
            if HALF_A_CHARACTER.search(node.value):
                raise RecipeError(f"line {line}: \\ud800 to \\udfff are halves of characters; write whole ones")
            if node.tag == TAG + "int" and len(node.value) > MAX_DIGITS:
                raise RecipeError(f"line {line}: a number of {len(node.value):,} digits; quote it if it is text")
        children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        if isinstance(node, yaml.CollectionNode):
            pending += [(child, (*around, id(node))) for child in children]


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one key. A block that is absent or null is made on the way."""
    path, separator, value_text = override.partition("=")
    if not separator or not all(path.split(".")) or HALF_A_CHARACTER.search(path):
        raise RecipeError(f"--set {override!r}: expected dotted.path=value, such as models.base.train.steps=500")
    try:
        value = _read(value_text)[1]
    except RecipeError as error:
        raise RecipeError(f"--set {override!r}: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not valid YAML: {_in_a_line(error)}") from error
    *parents, last = path.split(".")
    here: Any = data
    for depth, part in enumerate(parents):
        if isinstance(here, list):
            here = here[_index(here, part, override)]
        else:
            if here.get(part) is None:
                here[part] = {}
            here = here[part]
        if not isinstance(here, dict | list):
            where = ".".join(parents[: depth + 1])
            raise RecipeError(f"--set {override!r}: {where} is {here!r}, which has no parts")
    if isinstance(here, list):
        here[_index(here, last, override)] = value
    else:
        here[last] = value


def _index(values: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or len(part) > len(str(len(values))) or int(part) >= len(values):
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


def _is_within(path: str, blocks: Sequence[str]) -> bool:
    return any(path == block or path.startswith(f"{block}.") for block in blocks)


def _in_a_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())
