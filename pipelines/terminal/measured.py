"""What `evaluate` measured, for people: each figure beside what it is to be held against. Shows what there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.dataset.figures import distance_names, is_number
from pipelines.terminal.words import number

KINDS = {"kid": "KID", "fd": "FD"}
VIEWS = {"clip": "by the judge", "features": "by image features"}
SIDES = {"seen": "for seen captions", "held_out": "for held-out ones", "untrained": "untrained"}


@dataclass(frozen=True)
class Distance:
    """A distance from real images. `floor` is that of other real images, `untrained` that of the network before
    training, `closed` how much of the way between them is gone: 1 is all of it."""

    name: str
    extractor: str
    value: float
    error: float | None
    floor: float | None
    untrained: float | None
    closed: float | None

    @property
    def figure(self) -> str:
        """ "0.041 ± 0.002"."""
        return number(self.value) + (f" ± {number(self.error)}" if self.error is not None else "")

    @property
    def closed_percent(self) -> str:
        """ "87 %"; empty where it isn't known."""
        return "" if self.closed is None else f"{round(100 * self.closed)} %"

    @property
    def sentence(self) -> str:
        """ "KID 0.041 ± 0.002 (untrained 0.31, floor 0.002; 87 % closed)"."""
        beside = {"untrained": self.untrained, "floor": self.floor}
        words = ", ".join(f"{name} {number(value)}" for name, value in beside.items() if value is not None)
        closed = f"{self.closed_percent} closed" if self.closed is not None else ""
        told = "; ".join(filter(None, (words, closed)))
        return f"{self.name} {self.figure}" + (f" ({told})" if told else "")


def distances(info: Mapping[str, Any]) -> list[Distance]:
    """The distances among a unit's figures: KID, then FD."""
    metrics = {name: float(value) for name, value in info.items() if is_number(value)}
    found = []
    for kind, words in KINDS.items():
        for name in distance_names(metrics, kind):
            extractor = name.removeprefix(f"{kind}_")
            error, floor, untrained = (
                metrics.get(f"{kind}_{of}_{extractor}") for of in ("error", "floor", "untrained")
            )
            closed = metrics.get(f"{kind}_closed")
            found.append(Distance(words, extractor, metrics[name], error, floor, untrained, closed))
    return found


def sentences(info: Mapping[str, Any]) -> list[str]:
    """All figures in words, one line each."""
    return [*(distance.sentence for distance in distances(info)), *_clip_score(info), *_faithfulness(info)]


def _clip_score(info: Mapping[str, Any]) -> list[str]:
    if "clip_score" not in info:
        return []
    beside = {"untrained": info.get("clip_score_untrained"), "real images": info.get("clip_score_real")}
    told = ", ".join(f"{name} {number(value)}" for name, value in beside.items() if value is not None)
    return [f"CLIP score {number(info['clip_score'])}" + (f" ({told})" if told else "")]


def _faithfulness(info: Mapping[str, Any]) -> list[str]:
    """How many standard errors a picture is more like its own prompt than like others: about 0 if it knows nothing."""
    lines = []
    for view, words in VIEWS.items():
        known = {side: info.get(f"z_{view}_{side}") for side in SIDES}
        told = ", ".join(f"{z:.1f} {SIDES[side]}" for side, z in known.items() if z is not None)
        if told:
            lines.append(f"prompt faithfulness, {words}: z {told}")
    return lines
