"""The workflow: a recipe's graph run as Dagster assets, each a thin view over a stage.

Manifests are the truth; Dagster orders the nodes and keeps their history. An up-to-date recipe starts nothing at all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.cluster import ClusterSpec, cluster
from infra.locks import check_free
from infra.logs import StateDirError
from infra.signals import interruptible
from infra.storage import Store
from infra.tracking import MIGRATIONS, RunHandle, Status, Tracker, TrackingSpec
from pipelines.acquire.retry import asked_rows
from pipelines.again import ask_again
from pipelines.artifacts import Artifact, ArtifactError, find
from pipelines.dataset.acquired import is_acquired
from pipelines.errors import Interrupted, UsageError
from pipelines.recipe import Execution, Recipe
from pipelines.reporting import Report, Scalar
from pipelines.results import NodeResult, Row, RunResult
from pipelines.terminal.live import NodeReport, TerminalReport
from pipelines.workflow.dagster import asset_key, dagster_instance, is_of_disk
from pipelines.workflow.graph import build_graph, selected, wanted_nodes
from pipelines.workflow.node import Node
from pipelines.workflow.plan import Demand, plan, remember
from pipelines.workflow.tracked import tell_figures, tell_made

if TYPE_CHECKING:
    import dagster

Have = Callable[[str, Artifact, bool, float], None]

FAREWELL_S: Mapping[Status, float] = {"FINISHED": 10.0, "FAILED": 10.0, "KILLED": 1.0}
"""How long MLflow may take for what is left, by how a run ends."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A run to be: its nodes, and how each stands. `demands` are what is to be made again, by node."""

    recipe: Recipe
    nodes: Mapping[str, Node]
    store: Store
    rows: list[Row]
    demands: Mapping[str, Demand]


def prepare(recipe: Recipe, until: str | None, force: Sequence[str] = (), retry: Sequence[str] = ()) -> Prepared:
    """What a run would do; nothing is written. `retry` are reasons for which rows of `acquire` failed.

    Raises `UnknownNode`, and the errors of what the recipe names, such as a missing list.
    """
    nodes, store = selected(build_graph(recipe), until), Store(recipe.store)
    demands = _retries(nodes, store, retry) if retry else {}
    demands |= {name: Demand("force") for wanted in force for name in wanted_nodes(nodes, wanted)}
    return Prepared(recipe, nodes, store, plan(nodes, store, recipe.name, demands), demands)


def _retries(nodes: Mapping[str, Node], store: Store, reasons: Sequence[str]) -> dict[str, Demand]:
    """Of each node of `acquire` with rows that failed for one of the reasons, or not made yet.

    Raises `UsageError` if there is none.
    """
    demands: dict[str, Demand] = {}
    outcomes: dict[str, int] = {}
    for name, node in nodes.items():
        if is_acquired(name):
            artifact = find(store, name, node.key({}))
            num_rows = None if artifact is None else sum(asked_rows(unit, reasons) for unit in artifact.units)
            if num_rows is None or num_rows:
                demands[name] = Demand("retry", tuple(reasons), num_rows)
            elif artifact is not None:
                outcomes |= {**artifact.counts.dropped, **artifact.counts.failed}
    if not demands:
        told = ", ".join(outcomes) or "nothing"
        raise UsageError(f"--retry {','.join(reasons)}: no row failed so; what was dropped or failed: {told}")
    return demands


def claim(prepared: Prepared) -> Prepared:
    """Make sure of what a run needs before much is started, and note in the store what is to be made again, so that a
    run that dies goes on with it.

    Left are the demands of nodes whose inputs are still to be made: their keys are known when it is their turn.

    Raises:
        infra.locks.Locked: another run is making what is to do first; the message names its owner.
        infra.storage.StoreUnwritable: nothing can be published.
    """
    store, left = prepared.store, dict(prepared.demands)
    store.check_writable()
    for row in prepared.rows:
        if row.state == "to do":
            check_free(store, f"{row.node}/{row.key}")
    for row in prepared.rows:
        if row.node in left and row.key is not None:
            demand = left.pop(row.node)
            ask_again(store, row.node, row.key, demand.why, demand.reasons)
    return replace(prepared, demands=left)


