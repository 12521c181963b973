"""The summary of a run as one self-contained page: time, funnel, figures, pictures, where to look, what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.storage import Store
from pipelines.artifacts import Unit
from pipelines.dataset.acquired import is_acquired
from pipelines.dataset.figures import figures_of
from pipelines.dataset.shards import decoded
from pipelines.pages.page import Bar, funnel_bars, picture, render
from pipelines.recipe import Recipe
from pipelines.results import Asked, NodeResult, RunResult
from pipelines.terminal.figures import figures
from pipelines.terminal.measured import HEADLINE, Told, networks, told
from pipelines.terminal.summary import next_commands, places
from pipelines.terminal.words import duration

TEMPLATE = "pages/run.html.j2"
PICTURE_PX = 128
MAX_PICTURES = 64
GRID_GAP_PX = 2
"""`ldm.images.image_grid` has so much between pictures."""


@dataclass(frozen=True)
class Shown:
    """A picture, or a real one beside it, as data URIs."""

    caption: str
    images: Sequence[str]
    note: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What one `evaluate` node has to show: figures, pictures of prompts and of captions."""

    node: str
    figures: Sequence[Told]
    pictures: Sequence[Shown]
    pairs: Sequence[Shown]
    num_pictures: str
    networks: str

    @property
    def table(self) -> list[tuple[str, ...]]:
        """A row for each figure."""
        return [(one.title, one.by, one.value, one.floor, one.untrained, one.closed) for one in self.figures]


def run_page(result: RunResult, store: Store, recipe: Recipe, asked: Asked, index: str) -> str:
    """The page's HTML; `index` is the address of the index of all runs.

    Raises:
        infra.storage.StorageError, pipelines.artifacts.ArtifactError, pipelines.dataset.errors.DatasetError: what was
            published can't be read.
    """
    evaluations = [
        _evaluation(name, node.artifact.units[0], store)
        for name, node in result.nodes.items()
        if name.startswith("evaluate.")
    ]
    selected = result.nodes.get("select")
    sides = {} if selected is None else {side: int(selected.artifact.info[side]) for side in ("train", "held_out")}
    return render(
        TEMPLATE,
        title=recipe.name,
        description=recipe.description,
        index=index,
        overrides=asked.overrides,
        finished=max((node.artifact.manifest["finished_at"] for node in result.nodes.values()), default=""),
        cards=_cards(result, evaluations),
        times=_times(result),
        funnel=funnel_bars(result.funnel, sides),
        stages=_stages(result),
        evaluations=evaluations,
        places=_links(result, store),
        commands=next_commands(result, recipe, asked),
    )


def _cards(result: RunResult, evaluations: Sequence[Evaluation]) -> list[tuple[str, str]]:
    cards = []
    if result.duration_s:
        cards.append((duration(result.duration_s), "for this run"))
    acquired = [node.artifact for name, node in result.nodes.items() if is_acquired(name)]
    if acquired:
        cards.append((f"{sum(artifact.counts.total for artifact in acquired):,}", "URLs"))
    if "select" in result.nodes:
        cards.append((f"{result.nodes['select'].artifact.counts.kept:,}", "pairs selected"))
    for evaluation in evaluations:
        for one in evaluation.figures[:HEADLINE]:
            label = f"{one.named}, {one.closed} closed" if one.closed else one.named
            cards.append((one.value.partition(" ±")[0], label))
    return cards


def _times(result: RunResult) -> list[Bar]:
    """Of each node: of this run where it was made, else of the run that made it."""
    seconds = {
        name: node.duration_s if node.made else float(node.artifact.manifest["duration_s"])
        for name, node in result.nodes.items()
    }
    longest = max([*seconds.values(), 1e-9])
    return [
        Bar(
            name,
            duration(seconds[name]) + ("" if node.made else ", before"),
            seconds[name] / longest,
            "kept" if node.made else "idle",
        )
        for name, node in result.nodes.items()
    ]


def _stages(result: RunResult) -> list[tuple[str, ...]]:
    return [(name, *_stage(node)) for name, node in result.nodes.items()]


def _stage(node: NodeResult) -> tuple[str, ...]:
    counts = node.artifact.counts
    numbers = (counts.total, counts.kept, counts.num_dropped, counts.num_failed)
    return (*(f"{count:,}" for count in numbers), figures(node.artifact), node.artifact.revision[:12])


def _links(result: RunResult, store: Store) -> list[tuple[str, str, str]]:
    """Label, text and address of each place; no address where it isn't a local file or folder."""
    return [
        (label, text, Path(text).as_uri() if store.is_local and text.startswith(store.root) else "")
        for label, text in places(result, store).items()
    ]


def _evaluation(node: str, unit: Unit, store: Store) -> Evaluation:
    figures = figures_of(unit)
    described: dict[str, Any] = store.read_json(unit.path("samples.json")) if _has(unit, "samples.json") else {}
    return Evaluation(
        node,
        told(figures),
        list(_pictures(unit, store, described)),
        list(_pairs(unit, store, described)),
        f"{unit.info['images']:,}" if isinstance(unit.info.get("images"), int) else "",
        ", ".join(networks(figures)),
    )


def _pictures(unit: Unit, store: Store, described: dict[str, Any]) -> Iterator[Shown]:
    """Those of the recipe's prompts; the grid as it is where nothing says what is on it."""
    samples = [sample for sample in described.get("samples", []) if _has(unit, sample["file"])]
    for sample in samples[:MAX_PICTURES]:
        yield Shown(sample["prompt"], [_image(unit, store, sample["file"])], f"seed {sample['seed']}")
    if not samples and _has(unit, "grid.png"):
        yield Shown("", [_image(unit, store, "grid.png", side_px=1024)])


def _pairs(unit: Unit, store: Store, described: dict[str, Any]) -> Iterator[Shown]:
    """Real images beside the pictures of their captions, cut out of the grid that `evaluate` publishes."""
    sides = described.get("pairs", [])
    if not sides or not _has(unit, "pairs.png"):
        return
    grid = decoded(store.read_bytes(unit.path("pairs.png")), unit.path("pairs.png"))
    rows, columns = 2 * len(sides), max(len(side) for side in sides)
    height, width = (grid.shape[0] + GRID_GAP_PX) // rows, (grid.shape[1] + GRID_GAP_PX) // columns
    for number_of_side, side in enumerate(sides):
        for column, pair in enumerate(side):
            left = column * width
            tops = [(2 * number_of_side + below) * height for below in (0, 1)]
            cells = [grid[top : top + height - GRID_GAP_PX, left : left + width - GRID_GAP_PX] for top in tops]
            yield Shown(pair["prompt"], [picture(cell, PICTURE_PX) for cell in cells], pair["split"].replace("_", " "))


def _image(unit: Unit, store: Store, name: str, side_px: int = PICTURE_PX) -> str:
    path = unit.path(name)
    return picture(decoded(store.read_bytes(path), path), side_px)


def _has(unit: Unit, name: str) -> bool:
    return any(entry.name == name for entry in unit.files)
