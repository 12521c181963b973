"""Prompts of `ldm sample`: of the command line, or of a file with more of each picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.commands.sample.models import ignored
from pipelines.commands.sample.request import LARGEST_SEED
from pipelines.errors import UsageError

COLUMNS = ("prompt", "negative_prompt", "seed")
SUFFIXES = (".txt", ".csv", ".jsonl")


@dataclass(frozen=True)
class Row:
    """One prompt. None: what the options say."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    """Seed of the row's first picture; the next ones count up."""


def read_prompts(file: Path, tell: Callable[[str], None] = ignored) -> list[Row]:
    """The prompts of a file, by its suffix: a line each (.txt), or rows with `prompt` and perhaps `negative_prompt` and
    `seed` (.csv with a header, .jsonl). Empty lines are skipped, and `tell` is told how many.

    Raises `UsageError` naming file and line for what can't be read, another column, or a row without a prompt.
    """
    place = f"--prompts-file {file}"
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{place}: must end in {', '.join(SUFFIXES)}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{place}: can't be read: {error}") from error
    rows = list({".txt": _lines, ".csv": _table, ".jsonl": _objects}[suffix](text, place))
    if not rows:
        raise UsageError(f"{place}: has no prompts")
    lines = text.removesuffix("\n").split("\n")
    skipped = sum(not line.strip() for line in lines)
    if skipped and suffix != ".csv":
        tell(f"{file}: empty lines are skipped, {skipped} of {len(lines)}")
    return rows


def _lines(text: str, place: str) -> Iterator[Row]:  # noqa: ARG001
    return (Row(line.strip()) for line in text.split("\n") if line.strip())


def _table(text: str, place: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        head = [name.strip() for name in next(reader, [])]
        _check_columns(head, f"{place}, line 1")
        if len(set(head)) < len(head):
            raise UsageError(f"{place}, line 1: a column stands there twice: {', '.join(head)}")
        for cells in reader:
            where = f"{place}, line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(head):
                raise UsageError(f"{where}: has {len(cells)} cells for {len(head)} columns; quote what has commas")
            values: dict[str, Any] = {name: cell for name, cell in zip(head, cells, strict=True) if cell.strip()}
            seed = values.get("seed", "").strip()
            if seed.isdecimal():
                values["seed"] = int(seed)
            yield _row(values, where)
    except csv.Error as error:
        raise UsageError(f"{place}, line {reader.line_num}: {error}") from error


def _objects(text: str, place: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{place}, line {number}"
        try:
            values = json.loads(line, object_pairs_hook=_without_repeats)
        except ValueError as error:
            raise UsageError(f"{where}: can't be read: {error}") from error
        if not isinstance(values, dict):
            raise UsageError(f"{where}: must be an object")
        _check_columns(values, where)
        yield _row({name: value for name, value in values.items() if value is not None}, where)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def _check_columns(names: Any, where: str) -> None:
    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise UsageError(f"{where}: {unknown[0]!r} is unknown: there are {', '.join(COLUMNS)}")
    if "prompt" not in names:
        raise UsageError(f"{where}: has no prompt")


def _row(values: Mapping[str, Any], where: str) -> Row:
    if "prompt" not in values:
        raise UsageError(f"{where}: has no prompt")
    for name in ("prompt", "negative_prompt"):
        if not isinstance(values.get(name, ""), str):
            raise UsageError(f"{where}: {name} = {values[name]!r}: must be a text")
    seed = values.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < LARGEST_SEED:
        raise UsageError(f"{where}: seed = {seed!r}: must be a whole number from 0 to below 2^63")
    return Row(**values)
