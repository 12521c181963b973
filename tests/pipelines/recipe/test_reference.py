"""The reference page: current, whole, and readable far from the classes that it is made of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.recipe import Recipe
from pipelines.recipe.block import Block
from pipelines.recipe.reference import MANNER_MARK, anchor, reference

PAGE = Path(__file__).parents[3] / "docs" / "recipe.md"
UNCLEAR = {"Of", "This", "These", "It", "Both", "As", "By", "From", "With", "Keep", "Make", "Honour", "Those"}
"""First words that leave the subject to the name or the block above."""


def blocks(block: type[Block] = Block) -> Iterator[type[Block]]:
    """The blocks of recipes: not those that tests and plugins define."""
    for below in block.__subclasses__():
        if below.__module__.startswith("pipelines.recipe"):
            yield below
            yield from blocks(below)


FIELDS = [(block, name) for block in blocks() for name in block.model_fields]


def rows(page: str) -> dict[str, list[str]]:
    """Cells by section and field: "`acquire.fetch` threads"."""
    found, title = {}, ""
    for line in page.splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found[f"{title} {cells[0].strip('`')}"] = cells[1:]
    return found


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: ldm recipe reference > docs/recipe.md"


@pytest.mark.parametrize(("block", "name"), FIELDS, ids=[f"{block.__name__}.{name}" for block, name in FIELDS])
def test_every_field_has_a_sentence_that_stands_alone(block: type[Block], name: str) -> None:
    text = block.model_fields[name].description or ""
    assert text[:1].isupper()
    assert text[-1] == "."
    assert len(text.split()) >= 4
    assert text.split()[0] not in UNCLEAR


def test_the_page_has_every_field_of_every_block_once() -> None:
    asked = {block for block in blocks() if block.model_fields} - {
        base for block in blocks() for base in block.__mro__[1:]
    }
    assert len(rows(reference())) == sum(len(block.model_fields) for block in asked)
    assert all(len(cells) == 3 for cells in rows(reference()).values())
    assert Recipe in asked


def test_links_lead_to_headings() -> None:
    page = reference()
    headings = {anchor(title) for title in re.findall(r"^## (.*)$", page, flags=re.MULTILINE)}
    links = set(re.findall(r"\]\(#(.*?)\)", page))
    assert links
    assert links <= headings


@pytest.mark.parametrize(
    ("field", "value", "default"),
    [
        ("The recipe name", "text", "required"),
        ("The recipe report", "true or false", "`true`"),
        ("The recipe sources", "by name: block [`source` (gallery)](#source-gallery), ", "`{}`"),
        ("The recipe score", "block [`score`](#score), or null", "`null`"),
        ("The recipe acquire", "block [`acquire`](#acquire)", "`{}`"),
        ("`source` (gallery) port", "whole number from 1024 to 65535", "`8377`"),
        ("`source` (urls) files", "list of texts; 1 or more entries", "required"),
        ("`acquire.fetch` timeout_s", "number > 0", "`10.0`"),
        ("`acquire.image` encode_format", "`png`, `jpg` or `webp`", '`"jpg"`'),
        ("`select` where", "list of blocks [`select.where`](#selectwhere)", "`[]`"),
        ("`select.where` value", "any value", "required"),
        ("`select.split` held_out", "number from 0 to 1", "`0.05`"),
        ("`models.<name>.train` max_minutes", "number > 0, or null", "`null`"),
        ("`models.<name>.train.optimizer` betas", "list of 2 numbers ≥ 0 and < 1", "`[0.9, 0.99]`"),
        (
            "`models.<name>.network` (text_to_image) block_out_channels",
            "list of whole numbers from 1 to 65536; 1 to 9 entries",
            "required",
        ),
    ],
)
def test_values_and_defaults_in_words(field: str, value: str, default: str) -> None:
    cells = rows(reference())[field]
    assert cells[0].startswith(value) if value.endswith(" ") else cells[0] == value
    assert cells[1] == default


def test_what_is_no_part_of_a_key_says_so() -> None:
    page = reference()
    found = rows(page)
    assert found["`acquire.fetch` threads"][2].endswith(MANNER_MARK)
    assert MANNER_MARK not in found["`acquire.fetch` max_bytes"][2]
    assert MANNER_MARK in page.partition("## `execution`")[2].partition("| Field |")[0]
