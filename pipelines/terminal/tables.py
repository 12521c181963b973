"""Tables that fit the terminal: a column that has no room is left out, words go below their row, and none is broken.

What the eye looks for (a node's name, its state) stays whole and in one line at any width.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

GAP = 2
INDENT = 4
MIN_WORDS_WIDTH = 28
"""Words that had less room beside their row go below it."""


@dataclass(frozen=True)
class Column:
    """`keep` says how long a column stays as room gets scarce: the lowest goes first, None never goes."""

    name: str
    right: bool = False
    keep: int | None = None


def print_table(
    console: Console,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str | Text]],
    words: Sequence[str] = (),
    heading: str = "",
) -> None:
    """A line for each row of cells. `words` are sentences to each row, under `heading`: they wrap between words, beside
    the row or below it."""
    table = [[_text(cell) for cell in row] for row in rows]
    widths = [max([len(column.name), *(row[i].cell_len for row in table)]) for i, column in enumerate(columns)]
    kept = _kept(columns, widths, console.width)
    room = console.width - _width(widths, kept) - GAP
    longest = max([len(heading), *map(len, words)], default=0) if words else 0
    room = room if room >= min(MIN_WORDS_WIDTH, longest) else 0
    head = _line([Text(column.name, "bold") for column in columns], columns, widths, kept)
    if words and room:
        head += Text(" " * GAP) + Text(heading, "bold")
    _print(console, head)
    for row, said in zip(table, words or [""] * len(table), strict=True):
        for line in _with_words(_line(row, columns, widths, kept), said, room, console.width):
            _print(console, line)


def _kept(columns: Sequence[Column], widths: Sequence[int], width: int) -> list[int]:
    kept = list(range(len(columns)))
    while _width(widths, kept) > width:
        may_go = [(column.keep, i) for i, column in enumerate(columns) if i in kept and column.keep is not None]
        if not may_go:
            break
        kept.remove(min(may_go)[1])
    return kept


def _width(widths: Sequence[int], kept: Sequence[int]) -> int:
    return sum(widths[i] for i in kept) + GAP * (len(kept) - 1)


def _line(cells: Sequence[Text], columns: Sequence[Column], widths: Sequence[int], kept: Sequence[int]) -> Text:
    parts = []
    for i in kept:
        space = Text(" " * (widths[i] - cells[i].cell_len))
        parts.append(space + cells[i] if columns[i].right else cells[i] + space)
    return Text(" " * GAP).join(parts)


def _with_words(line: Text, words: str, room: int, width: int) -> Iterator[Text]:
    """The line with its words beside it in `room`, or below it if that is 0."""
    if room:
        first, *others = _wrapped(words, room) or [""]
        yield line + Text(" " * GAP + first)
        yield from (Text(" " * (line.cell_len + GAP) + other) for other in others)
    else:
        yield line
        yield from (Text(" " * INDENT + part, "dim") for part in _wrapped(words, width - INDENT))


def _wrapped(words: str, room: int) -> list[str]:
    return textwrap.wrap(words, max(1, room), break_long_words=False, break_on_hyphens=False)


def _text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _print(console: Console, line: Text) -> None:
    line.rstrip()
    console.print(line, soft_wrap=True, highlight=False)
