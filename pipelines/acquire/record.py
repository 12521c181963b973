"""What a unit's record says of how it was made, beside its counts: by it later runs know which rows still hold, and
which could be had now.

`made_with` decides whether a unit's rows can be taken over at all, and holds the limits that its rows were held to.
`manners` are those under which rows failed: what was the fault of a manner may end with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.artifacts import Unit, digest
from pipelines.dataset.ledger import ErrorClass, Outcome, Reason
from pipelines.recipe import AcquireSpec, Fetch

STAGE = "acquire"
MADE_WITH, MANNERS, TAKEN_OVER = "made_with", "manners", "taken_over"
"""Names in a unit's `info`."""
MANNER_DIGITS = 8
FETCH_MANNERS = ("allow_hosts", "attempts", "contact", "max_redirects", "timeout_s", "user_agent")
"""Fields of `acquire.fetch` that may decide whether a URL can be had."""
LIMITS = {
    "fetch": frozenset({"max_bytes", "max_pixels", "opt_out"}),
    "filter": frozenset({"min_side_px", "max_aspect", "min_caption_chars"}),
}
"""Fields of `acquire.fetch` and `acquire.filter` that `reuse` holds rows against, by what the rows say. Rows that were
made under another value of any other content are not taken over."""
FAULT_COLUMNS = ("outcome", "reason", "error_class", "manners")
"""What `faults` looks at."""


def made_with(spec: AcquireSpec, world: str | None, format_version: int) -> dict[str, Any]:
    """`world` says what images are behind the URLs, where that is known beforehand."""
    blocks = {"fetch": spec.fetch, "filter": spec.filter}
    beside = {key: content for key, block in blocks.items() if (content := block.content(exclude=LIMITS[key]))}
    return {
        "format": format_version,
        "world": world,
        "image": spec.image.content(),
        "limits": {name: getattr(block, name) for key, block in blocks.items() for name in sorted(LIMITS[key])},
        **({"beside": beside} if beside else {}),
    }


def fits(unit: Unit, asked: Mapping[str, Any]) -> bool:
    """Whether the unit's images are as those that are made with `asked` would be."""
    known = unit.info.get(MADE_WITH) or {}
    alike = all(name in known and known[name] == asked[name] for name in ("format", "world", "image"))
    return alike and known.get("beside") == asked.get("beside")


def limits_of(unit: Unit) -> Mapping[str, Any]:
    limits: Mapping[str, Any] = unit.info[MADE_WITH]["limits"]
    return limits


def manners_of(fetch: Fetch) -> dict[str, Any]:
    settings = fetch.model_dump(mode="json", include=set(FETCH_MANNERS))
    return settings | {"allow_hosts": sorted(settings["allow_hosts"])}


def manners_id(manners: Mapping[str, Any]) -> str:
    """8 hexadecimal digits, as ledgers name them."""
    return digest(dict(manners))[:MANNER_DIGITS]


def faults(rows: Iterable[Mapping[str, Any]], manners: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`info["manners"]`: for each id, its settings, and by reason how many rows failed under them, and how many of
    those for a time only."""
    found: dict[str, Any] = {}
    for row in rows:
        name, reason = row["manners"], row["reason"]
        if name not in manners or (row["outcome"] != Outcome.FAILED and reason != Reason.ADDRESS_NOT_ALLOWED):
            continue
        entry = found.setdefault(name, {"settings": dict(manners[name]), "reasons": {}, "transient": {}})
        for kind in ("reasons", *(["transient"] if row["error_class"] == ErrorClass.TRANSIENT else [])):
            entry[kind][str(reason)] = entry[kind].get(str(reason), 0) + 1
    return found


def manners_known(unit: Unit) -> dict[str, Mapping[str, Any]]:
    """Settings by id, of those under which rows of the unit failed."""
    return {name: entry["settings"] for name, entry in unit.info.get(MANNERS, {}).items()}


def transient(unit: Unit) -> dict[str, int]:
    """Rows that failed for a time only, by reason."""
    found: dict[str, int] = {}
    for entry in unit.info.get(MANNERS, {}).values():
        for reason, number in entry["transient"].items():
            found[reason] = found.get(reason, 0) + number
    return found
