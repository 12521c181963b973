from __future__ import annotations

import datetime
from email.message import Message

import pytest

from pipelines.acquire.optout import find_opt_out, robots_directives

NOW = datetime.datetime(2026, 11, 20, tzinfo=datetime.UTC)


def headers(*lines: str) -> Message:
    message = Message()
    for line in lines:
        name, _, value = line.partition(": ")
        message[name] = value
    return message


@pytest.mark.parametrize(
    "line",
    [
        "X-Robots-Tag: noai",
        "X-Robots-Tag: noimageai",
        "x-robots-tag: NOINDEX, nofollow",
        "X-Robots-Tag: noarchive, noimageindex",
        "X-Robots-Tag: noml",
        "X-Robots-Tag: none",
        "X-Robots-Tag: latentworks: noai",
        "X-Robots-Tag: googlebot: nofollow, LatentWorks: noindex",
        "X-Robots-Tag: *: noai",
        "X-Robots-Tag: unavailable_after: Fri, 25 Jun 2027 15:00:00 GMT, noai",
        "X-Robots-Tag: unavailable_after: 25 Jun 2027 15:00:00 GMT, noai",
        "X-Robots-Tag: unavailable_after: 25 Jun 2010 15:00:00 PST",
        "X-Robots-Tag: unavailable_after: 2020-01-01",
        "X-Robots-Tag: unavailable_after: Friday, 25-Jun-10 15:00:00 UTC",
        "X-Robots-Tag: max-snippet: 20, noai",
        "tdm-reservation: 1",
        "TDM-Reservation: 1 ",
        "Content-Usage: train-ai=n",
        "Content-Usage: search=y, train-ai=n",
        "Content-Usage: bots=n",
        "Content-Signal: search=yes, ai-train=no",
        "Content-Signal: ai-train = NO",
    ],
)
def test_signals_that_refuse(line: str) -> None:
    found = find_opt_out(headers("Content-Type: image/png", line), "latentworks", NOW)
    assert found is not None
    assert found.signal == line.partition(":")[0].lower()
    assert found.evidence.lower().startswith(line.strip().lower()[:30])


@pytest.mark.parametrize(
    "line",
    [
        "X-Robots-Tag: all",
        "X-Robots-Tag: nofollow, noarchive",
        "X-Robots-Tag: googlebot: noai, noindex",
        "X-Robots-Tag: otherbot: noindex, nofollow",
        "X-Robots-Tag: latentworks: nofollow, otherbot: noai",
        "X-Robots-Tag: unavailable_after: Fri, 25 Jun 2027 15:00:00 GMT",
        "X-Robots-Tag: unavailable_after: whenever",
        "X-Robots-Tag: max-image-preview: none",
        "X-Robots-Tag: ",
        "tdm-reservation: 0",
        "Content-Usage: train-ai=y",
        "Content-Usage: search=n",
        "Content-Signal: search=no, ai-train=yes",
        "Content-Type: image/noai",
    ],
)
def test_signals_that_do_not(line: str) -> None:
    assert find_opt_out(headers(line), "latentworks", NOW) is None


def test_any_of_several_lines_refuses() -> None:
    found = find_opt_out(headers("X-Robots-Tag: otherbot: noai", "X-Robots-Tag: noml"), "latentworks", NOW)
    assert found is not None
    assert found.evidence == "X-Robots-Tag: noml"


def test_directives_keep_dates_whole() -> None:
    assert robots_directives("unavailable_after: Fri, 25 Jun 2027 15:00:00 GMT, noai", "x") == [
        ("unavailable_after", "Fri, 25 Jun 2027 15:00:00 GMT"),
        ("noai", ""),
    ]
