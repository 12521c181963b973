"""What is wrong with a recipe, place by place, and how all of it is told at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.errors import LatentworksError

MAX_SHOWN = 12
MAX_VALUE_CHARS = 80


@dataclass(frozen=True)
class Problem:
    """One mistake. The message has the value, the rule, and what to do."""

    path: str
    """Dotted key of the recipe, positions in lists counted from 0; empty for the whole recipe."""
    message: str
    name: str = ""
    """What a list calls the entry at `path`, or around it: a rule's name."""


@dataclass
class Findings:
    """What a check has found so far: `problems`, for which a recipe is refused, and `notes`, for which it is not."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, path: str, message: str, *, name: str = "") -> None:
        self.problems.append(Problem(path, message, name))

    def note(self, path: str, message: str) -> None:
        self.notes.append(f"{path}: {message}")

    def raise_problems(self, kind: type[LatentworksError], label: str) -> None:
        """Raises `kind` with all problems in one message, if there are any; `label` says what they are of."""
        if self.problems:
            raise kind(told(self.problems, label))


def told(problems: Sequence[Problem], label: str = "", places: Mapping[str, str] | None = None) -> str:
    """All problems in one message, the first `MAX_SHOWN` in full.

    `label` names the recipe; `places` are where its keys were given ("line 12", "--set"), by dotted path.
    """
    rows = [_row(problem, places or {}) for problem in problems[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        rows.append(f"... and {len(problems) - MAX_SHOWN} more")
    before = f"{label}: " if label else ""
    return before + rows[0] if len(rows) == 1 else "\n  ".join([f"{before}{len(problems)} errors", *rows])


def _row(problem: Problem, places: Mapping[str, str]) -> str:
    """ "select.where.0.op (not_safe, line 32): ..."; a key that was not given is where the block around it is."""
    path = problem.path
    place = places.get(path) or places.get(path.rpartition(".")[0])
    beside = ", ".join(part for part in (problem.name, place) if part)
    where = f"{path} ({beside})" if beside else path
    return f"{where}: {problem.message}" if where else problem.message


def shown(value: Any) -> str:
    """A value as it stands in a recipe, cut if it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."


def listed(names: Iterable[Any]) -> str:
    """ "a, b and c"."""
    *others, last = [str(name) for name in names] or ["nothing"]
    return f"{', '.join(others)} and {last}" if others else last


def meant(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'split'?", if one of the known words is close."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""
