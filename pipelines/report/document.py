"""What the report on a data set says, gathered from manifests, ledgers, scores and a sample of the images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from infra.storage import Store
from pipelines.artifacts import Artifact
from pipelines.dataset.acquired import Acquired, Shards, acquired_of
from pipelines.dataset.facts import SplitFacts
from pipelines.dataset.figures import FRECHET_DISTANCE, figures_of
from pipelines.dataset.funnel import funnel
from pipelines.dataset.licences import licences
from pipelines.dataset.selection import NEAR_DUPLICATE, read_dropped, read_near_duplicates, read_selection
from pipelines.pages.page import funnel_bars, render
from pipelines.report.figures import histograms
from pipelines.report.rows import Place, Shown, load_shown, places_of, sample, value_text
from pipelines.reporting import Report
from pipelines.terminal.measured import WORDS
from pipelines.terminal.words import number

TEMPLATE = "report/report.html.j2"
MAX_KEPT = 60
MAX_DROPPED = 24
"""Images shown of each reason."""
MAX_REASONS = 12
MAX_PAIRS = 24
MAX_LEDGERS = 20
DUPLICATE = "duplicate_"
COMPARED = ("acquired", "selected")
"""What figures of a selection are of."""


@dataclass(frozen=True)
class Cell:
    """An image of a contact sheet, with the value that decided over it, if one did."""

    shown: Shown
    value: str = ""


@dataclass(frozen=True)
class Sheet:
    """A contact sheet: `count` rows there are, `cells` are shown."""

    title: str
    count: int
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Twins:
    """A near-duplicate beside the row that stays for it."""

    dropped: Shown
    stays: Shown
    value: str


def write_document(inputs: Mapping[str, Artifact], store: Store, report: Report) -> str:
    """The page as HTML.

    Raises `pipelines.dataset.errors.UnusableImage` if an image to be shown is missing or can't be decoded.
    """
    acquired, selected, scored = acquired_of(inputs), inputs["select"], inputs.get("score")
    (unit,) = selected.units
    report.progress(0, 3, "parts", "histograms")
    charts = histograms(acquired, scored, selected, store)
    report.progress(1, 3, "parts", "images")
    pictures = _Pictures(inputs, store)
    report.progress(2, 3, "parts", "licences")
    stated = sorted(licences(acquired, selected, store).items(), key=lambda item: (-item[1], item[0]))
    sides = SplitFacts.of(selected).info()
    page = render(
        TEMPLATE,
        title="Dataset report",
        source=_told_sources(acquired),
        cards=_cards(acquired, selected, sides),
        funnel=funnel_bars(funnel({**acquired.artifacts, "select": selected}), sides),
        charts=charts,
        metrics=_metrics(selected),
        kept=pictures.kept,
        dropped=pictures.dropped,
        twins=pictures.twins,
        num_twins=selected.counts.dropped.get(NEAR_DUPLICATE, 0),
        licences=[(name, f"{count:,}") for name, count in stated],
        settings=[*_flattened(acquired.settings), *_flattened({"select": selected.manifest["spec"]})],
        scorers=[(name, who["model"], who["sha256"][:16]) for name, who in _scorers(scored).items()],
        ledgers=_ledgers(acquired),
        selection=[unit.path(entry.name) for entry in unit.files],
        revisions=[(name, artifact.revision) for name, artifact in inputs.items()],
    )
    report.progress(3, 3, "parts")
    return page


class _Pictures:
    """The rows to show, chosen first and then read all at once, shard by shard."""

    def __init__(self, inputs: Mapping[str, Artifact], store: Store) -> None:
        selected = inputs["select"]
        rules = {rule["name"]: rule for rule in selected.manifest["spec"].get("where", [])}
        selection = read_selection(selected, store, ["shard", "key"])
        dropped = read_dropped(selected, store, ["shard", "key", "reason"])
        kept = places_of(sample(selection, MAX_KEPT))
        reasons = _by_count(dropped)
        chosen = {reason: places_of(sample(_of(dropped, reason), MAX_DROPPED)) for reason in reasons}
        pairs = _near_duplicates(selected, store)
        places = [*kept, *(place for rows in chosen.values() for place in rows)]
        places += [place for one, other, _ in pairs for place in (one, other)]
        columns = sorted({column for reason in reasons if (column := _column(reason, rules)) is not None})
        shown = load_shown(places, acquired_of(inputs), inputs.get("score"), store, columns)
        self.kept = Sheet("Selected", selection.num_rows, [Cell(shown[place]) for place in kept])
        self.dropped = [
            Sheet(_title(reason, rules), count, list(_cells(chosen[reason], shown, _column(reason, rules))))
            for reason, count in reasons.items()
        ]
        self.twins = [Twins(shown[one], shown[other], value) for one, other, value in pairs]


def _cells(places: Sequence[Place], shown: Mapping[Place, Shown], column: str | None) -> Iterator[Cell]:
    for place in places:
        row = shown[place]
        known = column is not None and column != "caption" and column in row.values
        if column == "caption":
            yield Cell(row, f"{len(row.caption)} characters")
        else:
            yield Cell(row, f"{column} {row.values[column]}" if known and column is not None else "")


def _by_count(dropped: Any) -> dict[str, int]:
    """Rows of each reason that has a sheet of its own, the commonest first."""
    counted = pc.value_counts(dropped.column("reason")).to_pylist()
    reasons = {entry["values"]: entry["counts"] for entry in counted if entry["values"] != NEAR_DUPLICATE}
    return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:MAX_REASONS])


def _of(dropped: Any, reason: str) -> Any:
    return dropped.filter(pc.equal(dropped.column("reason"), reason))


def _column(reason: str, rules: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The column that decided."""
    if reason in rules:
        return str(rules[reason]["column"])
    return reason.removeprefix(DUPLICATE) if reason.startswith(DUPLICATE) else None


