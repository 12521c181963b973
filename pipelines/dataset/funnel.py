"""The account of a run: what became of every URL, from the lists to the samples that were trained on.

Each stage's own sums are held when it publishes; here neighbouring stages are held against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.artifacts import Artifact, CountsMismatch


@dataclass(frozen=True)
class Step:
    """One stage of the funnel: `total` came in, `kept` went on, the others by reason."""

    node: str
    unit: str
    total: int
    kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Funnel:
    """The steps of a run's data, in the order of its nodes."""

    steps: tuple[Step, ...]

    def to_json(self) -> list[dict[str, object]]:
        return [
            {
                "node": step.node,
                "unit": step.unit,
                "total": step.total,
                "kept": step.kept,
                "dropped": dict(step.dropped),
                "failed": dict(step.failed),
            }
            for step in self.steps
        ]


UNITS = {"acquire": "URLs", "select": "pairs", "encode": "samples"}
BEFORE = {"select": "acquire", "encode": "select"}
"""Stage before a stage, whose rows it takes in: those of all its nodes."""


def funnel(artifacts: Mapping[str, Artifact]) -> Funnel:
    """The steps of the data's way, with neighbours compared.

    Raises:
        CountsMismatch: a stage took in another number than the stage before it let go on.
    """
    steps = []
    for name, artifact in artifacts.items():
        unit = UNITS.get(name.partition(".")[0])
        if unit is None:
            continue
        counts = artifact.counts
        counts.check(name)
        steps.append(Step(name, unit, counts.total, counts.kept, counts.dropped, counts.failed))
    by_name = {step.node: step for step in steps}
    for step in steps:
        before = BEFORE.get(step.node.partition(".")[0])
        kept = [each.kept for each in steps if each.node.partition(".")[0] == before]
        if kept and sum(kept) != step.total:
            raise CountsMismatch(
                f"{before} let {sum(kept)} {step.unit} go on, but {step.node} took in {step.total};"
                " this is a defect, please report it"
            )
    for name, artifact in artifacts.items():
        source = by_name.get(f"encode.{name.partition('.')[2]}")
        if name.startswith("train.") and source is not None:
            _check_training(name, artifact, artifacts[source.node])
    return Funnel(tuple(steps))


def _check_training(name: str, trained: Artifact, encoded: Artifact) -> None:
    in_train_split = sum(int(unit.info.get("train", 0)) for unit in encoded.units)
    if trained.counts.total != in_train_split:
        raise CountsMismatch(
            f"{encoded.stage} holds {in_train_split} samples of the train split, but {name} trained on"
            f" {trained.counts.total}; this is a defect, please report it"
        )
