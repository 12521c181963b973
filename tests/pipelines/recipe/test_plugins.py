"""Plugins: run once, as they were read, and undone whole where they can't be."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from plugged import PLUGIN, no_plugins_left, plugin_at, write_plugin

from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.features import EXTRACTORS, EXTRACTORS_BY_PATH, load_extractor
from ldm.samplers import SAMPLERS
from pipelines import cli
from pipelines.errors import EXIT_USAGE
from pipelines.recipe.errors import PluginError, RecipeError
from pipelines.recipe.file import checked_recipe, load_recipe, recipe_text
from pipelines.recipe.plugins import load_plugins, plugin_of, plugins_of, read_plugins, use_plugins
from pipelines.recipe.scorers import SCORERS, Place

TABLES = (SCORERS, SAMPLERS, EXTRACTORS, EXTRACTORS_BY_PATH)
USES = ("score.scorers={brightness: {}}", "models.base.sampling.sampler=own_euler")


@pytest.fixture(autouse=True)
def _built_in_alone() -> Iterator[None]:
    before = [dict(table) for table in TABLES]
    with no_plugins_left():
        yield
    assert [dict(table) for table in TABLES] == before


def own_recipe(folder: Path, *plugins: str, name: str = "mine.yaml") -> str:
    """quickstart with these plugins, in a file of its own."""
    path = folder / name
    path.write_text(f"plugins: {json.dumps(plugins)}\n{recipe_text('quickstart').text}", encoding="utf-8")
    return str(path)


def test_names_are_known_with_the_plugin_and_not_without(tmp_path: Path) -> None:
    write_plugin(tmp_path)
    recipe = own_recipe(tmp_path, "mine.py")
    with pytest.raises(RecipeError, match="own_euler"):
        checked_recipe("quickstart", [USES[1]])
    found = checked_recipe(recipe, USES).recipe
    assert found.plugins == (str(tmp_path / "mine.py"),)
    owner = plugin_of("scorer", "brightness")
    assert owner is not None
    assert owner == plugin_of("sampler", "own_euler")
    assert plugins_of(("scorer", "brightness"), ("sampler", "own_euler"), ("sampler", "ddim")) == (owner,)


def test_another_recipes_plugin_makes_no_name_known(tmp_path: Path) -> None:
    """In one process the names of both are registered; each recipe has its own plugins' alone."""
    write_plugin(tmp_path)
    checked_recipe(own_recipe(tmp_path, "mine.py"), USES)
    for use in USES:
        with pytest.raises(RecipeError, match=r"must be one of|no registered scorer"):
            checked_recipe("quickstart", [use])


