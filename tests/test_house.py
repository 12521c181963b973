"""The house: no import circle of files or of packages, no arrow from a stage to another, read from the code itself."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ldm", "infra", "pipelines")
STAGES = ("acquire", "score", "select", "report", "encode", "train", "evaluate", "release")
LOOSE = {
    "__init__",
    "actors",
    "again",
    "artifacts",
    "building",
    "cli",
    "errors",
    "plugins",
    "publishing",
    "reporting",
    "results",
}
"""What may lie beside the packages of `pipelines`: the command line, and what all stages share."""


def modules(root: Path, package: str) -> dict[str, Path]:
    """Files by dotted name; a package's `__init__` has the package's name."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, known: set[str]) -> set[str]:
    """The modules of `known` that are imported anywhere, in functions too, but not under `if TYPE_CHECKING`."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found |= {whole} if whole in known else {node.module} & known
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
        found |= imports(node, known)
    return found


def arrows(root: Path, package: str) -> dict[str, set[str]]:
    found = modules(root, package)
    return {
        name: imports(ast.parse(path.read_text(encoding="utf-8")), set(found)) - {name} for name, path in found.items()
    }


def rooms(files: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between the folders directly under the package; a loose file is a room of its own."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[:2])

    found: dict[str, set[str]] = {}
    for name, targets in files.items():
        found.setdefault(room(name), set()).update(room(target) for target in targets if room(target) != room(name))
    package = next(iter(files)).split(".")[0]
    return {name: targets - {package} for name, targets in found.items() if name != package}


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_files(package: str) -> None:
    assert circle(arrows(ROOT, package)) is None


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_packages(package: str) -> None:
    assert circle(rooms(arrows(ROOT, package))) is None


def test_no_stage_knows_another() -> None:
    graph = rooms(arrows(ROOT, "pipelines"))
    names = {f"pipelines.{stage}" for stage in STAGES}
    assert names <= graph.keys()
    assert {stage: graph[stage] & names for stage in names if graph[stage] & names} == {}


def test_what_lies_loose() -> None:
    assert {path.stem for path in (ROOT / "pipelines").glob("*.py")} == LOOSE


def test_a_circle_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "pipelines" / "one"
    folder.mkdir(parents=True)
    (tmp_path / "pipelines" / "two.py").write_text("def late():\n    from pipelines.one import inner\n")
    (folder / "inner.py").write_text("import pipelines.two\n")
    (folder / "typed.py").write_text("if TYPE_CHECKING:\n    from pipelines.one import typed\n")
    files = arrows(tmp_path, "pipelines")
    assert set(circle(files) or ()) == {"pipelines.two", "pipelines.one.inner"}
    assert set(circle(rooms(files)) or ()) == {"pipelines.two", "pipelines.one"}
