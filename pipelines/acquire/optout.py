"""Opt-out signals in response headers: which ones speak to us, and the evidence that is kept.

X-Robots-Tag (noai, noimageai, noindex, noimageindex, noml, none, and an `unavailable_after` that has passed), the TDM
Reservation Protocol's tdm-reservation, AIPREF's Content-Usage, and Content-Signal. Files such as robots.txt are not
read here.
"""

from __future__ import annotations

import datetime
import email.utils
import re
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message

REFUSING_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "noml", "none"})
VALUED_DIRECTIVES = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
REFUSING_USES = frozenset({"train-ai", "train-genai", "ai-train", "bots"})
WEEKDAY = re.compile(r"(mon|tue|wed|thu|fri|sat|sun)[a-z]*", re.IGNORECASE)
MAX_EVIDENCE_CHARS = 200


@dataclass(frozen=True)
class OptOut:
    """`signal` is the header's name in lower case, `evidence` the line as it was sent, `http_status` the answer's."""

    signal: str
    evidence: str
    http_status: int | None = None


def find_opt_out(headers: Message, agent: str, now: datetime.datetime) -> OptOut | None:
    """The first header that refuses the use of what is sent, None if none does.

    `agent` is our product's name, to which per-agent forms ("X-Robots-Tag: otherbot: noai") are held.
    """
    for line in headers.get_all("X-Robots-Tag", []):
        if any(_refuses(directive, now) for directive in robots_directives(line, agent)):
            return _evidence("X-Robots-Tag", line)
    for line in headers.get_all("tdm-reservation", []):
        if line.split(";")[0].strip() == "1":
            return _evidence("tdm-reservation", line)
    for name in ("Content-Usage", "Content-Signal"):
        for line in headers.get_all(name, []):
            if any(_refuses_training(member) for member in line.split(",")):
                return _evidence(name, line)
    return None


def robots_directives(line: str, agent: str) -> list[tuple[str, str]]:
    """(directive, value) of one X-Robots-Tag line that are meant for all agents or for `agent`; value "" if none.

    A name before a colon that is no directive is an agent's, and what follows in the line is for that agent.
    """
    directives = []
    scope = "*"
    for piece in _pieces(line):
        name, colon, value = (part.strip() for part in piece.partition(":"))
        while colon and name.lower() not in VALUED_DIRECTIVES:
            scope = name.lower()
            name, colon, value = (part.strip() for part in value.partition(":"))
        if name and scope in {"*", agent.lower()}:
            directives.append((name.lower(), value))
    return directives


def _pieces(line: str) -> Iterator[str]:
    """The parts between commas, with dates ("Fri, 25 Jun 2027 15:00:00 GMT") left whole."""
    pieces = line.split(",")
    index = 0
    while index < len(pieces):
        piece = pieces[index].strip()
        index += 1
        if index < len(pieces) and WEEKDAY.fullmatch(piece.rpartition(":")[2].strip()):
            piece = f"{piece}, {pieces[index].strip()}"
            index += 1
        yield piece


def _refuses(directive: tuple[str, str], now: datetime.datetime) -> bool:
    name, value = directive
    if name == "unavailable_after":
        until = _parsed_date(value)
        return until is not None and until <= now
    return name in REFUSING_DIRECTIVES


def _refuses_training(member: str) -> bool:
    name, _, value = member.partition("=")
    return name.strip().lower() in REFUSING_USES and value.partition(";")[0].strip().lower() in {"n", "no", "?0"}


def _parsed_date(text: str) -> datetime.datetime | None:
    """RFC 822, RFC 850 or ISO 8601; None for anything else, and UTC where no zone is given."""
    for parse in (datetime.datetime.fromisoformat, email.utils.parsedate_to_datetime):
        try:
            date = parse(text)
        except (TypeError, ValueError):
            continue
        return date if date.tzinfo is not None else date.replace(tzinfo=datetime.UTC)
    return None


def _evidence(name: str, line: str) -> OptOut:
    return OptOut(name.lower(), f"{name}: {line.strip()}"[:MAX_EVIDENCE_CHARS])