def up_to_date(rows: Sequence[Row]) -> RunResult | None:
    """The result from manifests alone, if nothing is to do."""
    result = RunResult()
    for row in rows:
        if row.artifact is None:
            return None
        result.nodes[row.node] = NodeResult(row.artifact, made=False, duration_s=0.0)
    return result


def run(prepared: Prepared, terminal: TerminalReport, have: Have) -> RunResult:
    """Bring the nodes of a claimed run up to date. `have` is told of each node at once: its artifact, whether it was
    made, and in how many seconds.

    Raises the error of the stage that failed, after the runs are closed; `Interrupted` on Ctrl-C and SIGTERM.
    """
    started_s = time.monotonic()
    recipe, execution = prepared.recipe, prepared.recipe.execution
    state_dir = Path(recipe.state_dir).resolve()
    result = RunResult()
    spec = TrackingSpec(uri=execution.tracking_uri, experiment=recipe.name, state_dir=state_dir)
    where = "starting Ray on this machine" if execution.cluster == "local" else f"joining Ray at {execution.cluster}"
    with contextlib.ExitStack() as stack:
        parent = stack.enter_context(tracked_run(spec, recipe))
        on_cluster = any(prepared.nodes[row.node].needs_cluster for row in prepared.rows if row.artifact is None)
        if on_cluster:
            with terminal.doing(where):
                stack.enter_context(cluster(_cluster_spec(execution)))
        result.tracking_uri = spec.resolved_uri
        # Until the first node begins, Dagster makes its databases, at the same time as MLflow's thread.
        migrating = stack.enter_context(contextlib.ExitStack())
        migrating.enter_context(MIGRATIONS)
        _materialize(_Runner(prepared, terminal, have, parent, result, migrating.close, on_cluster), state_dir)
    result.duration_s = time.monotonic() - started_s
    return result


@contextlib.contextmanager
def tracked_run(spec: TrackingSpec, recipe: Recipe) -> Iterator[RunHandle]:
    """An MLflow parent run for the block, finished with its outcome. Who interrupts a run doesn't wait for MLflow: the
    next run sends what is left."""
    # Whole, before there are threads: MLflow's imports it while Dagster uses it, and would leave it half there.
    import sqlalchemy.orm  # noqa: F401

    tracker = Tracker(spec)
    handle = tracker.start_run(recipe.name, {"recipe": recipe.name})
    status: Status = "FAILED"
    try:
        handle.params(_flattened({"recipe": recipe.model_dump(mode="json", exclude={"execution"})}))
        yield handle
        status = "FINISHED"
    except (KeyboardInterrupt, Interrupted):
        status = "KILLED"
        raise
    finally:
        timeout_s = FAREWELL_S[status]
        handle.finish(status, timeout_s)
        tracker.close(timeout_s)


