"""The history of runs: a small record of each in the store, written when it begins and replaced when it ends.

    <store>/recipes/<recipe>/runs/<UTC time>-<id>.json

A run that lives shows a heartbeat; one whose record says that it runs, and that does not live, was killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import psutil

from infra.storage import FileDamaged, StorageError, Store
from pipelines.artifacts import Artifact, Damaged, load, read_sealed, sealed
from pipelines.errors import Interrupted
from pipelines.publishing import iso
from pipelines.workflow.plan import newest

HEARTBEAT_S = 60.0
SILENT_AFTER_S = 300.0
MAX_ERROR_CHARACTERS = 300
RELEASE = "release"

State = Literal["running", "done", "failed", "interrupted", "killed"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeRecord:
    """What a run has of a node. `made` is False where it was up to date."""

    key: str
    revision: str
    made: bool
    duration_s: float


@dataclass(frozen=True)
class RunRecord:
    """One run, as its record says. `state` is "killed" where the record says "running" and nothing runs."""

    id: str
    recipe: str
    overrides: tuple[str, ...]
    until: str | None
    force: tuple[str, ...]
    retry: tuple[str, ...]
    state: State
    error: str | None
    """First line of what went wrong."""
    host: str
    pid: int
    process_started_s: float
    started_s: float
    beat_s: float
    """When it last showed that it lives, or ended."""
    nodes: Mapping[str, NodeRecord] = field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        """Until it ended, or was last seen."""
        return max(0.0, self.beat_s - self.started_s)

    @property
    def made(self) -> tuple[str, ...]:
        """The nodes that were made, in order."""
        return tuple(name for name, node in self.nodes.items() if node.made)

    @property
    def release(self) -> str | None:
        """Revision of the model that it released, or found released."""
        return self.nodes[RELEASE].revision if RELEASE in self.nodes else None

    def to_json(self) -> dict[str, Any]:
        nodes = [{"node": name, **asdict(node)} for name, node in self.nodes.items()]
        return {
            **asdict(self),
            "nodes": nodes,
            "started_at": iso(self.started_s),
            "duration_s": round(self.duration_s, 3),
            "made": list(self.made),
            "release": self.release,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunRecord:
        nodes = {
            node["node"]: NodeRecord(node["key"], node["revision"], node["made"], node["duration_s"])
            for node in value["nodes"]
        }
        if value["state"] not in get_args(State):
            raise ValueError(f"no state of a run: {value['state']}")
        names = ("id", "recipe", "until", "state", "error", "host", "pid", "process_started_s", "started_s", "beat_s")
        known: dict[str, Any] = {name: value[name] for name in names}
        return cls(
            **known,
            overrides=tuple(value["overrides"]),
            force=tuple(value["force"]),
            retry=tuple(value["retry"]),
            nodes=nodes,
        )


class RunRecorder:
    """Writes the record of the run that is going on. Once the run has begun, a store that is away doesn't end it."""

    def __init__(self, store: Store, record: RunRecord) -> None:
        self._store = store
        self._record = record
        self._lock = threading.Lock()
        self._path = record_path(record.recipe, record.id)

    @property
    def record(self) -> RunRecord:
        return self._record

    def have(self, node: str, artifact: Artifact, made: bool, duration_s: float = 0.0) -> None:
        """Note what the run has of a node now, so that what it builds on is kept even if it is killed."""
        known = NodeRecord(artifact.key, artifact.revision, made, round(duration_s, 3))
        self.write(nodes={**self._record.nodes, node: known})

    def write(self, **changes: Any) -> None:
        try:
            with self._lock:
                self._record = replace(self._record, **{"beat_s": time.time(), **changes})
                self._store.publish_bytes(self._path, sealed(self._record.to_json()))
        except StorageError as error:
            logger.warning("the run's record could not be written: %s", error)


