"""What a stage tells the outside while it works: parameters, metrics, progress, figures, models, notes.

Stages know this protocol only. The command line shows it in the terminal and sends it to MLflow; a training worker
sends it through a queue to its driver (`QueuedReport`), so that one process alone talks to the tracking server.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from infra.registry import ModelFacts
from infra.tracking_models import TrainingFacts

Scalar = str | int | float | bool | None

logger = logging.getLogger(__name__)


class Report(Protocol):
    """The receiving side of a running node. Every method returns at once and never raises for a service's sake."""

    def params(self, values: Mapping[str, Scalar]) -> None:
        """Settings of the node, by dotted name."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Figures by name, with the unit in the name; `step` is the training step, None for a final figure."""

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        """`done` of `total` `unit`s ("URLs", "steps") are finished; `note` is a short live text ("loss 0.41")."""

    def figure(self, name: str, png: bytes) -> None:
        """A picture, such as "samples/step_000500.png"."""

    def document(self, name: str, text: str) -> None:
        """A small text or JSON or HTML file, such as "manifest.json"."""

    def model(self, facts: ModelFacts) -> None:
        """A released model, for the registry: what it is, made from what, how good. Telling it twice is harmless."""

    def checkpoints(self, facts: TrainingFacts) -> None:
        """The checkpoints of the node's training that are kept now, all of them. Telling it twice is harmless."""

    def note(self, message: str) -> None:
        """One line that a person should see."""


class LogReport:
    """Reports to `logging` alone: for torchrun workers, tests and scripts."""

    def params(self, values: Mapping[str, Scalar]) -> None:
        logger.info("params %s", dict(values))

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        logger.info("metrics step=%s %s", step, dict(values))

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        logger.debug("progress %d/%d %s %s", done, total, unit, note)

    def figure(self, name: str, png: bytes) -> None:
        logger.info("figure %s (%d bytes)", name, len(png))

    def document(self, name: str, text: str) -> None:
        logger.info("document %s (%d characters)", name, len(text))

    def model(self, facts: ModelFacts) -> None:
        logger.info("model %s", facts)

    def checkpoints(self, facts: TrainingFacts) -> None:
        logger.info("checkpoints %s", facts)

    def note(self, message: str) -> None:
        logger.info("%s", message)


@dataclass(frozen=True)
class Event:
    """One call on a `Report`, as sent between processes."""

    method: Literal["params", "metrics", "progress", "figure", "document", "model", "checkpoints", "note"]
    arguments: tuple[object, ...]

    def apply(self, report: Report) -> None:
        getattr(report, self.method)(*self.arguments)


class QueuedReport:
    """A `Report` that hands each call as an `Event` to `send`; progress is thinned to two events a second."""

    PROGRESS_INTERVAL_S = 0.5

    def __init__(self, send: Callable[[Event], None]) -> None:
        self._send = send
        self._last_progress_s = 0.0

    def params(self, values: Mapping[str, Scalar]) -> None:
        self._send(Event("params", (dict(values),)))

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        self._send(Event("metrics", (dict(values), step)))

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        now_s = time.monotonic()
        if done < total and now_s - self._last_progress_s < self.PROGRESS_INTERVAL_S:
            return
        self._last_progress_s = now_s
        self._send(Event("progress", (done, total, unit, note)))

    def figure(self, name: str, png: bytes) -> None:
        self._send(Event("figure", (name, png)))

    def document(self, name: str, text: str) -> None:
        self._send(Event("document", (name, text)))

    def model(self, facts: ModelFacts) -> None:
        self._send(Event("model", (facts,)))

    def checkpoints(self, facts: TrainingFacts) -> None:
        self._send(Event("checkpoints", (facts,)))

    def note(self, message: str) -> None:
        self._send(Event("note", (message,)))
