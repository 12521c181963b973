"""Many small files, read a few at a time: a remote store answers each request late, but many at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

REQUESTS_AT_ONCE = 16
AHEAD = 64

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What `work` makes of each item, in their order; a few threads are at most `AHEAD` items ahead of who takes them.

    An error is raised where its item's result would come.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
        try:
            for item in items:
                waiting.append(threads.submit(work, item))
                if len(waiting) == AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
