"""`ldm ui`: Dagster's and MLflow's pages of a recipe, on loopback, until somebody stops them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from infra.tracking import TrackingSpec
from pipelines.errors import LatentworksError
from pipelines.recipe import Recipe
from pipelines.workflow.dagster import DAGSTER_YAML, RECIPE_VARIABLE

HOST = "127.0.0.1"
# Otherwise its pages are about language models' traces.
MLFLOW_START = "/#/experiments?workflowType=machine_learning"
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 0.2


class UiError(LatentworksError):
    """A page can't be shown; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Page:
    """A server to start: `health` is a path that answers 200 when it is ready, `start` the page to begin with."""

    name: str
    port: int
    health: str
    start: str
    command: Sequence[str]
    environment: Mapping[str, str]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"


def show(recipe: Recipe, dagster_port: int, mlflow_port: int, tell: Callable[[str], None]) -> None:
    """Start both pages, `tell` their addresses when they answer, and end them on Ctrl-C or SIGTERM.

    With `execution.tracking_uri` at a server, its own page is named and no second one is started.

    Raises `UiError`: a port is taken, a server doesn't start, or one ends by itself.
    """
    state_dir = Path(recipe.state_dir).resolve()
    logs = state_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    spec = TrackingSpec(recipe.execution.tracking_uri, recipe.name, state_dir)
    pages = [_dagster_page(recipe, state_dir, dagster_port)]
    if spec.artifact_location is None:
        tell(f"MLflow   {spec.resolved_uri} (runs elsewhere)")
    else:
        pages.append(_mlflow_page(spec, mlflow_port))
    _check_ports(pages)
    with _stop_asked() as stop, contextlib.ExitStack() as running:
        started = [(page, running.enter_context(_process(page, logs))) for page in pages]
        for page, process in started:
            if _answers(page, process, logs, stop):
                tell(f"{page.name:<8} {page.url}{page.start}")
        if not stop.is_set():
            tell(f"logs     {logs}; Ctrl-C ends both")
        while not stop.wait(POLL_INTERVAL_S):
            for page, process in started:
                if process.poll() is not None:
                    raise UiError(_ended(page, process.returncode, logs))


def _dagster_page(recipe: Recipe, state_dir: Path, port: int) -> Page:
    """Its home is the one of `ldm run`, so that past runs are seen."""
    home = state_dir / "dagster"
    home.mkdir(parents=True, exist_ok=True)
    (home / "dagster.yaml").write_text(DAGSTER_YAML, encoding="utf-8")
    recipe_file = home / f"{recipe.name}.yaml"
    recipe_file.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "dagster_webserver", "--host", HOST, "--port", str(port), "--read-only"]
    command += ["--module-name", "pipelines.workflow.dagster", "--attribute", "definitions"]
    environment = {"DAGSTER_HOME": str(home), RECIPE_VARIABLE: str(recipe_file)}
    return Page("Dagster", port, "/server_info", "/asset-groups", command, environment)


def _mlflow_page(spec: TrackingSpec, port: int) -> Page:
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", spec.resolved_uri, "--default-artifact-root", str(spec.artifact_location)]
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return Page("MLflow", port, "/health", MLFLOW_START, command, environment)


def _check_ports(pages: Sequence[Page]) -> None:
    for page in pages:
        if importlib.util.find_spec(page.command[2]) is None:
            raise UiError(f"{page.name} is not installed ({page.command[2]}): install latentworks anew")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, page.port))
            except OSError as error:
                option = f"--{page.name.lower()}-port"
                raise UiError(
                    f"port {page.port} for {page.name} is taken ({error.strerror}); give another with {option}"
                ) from error
    if len({page.port for page in pages}) < len(pages):
        raise UiError(
            f"both pages can't have port {pages[0].port}; give --dagster-port and --mlflow-port different ones"
        )


@contextlib.contextmanager
def _process(page: Page, logs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own: Ctrl-C reaches this process alone, which then ends the page and all that it started."""
    with _log(page, logs).open("ab") as log:
        process = subprocess.Popen(
            page.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | dict(page.environment),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Its whole group: both servers start processes of their own, which may outlive them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answers(page: Page, process: subprocess.Popen[bytes], logs: Path, stop: threading.Event) -> bool:
    """Waits until the page answers; False if it is to be stopped before. Raises `UiError`."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not stop.wait(POLL_INTERVAL_S):
        if process.poll() is not None:
            raise UiError(_ended(page, process.returncode, logs))
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(page.url + page.health, timeout=2),
        ):
            return True
        if time.monotonic() > deadline_s:
            raise UiError(
                f"{page.name} does not answer at {page.url} after {START_TIMEOUT_S:.0f} s; see {_log(page, logs)}"
            )
    return False


def _ended(page: Page, code: int, logs: Path) -> str:
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return f"{page.name} ended by itself {how}; {_log(page, logs)} has its last words"


def _log(page: Page, logs: Path) -> Path:
    return logs / f"ui-{page.name.lower()}.log"


@contextlib.contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    """Set by Ctrl-C and SIGTERM, which have their old meaning again after the block."""
    asked = threading.Event()
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