def test_paths_are_seen_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_plugin(tmp_path)
    checked_recipe(own_recipe(tmp_path / "deep", "../mine.py"), USES)
    with pytest.raises(RecipeError, match=r"plugins\.0 \(line 1\): .*deep/gone\.py can't be read \(No such file"):
        load_recipe(own_recipe(tmp_path / "deep", "gone.py"))
    with pytest.raises(RecipeError, match=r"plugins\.1 .*'\.\./deep/\.\./mine\.py' is there twice"):
        load_recipe(own_recipe(tmp_path / "deep", "../mine.py", "../deep/../mine.py"))
    with pytest.raises(RecipeError, match=r"plugins\.0 .*is a URL"):
        load_recipe(own_recipe(tmp_path, "https://example.org/a.py"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", r"mine\.py, line 1: invalid syntax"),
        ("\nimport nothing_like_this\n", r"mine\.py, line 2: ModuleNotFoundError: .*nothing_like_this.*one file"),
        (PLUGIN + "1 / 0\n", r"mine\.py, line 24: ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", r"mine\.py, line 2: SystemExit: 3"),
        ("x = 1\n", r"mine\.py: registers nothing; call register_scorer"),
        (PLUGIN.replace('"own_euler"', '"euler"'), r"mine\.py, line 23: sampler 'euler' is registered already"),
        (PLUGIN.replace('"brightness", make', '"nsfw", make'), r"line 22: scorer 'nsfw' is registered already"),
        (PLUGIN.replace('Column("brightness"', 'Column("nsfw"'), r"line 22: column 'nsfw' of .* is one of 'nsfw'"),
        (PLUGIN.replace('Column("brightness"', 'Column("uid"'), r"line 22: column 'uid' .* none of the ledger's own"),
        (PLUGIN.replace("[column]", "[]"), r"line 22: scorer 'brightness' has no columns"),
        (PLUGIN.replace("[column]", "[column, column]"), r"line 22: column 'brightness' .*there once"),
        (PLUGIN.replace("options=Options", "options=dict"), r"line 22: options of scorer 'brightness' are"),
        (PLUGIN.replace("pa.float32()", '"float"'), r"line 22: .* its type is an Arrow type"),
        (
            PLUGIN.replace("pa.float32()", "pa.string()"),
            r"line 22: .* of type string: least, greatest and told are for",
        ),
        (PLUGIN.replace('Column("brightness"', 'Column("features"'), r"line 22: column 'features' .* the ledger's own"),
        (
            PLUGIN.replace("import Block", "import WeightsPath, Block").replace(
                "scale: float = 1.0", "many: tuple[WeightsPath, ...] = ()"
            ),
            r"line 22: option 'many' of scorer 'brightness' holds paths within .* would be in no key",
        ),
        (PLUGIN + 'SAMPLERS["euler"] = SAMPLERS["heun"]\n', r"mine\.py: replaces 'euler', which is registered already"),
        (PLUGIN + 'del SAMPLERS["ddim"]\n', r"mine\.py: replaces 'ddim'"),
    ],
)
def test_a_plugin_that_cant_be_is_one_message_with_file_and_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=message) as told:
        load_plugins([plugin_at(tmp_path, text)])
    assert "\n" not in str(told.value)
    assert str(tmp_path) in str(told.value)
    assert "brightness" not in SCORERS
    assert "own_euler" not in SAMPLERS


def test_what_is_registered_in_any_way_is_the_plugins(tmp_path: Path) -> None:
    """A name that is put into a table by hand would be in no key."""
    plugin = plugin_at(tmp_path, PLUGIN + 'SAMPLERS["by_hand"] = SAMPLERS["own_euler"]\n')
    load_plugins([plugin])
    assert plugin_of("sampler", "by_hand") == plugin


def test_two_plugins_that_clash_are_told_and_the_first_stays_whole(tmp_path: Path) -> None:
    first, second = (plugin_at(tmp_path, PLUGIN, name) for name in ("mine.py", "other.py"))
    with pytest.raises(PluginError, match=r"other\.py, line 22: scorer 'brightness' is registered already"):
        use_plugins([first, second])
    assert plugin_of("scorer", "brightness") == first
    with pytest.raises(PluginError, match="registers nothing"):
        use_plugins([plugin_at(tmp_path, "", "empty.py")])
    assert plugin_of("scorer", "brightness") == first
    use_plugins([second])  # of another recipe, in the same process
    assert plugin_of("scorer", "brightness") == second
    use_plugins([first])
    with pytest.raises(PluginError, match=r"other\.py: scorer 'brightness' is registered already by .*mine\.py"):
        load_plugins([second])


def test_a_changed_file_is_another_plugin(tmp_path: Path) -> None:
    before = plugin_at(tmp_path)
    use_plugins([before])
    made = SCORERS["brightness"].make
    use_plugins([before])
    assert SCORERS["brightness"].make is made
    after = plugin_at(tmp_path, PLUGIN + "# changed\n")
    use_plugins([after])
    assert before.sha256 != after.sha256
    assert plugin_of("scorer", "brightness") == after
    assert SCORERS["brightness"].make is not made


