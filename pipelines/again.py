"""What is to be made again, and where what was made anew is found.

A unit's *base key* is a hash of what it is made from. A unit that was made anew, by `--force` or because rows of it
were asked for again, has a key of its own, and `<stage>/renewed/<base key>.json` leads from the one to the other, so
that every later run finds the newer one. What is to be made again is a marker in the store until it is done: a run that
dies goes on with it.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from infra.storage import Store
from pipelines.artifacts import REMEDY, Damaged, again_path, read_sealed, sealed

AGAIN = {"why": str, "salt": str, "reasons": list}
Why = Literal["force", "retry", "repair"]
WEIGHT: Mapping[Why, int] = {"repair": 0, "retry": 1, "force": 2}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Again:
    """What is to be made again. `force`: everything, from nothing; `retry`: rows with these `reasons`; `repair`: the
    units that are gone. `salt` is in the keys of units that are made anew."""

    why: Why
    salt: str
    reasons: tuple[str, ...] = ()


def ask_again(store: Store, stage: str, key: str, why: Why, reasons: Sequence[str] = ()) -> None:
    """Have `key` made again by the next run that needs it; the old revision stays what it is.

    What was asked for and did not finish goes on: asking the same again doesn't start it over, and asking for less
    takes nothing back. `force` makes everything, `retry` also the units that are gone; reasons add up, and none given
    are all of them.
    """
    known = asked_again(store, stage, key)
    wanted = tuple(sorted(set(reasons)))
    if known is not None:
        if known.why == "retry" and why == "retry":
            wanted = tuple(sorted({*known.reasons, *wanted})) if known.reasons and wanted else ()
        if WEIGHT[known.why] > WEIGHT[why] or (known.why, known.reasons) == (why, wanted):
            return
    value = {"why": why, "salt": uuid.uuid4().hex, "reasons": list(wanted)}
    store.publish_bytes(again_path(stage, key), sealed(value))


def asked_again(store: Store, stage: str, key: str) -> Again | None:
    """What of `key` is to be made again, if anything.

    Where it can't be read any more, the least: what is missing.
    """
    try:
        value = read_sealed(store, again_path(stage, key), AGAIN)
    except FileNotFoundError:
        return None
    except Damaged as error:
        logger.warning("%s; what is missing is made. Ask again with --force or --retry if it was for more", error)
        return Again("repair", "")
    return Again(value["why"], value["salt"], tuple(value["reasons"]))


def renewed_path(stage: str, base_key: str) -> str:
    return f"{stage}/renewed/{base_key}.json"


def renewed(base_key: str, unit_key: str) -> bytes:
    """What leads from the base key to the unit that was made anew for it."""
    return sealed({"base": base_key, "unit": unit_key})


def read_renewed(store: Store, stage: str, base_key: str) -> str:
    """Key of the unit that was last made anew for the base key. Raises `FileNotFoundError`, `Damaged`."""
    path = renewed_path(stage, base_key)
    value = read_sealed(store, path, {"unit": str})
    if value.get("base", base_key) != base_key:  # older ones don't say
        raise Damaged(f"{store.location(path)} is of {value['base']}; {REMEDY}")
    return str(value["unit"])