@dataclass
class _Runner:
    """Runs one node after another, remembering what each published."""

    prepared: Prepared
    terminal: TerminalReport
    have: Have
    parent: RunHandle
    result: RunResult
    before_first: Callable[[], None]
    on_cluster: bool
    error: BaseException | None = None

    @property
    def recipe(self) -> Recipe:
        return self.prepared.recipe

    @property
    def store(self) -> Store:
        return self.prepared.store

    def __call__(self, node: Node) -> NodeResult:
        self.before_first()
        inputs = {name: self.result.nodes[name].artifact for name in node.inputs}
        started_s = time.monotonic()
        key = node.key(inputs)
        demand = self.prepared.demands.get(node.name)
        if demand is not None:
            ask_again(self.store, node.name, key, demand.why, demand.reasons)
        found = find(self.store, node.name, key)
        if found is not None:
            outcome = NodeResult(found, made=False, duration_s=0.0)
        else:
            artifact = self._run(node, inputs)
            outcome = NodeResult(artifact, made=True, duration_s=time.monotonic() - started_s)
        self.have(node.name, outcome.artifact, outcome.made, outcome.duration_s)
        remember(self.store, self.recipe.name, node.name, outcome.artifact)
        self.result.nodes[node.name] = outcome
        tell_figures(self.parent, node.name, outcome.artifact)
        return outcome

    def _run(self, node: Node, inputs: Mapping[str, Artifact]) -> Artifact:
        if node.needs_cluster and not self.on_cluster:  # Ray would start one of its own, open to all
            raise ArtifactError(
                f"{node.name} was up to date when this run began, and is not now: somebody asked for it again, or"
                " deleted it; run the same command again"
            )
        handle = self.parent.child(node.name, {"node": node.name, "recipe": self.recipe.name})
        status: Status = "FAILED"
        try:
            with self.terminal.node(node.name):
                report: Report = NodeReport(self.terminal, handle)
                report.params(_flattened(node.identity.settings) | _flattened({"execution": self._execution()}))
                artifact = node.run(inputs, self.store, report, self.recipe.execution)
                report.params({"revision": artifact.revision, "location": self.store.location(artifact.path)})
                report.metrics(_counts(artifact))
                tell_made(handle, node, self.prepared.nodes, {**self.result.artifacts, node.name: artifact})
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            handle.finish(status)
        return artifact

    def _execution(self) -> dict[str, Any]:
        return self.recipe.execution.model_dump(mode="json")


def _materialize(runner: _Runner, state_dir: Path) -> None:
    import dagster as dg

    home = state_dir / "dagster"
    os.environ["DAGSTER_HOME"] = str(home)
    with dagster_instance(home) as instance:
        assets = [_asset(node, runner) for node in runner.prepared.nodes.values()]
        try:
            dg.materialize(assets, instance=instance, tags={"recipe": runner.recipe.name})
        except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError) as error:
            raise Interrupted from error
        except Exception as error:  # the stage's own error, wrapped or not, is what counts
            if isinstance(runner.error, KeyboardInterrupt):
                raise Interrupted from error
            raise runner.error or (StateDirError.of(home, error) if is_of_disk(error) else error) from None


def _asset(node: Node, runner: _Runner) -> dagster.AssetsDefinition:
    import dagster as dg

    @dg.asset(  # type: ignore[untyped-decorator]
        key=asset_key(node.name),
        deps=[asset_key(name) for name in node.inputs],
        group_name=node.stage,
        description=f"Node `{node.name}` of recipe `{runner.recipe.name}`.",
    )
    def compute() -> Any:
        try:
            with interruptible():  # Dagster has put handlers of its own in place, whose exception Ray's waits keep
                outcome = runner(node)
        except BaseException as error:
            runner.error = error
            raise
        artifact = outcome.artifact
        return dg.MaterializeResult(
            metadata={
                "revision": artifact.revision,
                "location": runner.store.location(artifact.path),
                "made": outcome.made,
                "counts": dg.MetadataValue.json(artifact.counts.to_json()),
            }
        )

    return compute


def _cluster_spec(execution: Execution) -> ClusterSpec:
    return ClusterSpec(address=execution.cluster, num_cpus=execution.cpus)


def _counts(artifact: Artifact) -> dict[str, float]:
    counts = artifact.counts
    rows = {"counts/total": counts.total, "counts/kept": counts.kept}
    rows |= {f"counts/dropped/{reason}": count for reason, count in counts.dropped.items()}
    rows |= {f"counts/failed/{reason}": count for reason, count in counts.failed.items()}
    return {name: float(count) for name, count in rows.items()}


def _flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Nested settings by dotted name; lists as text."""
    flat: dict[str, Scalar] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str | int | float | bool | None) else str(value)
    return flat