def test_a_worker_runs_what_was_read_not_what_lies_there_now(tmp_path: Path) -> None:
    gone, other = plugin_at(tmp_path, name="gone.py"), plugin_at(tmp_path)
    (tmp_path / "gone.py").unlink()
    use_plugins([gone])
    assert plugin_of("scorer", "brightness") == gone
    (tmp_path / "mine.py").write_text("1 / 0\n")
    use_plugins([other])
    assert plugin_of("scorer", "brightness") == other
    # pydantic reads the source of a class for its fields' docstrings.
    field = SCORERS["brightness"].options.model_fields["scale"]
    assert field.description == "What brightness is multiplied with."


@pytest.mark.parametrize("allowed", [False, True])
def test_a_recipe_that_is_no_local_file_runs_no_plugin_unless_it_may(
    allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe, as of `curl ... | ldm run /dev/stdin`."""
    write_plugin(tmp_path, f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n" + PLUGIN)
    text = Path(own_recipe(tmp_path, str(tmp_path / "mine.py"))).read_text(encoding="utf-8")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    option = ("--allow-plugins",) if allowed else ()
    monkeypatch.setattr(sys, "argv", ["ldm", "recipe", "show", str(pipe), *option])
    code = cli.answer()
    writer.join()
    told = capsys.readouterr().err
    if allowed:
        assert (code, told) == (0, "")
    else:
        assert code == EXIT_USAGE
        assert re.search(r"plugins \(line 1\): .*mine\.py: .* no local file; .*--allow-plugins", told)
    assert (tmp_path / "ran").exists() is allowed


def test_every_command_that_reads_a_recipe_takes_allow_plugins() -> None:
    """But `ldm recipe copy`, which reads none."""
    group = typer.main.get_command(cli.app)
    found = {
        name: {p.name for p in command.params} for name, command in every_command(group) if takes_a_recipe(command)
    }
    assert len(found) > 15
    assert {name for name, params in found.items() if "allow_plugins" not in params} == {"copy"}


def every_command(group: Any) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command)
        else:
            yield name, command


def takes_a_recipe(command: Any) -> bool:
    return bool({"recipe", "model"} & {each.name for each in command.params})


def test_what_cant_be_read_as_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.py").mkdir()
    found, problems = read_plugins(["a.py", "folder.py"], tmp_path)
    assert found == []
    assert [problem.path for problem in problems] == ["plugins.0", "plugins.1"]
    assert "Is a directory" in problems[1].message


@pytest.mark.parametrize(("section", "kind", "name"), [
    ("How to add a scorer", "scorer", "sharpness"),
    ("How to add a sampler", "sampler", "my_euler"),
    ("How to add a feature extractor", "extractor", "mean_colours"),
])  # fmt: skip
def test_the_pages_examples_are_plugins_that_work(section: str, kind: Any, name: str, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "extending.md").read_text(encoding="utf-8")
    (code,) = re.findall(
        r"^```python\n(.*?)^```", page.partition(f"## {section}\n")[2].partition("\n## ")[0], re.S | re.M
    )
    plugin = plugin_at(tmp_path, code)
    load_plugins([plugin])
    assert plugin_of(kind, name) == plugin
    images = torch.randint(0, 256, (3, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if kind == "scorer":
        make = SCORERS[name].make
        assert make is not None
        values = make(SCORERS[name].options(), Place("cpu", 1))(list(images.numpy()), ["a"] * 3)
        assert len(values[name]) == 3
    elif kind == "extractor":
        features = load_extractor(name)(images)
        assert (features.shape, features.dtype) == ((3, load_extractor(name).width), torch.float32)
    else:
        diffusion = Diffusion(DiffusionConfig("eps"))
        solved = []
        for sampler in (SAMPLERS[name], SAMPLERS["euler"]):
            levels = sampler.levels_of(diffusion, 5, None, None)
            start = levels.start(torch.linspace(-1, 1, 8).view(1, 1, 2, 4))
            solved.append(sampler.solve(lambda x, level: 0.3 * torch.tanh(x), start, levels))
        torch.testing.assert_close(*solved, rtol=1e-4, atol=1e-5)  # the same steps, in another order of operations