@contextlib.contextmanager
def recorded_run(
    store: Store,
    recipe_name: str,
    overrides: Sequence[str],
    until: str | None = None,
    force: Sequence[str] = (),
    retry: Sequence[str] = (),
) -> Iterator[RunRecorder]:
    """The record of the run that is the block: that it runs, then how it ended.

    Raises `StorageError` if the store can't be written when the run begins.
    """
    recorder = _begin(store, recipe_name, overrides, until, force, retry)
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(HEARTBEAT_S):
            recorder.write()

    thread = threading.Thread(target=beat, daemon=True, name="heartbeat of the run's record")
    thread.start()
    ending: dict[str, Any] = {"state": "failed", "error": None}
    try:
        yield recorder
        ending = {"state": "done"}
    except (KeyboardInterrupt, Interrupted):
        ending = {"state": "interrupted"}
        raise
    except BaseException as error:
        ending["error"] = _first_line(error)
        raise
    finally:
        stopped.set()
        thread.join()
        recorder.write(**ending)


def _begin(
    store: Store,
    recipe_name: str,
    overrides: Sequence[str],
    until: str | None,
    force: Sequence[str],
    retry: Sequence[str],
) -> RunRecorder:
    now_s = time.time()
    moment = datetime.fromtimestamp(now_s, UTC).strftime("%Y%m%dT%H%M%S.%fZ")  # runs may follow each other quickly
    record = RunRecord(
        id=f"{moment}-{uuid.uuid4().hex[:8]}",
        recipe=recipe_name,
        overrides=tuple(overrides),
        until=until,
        force=tuple(force),
        retry=tuple(retry),
        state="running",
        error=None,
        host=socket.gethostname(),
        pid=os.getpid(),
        process_started_s=psutil.Process().create_time(),
        started_s=now_s,
        beat_s=now_s,
    )
    store.publish_bytes(record_path(recipe_name, record.id), sealed(record.to_json()))
    return RunRecorder(store, record)


def record_path(recipe_name: str, run_id: str) -> str:
    return f"recipes/{recipe_name}/runs/{run_id}.json"


def run_ids(store: Store, recipe_name: str) -> list[str]:
    """The ids of all runs of the recipe that are on record, the newest last."""
    names = store.listdir(f"recipes/{recipe_name}/runs")
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def read_run(store: Store, recipe_name: str, run_id: str) -> RunRecord:
    """Raises `FileNotFoundError`, `pipelines.artifacts.Damaged`."""
    path = record_path(recipe_name, run_id)
    try:
        record = RunRecord.from_json(read_sealed(store, path, {"id": str, "started_s": float, "beat_s": float}))
    except (LookupError, TypeError, ValueError) as error:
        raise Damaged(f"{store.location(path)} is not what was written") from error
    if record.id != run_id:
        raise Damaged(f"{store.location(path)} is of another run")
    if record.state == "running" and not _lives(record):
        return replace(record, state="killed")
    return record


def newest_runs(store: Store, recipe_name: str) -> Iterator[RunRecord]:
    """Runs of the recipe, the newest first; those whose record is damaged are left out, with a line in the log."""
    for run_id in reversed(run_ids(store, recipe_name)):
        try:
            yield read_run(store, recipe_name, run_id)
        except FileNotFoundError:
            continue
        except (Damaged, FileDamaged) as error:
            logger.warning("a run is left out: %s", error)


def newest_release(store: Store, recipe_name: str) -> Artifact | None:
    """The model that the recipe's newest run with a release has; None if there is none.

    Raises `pipelines.artifacts.ArtifactError` if it is missing or damaged.
    """
    for run in newest_runs(store, recipe_name):
        if run.release is not None:
            return load(store, RELEASE, run.release, run.nodes[RELEASE].key)
    return newest(store, recipe_name, RELEASE)


def _lives(record: RunRecord) -> bool:
    """By its process on this host, by its heartbeat on another one."""
    if record.host == socket.gethostname():
        try:
            return abs(psutil.Process(record.pid).create_time() - record.process_started_s) < 2.0
        except psutil.NoSuchProcess:
            return False
    return time.time() - record.beat_s < SILENT_AFTER_S


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= MAX_ERROR_CHARACTERS else text[: MAX_ERROR_CHARACTERS - 3] + "..."
