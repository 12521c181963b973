"""The summaries of a recipe's runs: a page for each, and an index of them, newest first.

<state_dir>/summaries/<recipe>/2026-11-26T05-12-00Z.html    what one run did; .json beside it is its line in the index
<state_dir>/summaries/<recipe>/index.html                   all of them
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from infra.storage import Store
from pipelines.artifacts import Counts
from pipelines.dataset.acquired import is_acquired
from pipelines.dataset.figures import figures_of
from pipelines.pages.page import render
from pipelines.pages.run import run_page
from pipelines.recipe import Recipe
from pipelines.results import Asked, RunResult
from pipelines.terminal.measured import headline
from pipelines.terminal.words import duration

INDEX = "index.html"
TEMPLATE = "pages/summaries.html.j2"


@dataclass(frozen=True)
class Line:
    """What the index tells of one run."""

    page: str
    finished_at: str
    overrides: tuple[str, ...]
    made: tuple[str, ...]
    """The nodes that it made; the others were up to date."""
    num_nodes: int
    duration_s: float
    figures: tuple[str, ...]

    @property
    def when(self) -> str:
        return self.finished_at.replace("T", " ").replace("Z", " UTC")

    @property
    def took(self) -> str:
        return duration(self.duration_s)

    @property
    def what(self) -> str:
        """ "all 11 nodes", "train.base, evaluate.base"."""
        return f"all {self.num_nodes} nodes" if len(self.made) == self.num_nodes > 3 else ", ".join(self.made)


def folder_of(recipe: Recipe) -> Path:
    """Where the summaries of the recipe's runs lie."""
    return Path(recipe.state_dir).resolve() / "summaries" / recipe.name


def write_summary(result: RunResult, store: Store, recipe: Recipe, asked: Asked) -> Path:
    """Write the page of a run and the index anew; the page's path.

    Raises as `pipelines.pages.run.run_page` does, and `OSError` if a file can't be written.
    """
    folder = folder_of(recipe)
    html = run_page(result, store, recipe, asked, INDEX)
    folder.mkdir(parents=True, exist_ok=True)
    now = time.gmtime()
    path = _new_page(folder, time.strftime("%Y-%m-%dT%H-%M-%SZ", now))
    line = Line(
        path.name,
        time.strftime("%Y-%m-%dT%H:%M:%SZ", now),
        asked.overrides,
        tuple(name for name, node in result.nodes.items() if node.made),
        len(result.nodes),
        result.duration_s,
        tuple(_figures(result)),
    )
    _replace(path, html)
    _replace(path.with_suffix(".json"), json.dumps(asdict(line), indent=2, ensure_ascii=False) + "\n")
    lines = list(_lines(folder))
    _replace(folder / INDEX, render(TEMPLATE, title=recipe.name, description=recipe.description, lines=lines))
    return path


def places(page: Path | None) -> Mapping[str, str]:
    """What the terminal names of a page: itself, and the index."""
    return {} if page is None else {"summary": str(page), "all runs": str(page.with_name(INDEX))}


def newest_page(recipe: Recipe) -> Path | None:
    """The page of the recipe's latest run that has one."""
    folder = folder_of(recipe)
    return next((folder / line.page for line in _lines(folder)), None)


def _lines(folder: Path) -> Iterator[Line]:
    """Newest first; what can't be read is passed over, for a page of a run is nobody's input."""
    for path in sorted(folder.glob("*.json"), reverse=True):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            value |= {name: tuple(value[name]) for name in ("overrides", "made", "figures")}
            line = Line(**value)
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if line.page == path.with_suffix(".html").name and path.with_suffix(".html").is_file():
            yield line


def _new_page(folder: Path, name: str) -> Path:
    """A file that nobody else has: two runs may end in the same second."""
    number_of_file = 1
    while True:
        path = folder / (f"{name}.html" if number_of_file == 1 else f"{name}_{number_of_file}.html")
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number_of_file += 1
        else:
            return path


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _figures(result: RunResult) -> Iterator[str]:
    """ "3,700 URLs, 3,412 kept", "base: KID 0.041 ± 0.002, FD 169, CLIP score 27.3"."""
    acquired = [node.artifact.counts for name, node in result.nodes.items() if is_acquired(name)]
    if acquired:
        counts = sum(acquired, Counts(0, 0))
        yield f"{counts.total:,} URLs, {counts.kept:,} kept"
    for name, node in result.nodes.items():
        if name.startswith("evaluate."):
            told = headline(figures_of(node.artifact))
            if told:
                yield f"{name.partition('.')[2]}: {told}"
