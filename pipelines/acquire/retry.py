"""Rows asked for again: which ones can be named, which ones could be had now, and how a run is told.

A row that failed, or was refused for an address, stays as it is until a person asks for it again, however often its
list grows: what is asked again is written in the store (`pipelines.again.ask_again`), and done by the next run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.acquire.record import MANNERS, manners_of, transient
from pipelines.acquire.reuse import FAILED, TRANSIENT
from pipelines.artifacts import Unit
from pipelines.dataset.ledger import UNASKED, Reason
from pipelines.errors import UsageError
from pipelines.recipe import AcquireSpec


def reasons_of(text: str) -> tuple[str, ...]:
    """What `--retry` names, comma-separated: reasons, `transient` (rows that failed for a time), `failed` (all failed).

    Sorted, each once. Raises `UsageError` for anything else.
    """
    wanted = {part.strip() for part in text.split(",")} - {""}
    known = [TRANSIENT, FAILED, *(str(reason) for reason in Reason if reason not in UNASKED)]
    unknown = sorted(wanted - set(known))
    if unknown or not wanted:
        what = ", ".join(map(repr, unknown)) or "nothing"
        raise UsageError(f"--retry: {what} can't be asked for again; give some of {', '.join(known)}")
    return tuple(sorted(wanted))


def asked_rows(unit: Unit, reasons: Sequence[str]) -> int:
    """How many of the unit's rows are asked for again. From its record alone."""
    for_a_time = transient(unit) if TRANSIENT in reasons else {}
    total = 0
    for counts, is_failed in ((unit.counts.dropped, False), (unit.counts.failed, True)):
        for reason, number in counts.items():
            named = reason in reasons or (is_failed and FAILED in reasons)
            total += number if named else for_a_time.get(reason, 0)
    return total


def curable(units: Iterable[Unit], spec: AcquireSpec) -> dict[str, int]:
    """Rows by reason that could not be had under manners which have changed since in a way that may help.

    For `--retry REASON,...`. From the units' records alone. A host added to `allow_hosts` may help addresses that were
    not allowed, a longer `timeout_s` timeouts, more `attempts` what failed for a time, more `max_redirects` too many
    redirects, another `user_agent` or `contact` what was forbidden or throttled.
    """
    found: dict[str, int] = {}
    today = manners_of(spec.fetch)
    for unit in units:
        for entry in unit.info.get(MANNERS, {}).values():
            helped = _helped(entry["settings"], today)
            for reason, number in entry["reasons"].items():
                for_a_time = entry["transient"].get(reason, 0) if TRANSIENT in helped else 0
                count = number if reason in helped else for_a_time
                if count:
                    found[reason] = found.get(reason, 0) + count
    return dict(sorted(found.items()))


def _helped(then: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Reasons (and `transient`) that may be none under the manners of now."""
    agent_changed = any(then[name] != now[name] for name in ("user_agent", "contact"))
    changes = {
        Reason.ADDRESS_NOT_ALLOWED: bool(set(now["allow_hosts"]) - set(then["allow_hosts"])),
        Reason.TIMEOUT: now["timeout_s"] > then["timeout_s"],
        TRANSIENT: now["attempts"] > then["attempts"],
        Reason.TOO_MANY_REDIRECTS: now["max_redirects"] > then["max_redirects"],
        Reason.FORBIDDEN: agent_changed,
        Reason.THROTTLED: agent_changed,
    }
    return {str(reason) for reason, helps in changes.items() if helps}


def remedy(units: Sequence[Unit], spec: AcquireSpec) -> str:
    """What a person can do about rows that could not be had, as the end of a message; empty if nothing is known."""
    helped = curable(units, spec)
    if helped:
        return (
            "; settings that may help have changed since: ask for them again with `ldm acquire RECIPE --retry"
            f" {','.join(helped)}`"
        )
    if any(Reason.ADDRESS_NOT_ALLOWED in unit.counts.dropped for unit in units):
        return (
            "; addresses that are not public are refused: name such hosts of your own in acquire.fetch.allow_hosts"
            " (host:port), and ask for them again with `ldm acquire RECIPE --retry address_not_allowed`"
        )
    if any(transient(unit) for unit in units):
        return "; some failed for a time only: ask for them again with `ldm acquire RECIPE --retry transient`"
    return ""