def _title(reason: str, rules: Mapping[str, Mapping[str, Any]]) -> str:
    if reason not in rules:
        return reason
    rule = rules[reason]
    return f"{reason}: not {rule['column']} {rule['op']} {value_text(rule['value'])}"


def _near_duplicates(selected: Artifact, store: Store) -> list[tuple[Place, Place, str]]:
    """A sample of the pairs: what was dropped, what stays for it, and by how much they differ."""
    columns = ["shard", "key", "winner_shard", "winner_key", "bits", "rms"]
    pairs = read_near_duplicates(selected, store, columns)
    if pairs is None:
        return []
    rows = sample(pairs, MAX_PAIRS)
    values = [
        f"{bits} bits, RMS {number(round(rms, 4))}"
        for bits, rms in zip(*(rows.column(column).to_pylist() for column in ("bits", "rms")), strict=True)
    ]
    return list(zip(places_of(rows), places_of(rows, "winner_"), values, strict=True))


def _told_sources(acquired: Acquired) -> str:
    """ "urls", or "web (urls), photos (folder)"."""
    kinds = {name: str(asked.get("kind", "not stated")) for name, asked in acquired.sources.items()}
    return ", ".join(f"{name} ({kind})" if name else kind for name, kind in kinds.items())


def _cards(acquired: Shards, selected: Artifact, sides: Mapping[str, int]) -> list[tuple[str, str]]:
    images_bytes = sum(entry.size_bytes for unit in acquired.units for entry in unit.files if entry.name[-4:] == ".tar")
    return [
        (f"{acquired.counts.total:,}", "URLs"),
        (f"{acquired.counts.kept:,}", "pairs acquired"),
        (f"{selected.counts.kept:,}", "pairs selected"),
        (f"{sides['train']:,}", "to train on"),
        (f"{sides['held_out']:,}", "held out"),
        (f"{len(acquired.units):,}", f"shards, {number(images_bytes / 1e6)} MB"),
    ]


def _metrics(selected: Artifact) -> list[tuple[str, str, str]]:
    """A row for each figure of the selection, of the acquired pairs beside the selected ones: means of the scores, and
    the distance of the selected images from all acquired ones."""
    rows: dict[str, dict[str, str]] = {}
    for figure in figures_of(selected):
        words = WORDS[figure.name].full if figure.name in WORDS else figure.name.replace("_", " ")
        if figure.name == FRECHET_DISTANCE:
            words += " from all acquired images"
        if figure.extractor:
            words += f" ({figure.extractor})"
        side = figure.subject if figure.subject in COMPARED else ""
        told = words if side else " ".join(filter(None, (words, figure.subject.replace("_", " "))))
        rows.setdefault(told, {})[side or "selected"] = number(figure.value)
        if figure.name == FRECHET_DISTANCE and side:
            rows[told]["acquired"] = "0"
    return [(words, cells.get("acquired", ""), cells.get("selected", "")) for words, cells in rows.items()]


def _scorers(scored: Artifact | None) -> Mapping[str, Any]:
    known: Mapping[str, Any] = {} if scored is None else scored.info.get("scorers", {})
    return known


def _ledgers(acquired: Shards) -> list[tuple[str, str, str]]:
    """Where the rows of the first shards lie, and how many there are; the rest is in the list of files."""
    return [
        (unit.only(".parquet"), f"{unit.counts.total:,}", f"{unit.counts.kept:,}")
        for unit in acquired.units[:MAX_LEDGERS]
    ]


def _flattened(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Settings by dotted name."""
    if isinstance(values, Mapping):
        inner = (_flattened(value, f"{prefix}.{name}" if prefix else str(name)) for name, value in values.items())
        return [row for rows in inner for row in rows]
    if isinstance(values, list) and any(isinstance(value, Mapping) for value in values):
        return [row for at, value in enumerate(values) for row in _flattened(value, f"{prefix}.{at}")]
    return [(prefix, str(values)[:200])]
