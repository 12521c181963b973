"""What importing the library takes along, and that its parts lie in layers: no circle of files, nor of sub-packages."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ldm

FOREIGN = (
    "ray", "deepspeed", "mlflow", "dagster", "webdataset", "img2dataset", "pyarrow", "transformers", "diffusers",
    "open_clip", "torchvision", "PIL", "infra", "pipelines",
)  # fmt: skip

Graph = dict[str, set[str]]
"""Modules, or packages, and what each imports."""


def test_importing_everything_takes_along_only_torch_numpy_and_safetensors() -> None:
    names = [module.name for module in pkgutil.walk_packages(ldm.__path__, "ldm.")]
    assert "ldm.conditioning.text" in names
    code = f"import sys\nimport {', '.join(names)}\nprint(*(name for name in {FOREIGN} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


# -- circles -----------------------------------------------------------------------------------------------------------


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a file imports, those inside functions too; of `from a import b` it is a.b. What only type
    checkers read is left out."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module, names, level):
                assert level == 0, "imports are absolute here"
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.If(ast.Name("TYPE_CHECKING"), _, otherwise):
                for other in otherwise:
                    yield from imports(ast.Module([other], []))
            case _:
                yield from imports(node)


def graph_of(root: Path) -> Graph:
    """Every module of the package in this folder, and which of its other modules each imports."""
    files = {
        ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in root.rglob("*.py")
    }
    graph: Graph = {}
    for name, path in files.items():
        found = imports(ast.parse(path.read_text(encoding="utf-8")))
        # The last part may be a module, or a name in one.
        graph[name] = {each if each in files else each.rpartition(".")[0] for each in found} & files.keys()
    return graph


def between_packages(graph: Graph) -> Graph:
    """The graph of what lies right below the root: sub-packages, each taken whole, and single files."""
    joined: Graph = {}
    for name, found in graph.items():
        part, parts = head(name), {head(other) for other in found}
        joined.setdefault(part, set()).update(parts - {part})
    return joined


def head(name: str) -> str:
    return ".".join(name.split(".")[:2])


def circle(graph: Graph) -> list[str]:
    """One circle of the graph, whose first is its last; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_there_is_no_circle_of_files_or_of_packages() -> None:
    graph = graph_of(Path(ldm.__path__[0]))
    assert "ldm.guidance" in graph["ldm.generate.run"]
    assert circle(graph) == []
    assert circle(between_packages(graph)) == []


@pytest.mark.parametrize(
    ("files", "of_files", "of_packages"),
    [
        ({"a": "from p import b", "b": "def f():\n    from p.a import g"}, True, True),
        ({"a": "import p.b", "b": "try:\n    from p.a import g\nexcept ImportError:\n    pass"}, True, True),
        ({"x/__init__": "", "x/a": "import p.y.b", "y/__init__": "", "y/b": "", "y/c": "import p.x.a"}, False, True),
        ({"x/__init__": "from p.x import a, b", "x/a": "", "x/b": "from p.x.a import g"}, False, False),
        ({"x/__init__": "from p.x import a", "x/a": "from p.x import g"}, True, False),
        ({"a": "import p.b", "b": "if TYPE_CHECKING:\n    import p.a\nelse:\n    import os"}, False, False),
    ],
    ids=["in a function", "in a block", "of packages alone", "re-exports", "of a package's files", "for types alone"],
)
def test_circles_are_found(files: dict[str, str], of_files: bool, of_packages: bool, tmp_path: Path) -> None:
    for name, text in ({"__init__": ""} | files).items():
        path = tmp_path / "p" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    graph = graph_of(tmp_path / "p")
    assert bool(circle(graph)) is of_files
    assert bool(circle(between_packages(graph))) is of_packages
