"""The wheel, installed elsewhere: it has every file of the packages, and the command works from another folder.

And what other files say of the package: its version, its Pythons.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "infra", "ldm", "pipelines")
TYPED = ("infra", "ldm", "pipelines")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
OFFLINE = ("--no-deps", "--no-index", "--no-cache-dir", "--quiet")


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What the command prints in `folder`, without this checkout on the path."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=kept | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def files_of(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for package in PACKAGES
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is made from: a build leaves folders behind, and takes in those that are there."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", str(folder), str(source)], folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder beside the packages that are here, which has only ours."""
    folder = tmp_path_factory.mktemp("installed")
    run([*PIP, "install", *OFFLINE, "--target", str(folder), str(wheel)], folder)
    return folder


def test_every_file_of_the_packages_is_in_the_wheel(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = HeaderParser().parsestr(archive.read(metadata).decode())
    assert names == files_of(source)
    assert {f"{package}/py.typed" for package in TYPED} <= names
    assert (fields["Name"], fields["Version"]) == (PROJECT["name"], PROJECT["version"])
    assert fields["License-Expression"] == "Apache-2.0"


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ("--version", f"latentworks {re.escape(PROJECT['version'])} "),
        ("recipe list", r"quickstart +\S"),
        ("recipe validate quickstart", "quickstart: valid; nodes: acquire, "),
    ],
)
def test_the_command_works_from_another_folder(installed: Path, tmp_path: Path, arguments: str, answer: str) -> None:
    command = [str(installed / "bin" / "ldm"), *arguments.split()]
    assert re.search(answer, run(command, tmp_path, PYTHONPATH=str(installed)))
    assert list(tmp_path.iterdir()) == []


def test_what_was_tested_is_the_installed_copy(installed: Path, tmp_path: Path) -> None:
    told = "import configs, infra, ldm, pipelines.cli as p; print(*(m.__file__ for m in (configs, infra, ldm, p)))"
    found = run([sys.executable, "-c", told], tmp_path, PYTHONPATH=str(installed)).split()
    assert [Path(name).is_relative_to(installed) for name in found] == [True] * 4


def test_pages_are_made_from_the_installed_templates(installed: Path, tmp_path: Path) -> None:
    """A template that is read, and one that another includes by its path."""
    told = (
        "import jinja2; e = jinja2.Environment(loader=jinja2.PackageLoader('pipelines', '.'));"
        "print(len([e.get_template(n) for n in e.list_templates(extensions=['j2'])]), e.loader._template_root)"
    )
    number, folder = run([sys.executable, "-c", told], tmp_path, PYTHONPATH=str(installed)).split()
    assert int(number) == len(list((ROOT / "pipelines").rglob("*.j2"))) >= 5
    assert Path(folder).is_relative_to(installed)


# -- what other files say of the package -------------------------------------------------------------------------------


def test_the_citation_has_the_schemas_fields_and_our_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    required = {"cff-version", "message", "title", "authors"}
    assert required <= citation.keys() <= required | {"type", "abstract", "version", "license", "keywords"}
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["title"].lower().startswith(PROJECT["name"])
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    for name, value in citation.items():  # the schema has texts, and lists of them
        assert isinstance(value, list if name in {"authors", "keywords"} else str), name


def test_changes_stand_under_a_version_that_is_not_out_or_is_this_one() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", name) for name in versions[1:])
    groups = set(re.findall(r"^### (.*)$", text, flags=re.MULTILINE))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_continuous_integration_runs_the_gate_on_each_python_that_is_promised() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    promised = {name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)}
    assert set(job["strategy"]["matrix"]["python"]) == promised
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_issue_forms_have_what_the_site_asks_for(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": False}
        return
    assert {"name", "description", "body"} <= form.keys()
    fields = [entry for entry in form["body"] if entry["type"] != "markdown"]
    assert fields
    assert len({entry["id"] for entry in fields}) == len(fields)
    assert all(entry["attributes"]["label"] for entry in fields)
