"""Where the images of a source's rows are read from, by the worker that makes a shard of them: the web, if nothing else
is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines.acquire.fetch import Fetcher, FetchResult
from pipelines.acquire.rows import Row
from pipelines.recipe import Fetch


class Reader(Protocol):
    """Gets the images of one shard. Safe to use from many threads."""

    def fetch(self, url: str) -> FetchResult:
        """What became of a row's `url`. Never raises for what lies there: that is said by the result."""
        ...

    def check_unchanged(self) -> None:
        """Raises `ShardFailed` if something read wasn't what the shard's key says; called at the end."""
        ...


class Origin(Protocol):
    """Makes readers. It is sent to workers, and so is small and can be pickled."""

    @property
    def is_web(self) -> bool:
        """Whether what can be had hangs on manners: `acquire.fetch`'s timeouts, attempts, agent."""
        ...

    def reader(self, rows: Sequence[Row], rules: Fetch, sleep: Callable[[float], Any]) -> Reader:
        """A reader for `rows` of a shard, with all of their columns. `sleep` ends early if the work is stopped."""
        ...


@dataclass(frozen=True)
class Web:
    """The web, over HTTP."""

    is_web: bool = True

    def reader(self, rows: Sequence[Row], rules: Fetch, sleep: Callable[[float], Any]) -> Reader:  # noqa: ARG002
        """A fetcher, whatever the rows are."""
        return Fetcher(rules, sleep=sleep)


WEB = Web()
