"""Ray tasks and calls of Ray actors, of which a bounded number is in flight.

What the tasks are, and what to do about one that failed, is the caller's matter; where they run, `infra.cluster`'s. Ray
is imported inside the functions.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from infra.cluster import ClusterError, first_line
from infra.signals import interruptible

Item = TypeVar("Item")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome(Generic[Item]):
    """What became of one item: its `value`, or the `error` that its task or actor ended with."""

    item: Item
    value: Any = None
    error: Exception | None = None

    def result(self) -> Any:
        """The value. Raises the error if there is one."""
        if self.error is not None:
            raise self.error
        return self.value


def bounded(submit: Callable[[Item], Any], items: Iterable[Item], limit: int) -> Iterator[Outcome[Item]]:
    """Runs `submit(item)`, which returns an object reference, with at most `limit` in flight.

    `items` is read as room is made, and outcomes come in the order of completion. How often Ray retries a task whose
    worker died is `max_retries` of the remote function; after that, or if the task raises, the outcome has the error
    and the others go on. Closing the generator cancels what is in flight; a task ends once it is back in Python code.

    Raises `ValueError` if `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; at least one task must be in flight")
    ray = importlib.import_module("ray")
    waiting = _Lookahead(items)
    in_flight: dict[Any, Item] = {}
    try:
        while True:
            while len(in_flight) < limit and waiting:
                item = waiting.take()
                in_flight[submit(item)] = item
            if not in_flight:
                break
            reference = _next_finished(ray, in_flight)
            yield _outcome(ray, in_flight.pop(reference), reference)
    finally:
        _cancel(ray, in_flight)


def map_actors(
    actors: Sequence[Any], method: str, items: Iterable[Item], *, in_flight_per_actor: int = 2
) -> Iterator[Outcome[Item]]:
    """Calls `method(item)` on a pool of actors, each with at most `in_flight_per_actor` calls, in completion order.

    Two per actor keep it busy while its result is fetched. Restarts and retries after an actor's death are Ray's
    (`max_restarts`, `max_task_retries`); once those are used up, the calls in flight on that actor come out with their
    error, and the others take the rest. Closing the generator cancels what is in flight.

    Raises `ClusterError` if items are left and no actor lives; `ValueError` without actors or below one call each.
    """
    if not actors or in_flight_per_actor < 1:
        raise ValueError(f"{len(actors)} actors with {in_flight_per_actor} calls each; at least one of each is needed")
    ray = importlib.import_module("ray")
    waiting = _Lookahead(items)
    slots = deque(actor for _ in range(in_flight_per_actor) for actor in actors)
    in_flight: dict[Any, tuple[Item, Any]] = {}
    dead: list[Any] = []
    try:
        while True:
            while slots and waiting:
                actor, item = slots.popleft(), waiting.take()
                in_flight[getattr(actor, method).remote(item)] = (item, actor)
            if not in_flight:
                break
            reference = _next_finished(ray, in_flight)
            item, actor = in_flight.pop(reference)
            outcome = _outcome(ray, item, reference)
            if isinstance(outcome.error, ray.exceptions.ActorDiedError):
                logger.warning("an actor died: %s", first_line(outcome.error))
                dead.append(actor)
                slots = deque(free for free in slots if free not in dead)
            elif actor not in dead:
                slots.append(actor)
            yield outcome
        if waiting:
            raise ClusterError(f"all {len(actors)} actors died while work was left; the log says of what")
    finally:
        _cancel(ray, in_flight)


class _Lookahead(Generic[Item]):
    """An iterator that knows whether there is more: true while there is."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self._next: list[Item] = []

    def __bool__(self) -> bool:
        if not self._next:
            self._next.extend(itertools.islice(self._items, 1))
        return bool(self._next)

    def take(self) -> Item:
        """Raises `StopIteration` at the end."""
        return self._next.pop() if self._next else next(self._items)


def _next_finished(ray: Any, in_flight: Mapping[Any, object]) -> Any:
    # Ray's waits end early on a KeyboardInterrupt alone: what else a handler of signals raises (Dagster's, or the
    # SystemExit of Ray's own for SIGTERM) they keep until a task has finished, and raise as a SystemError then.
    with interruptible():
        ready, _ = ray.wait(list(in_flight), num_returns=1, fetch_local=False)
    return ready[0]


def _outcome(ray: Any, item: Item, reference: Any) -> Outcome[Item]:
    try:
        with interruptible():
            return Outcome(item, value=ray.get(reference))
    except ray.exceptions.RayError as error:
        return Outcome(item, error=error)


def _cancel(ray: Any, references: Iterable[Any]) -> None:
    if not ray.is_initialized():
        return
    for reference in references:
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.cancel(reference)
