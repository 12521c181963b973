"""The workflow: a recipe's graph run as Dagster assets, each a thin view over a stage.

Manifests are the truth; Dagster orders the nodes and keeps their history. An up-to-date recipe starts nothing at all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.cluster import ClusterSpec, cluster
from infra.logs import StateDirError
from infra.storage import Store
from infra.tracking import MIGRATIONS, RunHandle, Status, Tracker, TrackingSpec
from pipelines.artifacts import Artifact, find
from pipelines.building import ask_again
from pipelines.errors import Interrupted
from pipelines.recipe import Execution, Recipe
from pipelines.reporting import Report, Scalar
from pipelines.results import NodeResult, Row, RunResult
from pipelines.terminal.live import NodeReport, TerminalReport
from pipelines.workflow.dagster import asset_key, dagster_instance, is_of_disk
from pipelines.workflow.graph import Node, build_graph, selected
from pipelines.workflow.plan import plan, remember

if TYPE_CHECKING:
    import dagster

logger = logging.getLogger(__name__)


def prepare(recipe: Recipe, until: str | None, force: tuple[str, ...]) -> tuple[dict[str, Node], Store, list[Row]]:
    """The nodes of a run, its store, and the plan, with the rebuilds of `force` asked for.

    Raises `UnknownNode` and the source's errors.
    """
    nodes = selected(build_graph(recipe), until)
    store = Store(recipe.store)
    rows = plan(nodes, store, recipe.name)
    forced = {name for wanted in force for name in selected(nodes, wanted) if wanted in {name, nodes[name].stage}}
    if forced:
        for row in rows:
            if row.node in forced and row.key is not None:
                ask_again(store, row.node, row.key, "force")
        rows = plan(nodes, store, recipe.name)
    return nodes, store, rows


def up_to_date(rows: list[Row]) -> RunResult | None:
    """The result from manifests alone, if nothing is to do."""
    result = RunResult()
    for row in rows:
        if row.artifact is None:
            return None
        result.nodes[row.node] = NodeResult(row.artifact, made=False, duration_s=0.0)
    return result


def run(recipe: Recipe, nodes: Mapping[str, Node], store: Store, terminal: TerminalReport) -> RunResult:
    """Bring the nodes up to date.

    Raises the error of the stage that failed, after the runs are closed; `Interrupted` on Ctrl-C.
    """
    started_s = time.monotonic()
    state_dir = Path(recipe.state_dir).resolve()
    execution = recipe.execution
    store.check_writable()
    result = RunResult()
    spec = TrackingSpec(uri=execution.tracking_uri, experiment=recipe.name, state_dir=state_dir)
    terminal.note(
        "starting Ray on this machine" if execution.cluster == "local" else f"joining Ray at {execution.cluster}"
    )
    with tracked_run(spec, recipe) as parent, cluster(_cluster_spec(execution)):
        result.tracking_uri = spec.resolved_uri
        with contextlib.ExitStack() as migrating:
            # Until the first node begins, Dagster makes its databases, at the same time as MLflow's thread.
            migrating.enter_context(MIGRATIONS)
            _materialize(nodes, _Runner(recipe, store, terminal, parent, result, migrating.close), state_dir)
    result.duration_s = time.monotonic() - started_s
    return result


@contextlib.contextmanager
def tracked_run(spec: TrackingSpec, recipe: Recipe) -> Iterator[RunHandle]:
    """An MLflow parent run for the block, finished with its outcome."""
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
        handle.finish(status)
        tracker.close()


@dataclass
class _Runner:
    """Runs one node after another, remembering what each published."""

    recipe: Recipe
    store: Store
    terminal: TerminalReport
    parent: RunHandle
    result: RunResult
    before_first: Callable[[], None]
    error: BaseException | None = None

    def __call__(self, node: Node) -> NodeResult:
        self.before_first()
        inputs = {name: self.result.nodes[name].artifact for name in node.inputs}
        started_s = time.monotonic()
        found = find(self.store, node.name, node.key(inputs))
        if found is not None:
            outcome = NodeResult(found, made=False, duration_s=0.0)
        else:
            artifact = self._run(node, inputs)
            outcome = NodeResult(artifact, made=True, duration_s=time.monotonic() - started_s)
        remember(self.store, self.recipe.name, node.name, outcome.artifact)
        self.result.nodes[node.name] = outcome
        return outcome

    def _run(self, node: Node, inputs: Mapping[str, Artifact]) -> Artifact:
        handle = self.parent.child(node.name, {"node": node.name, "recipe": self.recipe.name})
        status: Status = "FAILED"
        try:
            with self.terminal.node(node.name):
                report: Report = NodeReport(self.terminal, handle)
                report.params(_flattened(node.identity.settings) | _flattened({"execution": self._execution()}))
                artifact = node.run(inputs, self.store, report, self.recipe.execution)
                report.params({"revision": artifact.revision, "location": self.store.location(artifact.path)})
                report.metrics(_counts(artifact))
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            handle.finish(status)
        return artifact

    def _execution(self) -> dict[str, Any]:
        return self.recipe.execution.model_dump(mode="json")


def _materialize(nodes: Mapping[str, Node], runner: _Runner, state_dir: Path) -> None:
    import dagster as dg

    home = state_dir / "dagster"
    os.environ["DAGSTER_HOME"] = str(home)
    with dagster_instance(home) as instance:
        assets = [_asset(node, runner) for node in nodes.values()]
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
