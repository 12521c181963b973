"""The summary of a run, in the terminal and as a page: what it says, and that a page harms nobody."""

from __future__ import annotations

import io
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asked import asked
from markupsafe import escape
from rich.console import Console

from infra.storage import Store
from pipelines.artifacts import Artifact, Counts
from pipelines.building import building
from pipelines.commands import run as console
from pipelines.dataset.figures import Figure, records
from pipelines.evaluate.generate import Shot
from pipelines.evaluate.pictures import describe, write_pairs, write_samples
from pipelines.pages.run import run_page
from pipelines.pages.summaries import newest_page, places
from pipelines.publishing import publish_unit
from pipelines.recipe import Execution, Recipe
from pipelines.recipe.file import load_recipe
from pipelines.report.stage import report as report_on
from pipelines.reporting import LogReport
from pipelines.results import Asked, NodeResult, RunResult
from pipelines.terminal.measured import headline, sentences, told
from pipelines.terminal.summary import next_commands, print_summary

X = "efficientnet_lite0_128px"
FIGURES = [
    Figure("kernel_distance", "seen", 0.041, X, error=0.002, floor=0.002, untrained=0.31, count=1000),
    Figure("frechet_distance", "seen", 169.3, X, floor=31.2, untrained=403.1, count=1000),
    Figure("clip_score", "seen", 27.31, "judge", floor=33.04, count=1000),
    Figure("faithfulness", "seen", 31.24, "judge"),
    Figure("faithfulness", "held_out", 14.03, "judge"),
    Figure("faithfulness", "seen", 24.1, X, untrained=-0.3),
    Figure("sharpness", "held_out", 0.51),
]
INFO = {"images": 1000, "extractor": "a name", "figures": records(FIGURES)}
ASKED = Asked("quickstart", ("models.base.train.seed=5", "select.where.0.value=a 'b'"))
HOSTILE = "<script>alert('prompt')</script>"


class PairOf:
    """What `describe` reads of a pair."""

    uid = "0" * 32

    def __init__(self, caption: str, split: str) -> None:
        self.caption = caption
        self.split = split


def plain(level: int) -> torch.Tensor:
    return torch.full((16, 16, 3), level, dtype=torch.uint8)


def publish(store: Store, node: str, files: dict[str, Any], info: dict[str, Any] | None = None) -> Artifact:
    with building(store, node, asked(), {}, {}, 1) as build:
        return build.publish([publish_unit(store, node, build.unit_key({}), files, Counts(6, 6), info)], info=info)


def evaluated(store: Store, info: dict[str, Any], pairs: bool = True) -> Artifact:
    shots = [Shot("flag of France", 7), Shot(HOSTILE, 8)]
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Any] = write_samples(Path(folder), torch.stack([plain(10), plain(20)]), shots, 2, {})
        sides: list[Any] = []
        if pairs:
            real, made = torch.stack([plain(40), plain(80)]), torch.stack([plain(120), plain(160)])
            sides = [[PairOf("a", "train"), PairOf("b", "train")], [PairOf("c", "held_out")]]
            files |= write_pairs(Path(folder), [(real, made), (real[:1] + 20, made[:1] + 20)], {})
        files["samples.json"] = describe(shots, sides, {})
        return publish(store, "evaluate.base", files, info)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe("quickstart", [f"state_dir={tmp_path / 'state'}"])


@pytest.fixture
def result(published: Any, store: Store) -> RunResult:
    acquired = published.acquire()
    nodes = {"acquire": acquired, "select": published.select(acquired)}
    nodes["report"] = report_on(nodes, store, LogReport(), Execution())
    nodes["evaluate.base"] = evaluated(store, INFO)
    nodes["release"] = publish(store, "release", {"model_index.json": b"{}", "unet/config.json": b"{}"})
    made = {name: NodeResult(artifact, name != "acquire", 61.0) for name, artifact in nodes.items()}
    return RunResult(made, "sqlite:////state/mlflow.db", 305.0)


def page_of(result: RunResult, store: Store, recipe: Recipe) -> str:
    return run_page(result, store, recipe, ASKED, "index.html")


def test_each_figure_stands_beside_what_it_is_held_against() -> None:
    assert sentences(FIGURES) == [
        "KID 0.041 ± 0.002 (untrained 0.31, floor 0.002; 87 % closed)",
        "FD 169 (untrained 403, floor 31.2; 63 % closed)",
        "CLIP score 27.3 (real images 33)",
        "prompt faithfulness by judge: z 31.2 for seen captions, 14.0 for held-out ones",
        f"prompt faithfulness by {X}: z 24.1 for seen captions, -0.3 untrained",
        "sharpness held out 0.51",
    ]
    assert headline(FIGURES) == "KID 0.041 ± 0.002, FD 169, CLIP score 27.3"


def test_what_was_not_measured_is_not_told() -> None:
    assert sentences([]) == []
    assert headline([]) == ""
    (none,) = told([Figure("frechet_distance", "seen", 990.0, X)])
    assert (none.sentence, none.by, none.untrained, none.closed) == ("FD 990", X, "", "")
    assert sentences([Figure("kernel_distance", "seen", -0.0004, X)]) == ["KID -0.0004"]
    assert sentences([Figure("psnr", "held_out", 29.04, error=0.11)]) == ["PSNR held out 29.0 ± 0.1 dB"]


def test_a_figure_of_a_name_that_nobody_knows_is_told_by_its_own() -> None:
    unknown = Figure("my_own_measure", "a_fifth", 0.25, floor=0.5, untrained=0.0)
    assert sentences([unknown]) == ["my own measure a fifth 0.25 (untrained 0, real images 0.5; 50 % closed)"]
    assert headline([unknown]) == "my own measure a fifth 0.25"


def test_figures_that_differ_in_their_network_alone_are_told_apart() -> None:
    two = [Figure("kernel_distance", "seen", value, network) for value, network in ((0.1, "a"), (0.2, "b"))]
    assert sentences(two) == ["KID a 0.1", "KID b 0.2"]
    assert headline(two) == "KID a 0.1, KID b 0.2"
    assert [(one.title, one.by) for one in told(two)] == [("KID", "a"), ("KID", "b")]  # for tables


def test_the_page_shows_times_funnel_figures_places_and_commands(
    result: RunResult, store: Store, recipe: Recipe
) -> None:
    html = page_of(result, store, recipe)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html.partition("</style>")[2]))
    for words in ("acquire: 32 URLs in", "failed: timeout", "split: 24 pairs", "1 min 01 s", "5 min 05 s for this run"):
        assert words in text
    assert f"KID {X} 0.041 ± 0.002 0.002 0.31 87 %" in text
    assert "KID, 87 % closed" in text
    assert f"Of 1,000 pictures beside real images, by {X}, judge." in text
    assert "CLIP score judge 27.3 33" in text
    assert "prompt faithfulness z held out judge 14" in text
    assert "sharpness held out 0.51" in text
    assert "before" in text.partition("acquire")[2]  # it was up to date
    report = store.location(result.nodes["report"].artifact.units[0].path("report.html"))
    assert f'href="{Path(report).as_uri()}"' in html
    assert str(Path(store.location(result.nodes["release"].artifact.units[0].path("model_index.json"))).parent) in text
    sets = str(escape(shlex.join([part for override in ASKED.overrides for part in ("--set", override)])))
    assert f"ldm ui quickstart {sets}" in text
    assert f"ldm status quickstart {sets}" in text
    assert f"ldm sample quickstart {sets} --prompt &#39;flag of France, noto style&#39; --out outputs" in text
    assert "--set models.base.train.seed=5" in text.partition("for this run")[0]


def test_the_page_shows_pictures_beside_real_images(result: RunResult, store: Store, recipe: Recipe) -> None:
    html = page_of(result, store, recipe)
    figures = re.findall(r"<figure>(.*?)</figure>", html, re.DOTALL)
    levels = [[level_of(source) for source in re.findall(r'src="([^"]+)"', figure)] for figure in figures]
    captions = [re.findall(r"<figcaption[^>]*>(.*?)</figcaption>", figure)[0] for figure in figures]
    assert captions == ["a", "b", "c", "flag of France", "&lt;script&gt;alert(&#39;prompt&#39;)&lt;/script&gt;"]
    assert np.abs(np.subtract(sum(levels, []), [40, 120, 80, 160, 60, 140, 10, 20])).max() <= 3  # noqa: RUF017
    assert "<script" not in html
    assert re.findall(r'(?:src|href)="(?!data:image/|file:|index\.html")', html) == []


def level_of(source: str) -> float:
    import base64

    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert image.size == (16, 16)
    return float(np.asarray(image.convert("L"), float).mean())


def test_a_run_that_stopped_early_has_a_page_as_well(result: RunResult, store: Store, recipe: Recipe) -> None:
    acquired = RunResult({"acquire": result.nodes["acquire"]}, None, 3.0)
    html = page_of(acquired, store, recipe)
    assert "acquire: 32 URLs in" in html
    assert "<figure>" not in html
    bare = RunResult({**acquired.nodes, "evaluate.base": NodeResult(evaluated(store, {}, pairs=False), True, 1.0)})
    html = page_of(bare, store, recipe)
    assert html.count("<figure>") == 2
    assert "The recipe asks for none." in html


def printed(result: RunResult, store: Store, recipe: Recipe, width: int = 160, **more: Any) -> str:
    stream = io.StringIO()
    print_summary(result, store, Console(file=stream, width=width), recipe, ASKED, **more)
    return stream.getvalue()


def test_the_terminal_says_the_same(result: RunResult, store: Store, recipe: Recipe) -> None:
    text = printed(result, store, recipe, pages={"summary": "/state/1.html", "all runs": "/state/index.html"})
    assert "  KID 0.041 ± 0.002 (untrained 0.31, floor 0.002; 87 % closed)\n" in text
    assert re.search(r"^summary +/state/1\.html$", text, re.MULTILINE)
    assert re.search(r"^all runs +/state/index\.html$", text, re.MULTILINE)
    report = store.location(result.nodes["report"].artifact.units[0].path("report.html"))
    assert re.search(rf"^report +{re.escape(report)}$", text, re.MULTILINE)


def test_what_is_suggested_can_be_typed_and_is_about_the_run_that_was(
    result: RunResult, store: Store, tmp_path: Path
) -> None:
    """Each suggested command has the settings of the run; the prompt is one of the recipe's own."""
    overrides = (f"state_dir={tmp_path}", 'models.base.sampling.prompts=["it\'s $HOME"]')
    recipe = load_recipe("quickstart", overrides)
    asked = Asked("quickstart", overrides)
    commands = [shlex.split(line, comments=True) for line in next_commands(result, recipe, asked)]
    by_verb = {command[1]: command for command in commands if command[0] == "ldm"}
    sets = [part for override in overrides for part in ("--set", override)]
    assert by_verb["status"] == ["ldm", "status", "quickstart", *sets]
    assert by_verb["ui"] == ["ldm", "ui", "quickstart", *sets]
    assert by_verb["sample"] == [
        *("ldm", "sample", "quickstart", *sets, "--prompt", "it's $HOME", "--out", "outputs"),
    ]


@pytest.mark.parametrize("width", [160, 80, 60])
def test_the_summary_fits_the_terminal_and_breaks_no_name(
    result: RunResult, store: Store, recipe: Recipe, width: int
) -> None:
    text = printed(result, store, recipe, width)
    tables = text.partition("evaluate.base\n  KID")[0]
    assert max(len(line) for line in tables.splitlines()) <= width
    for words in (*result.nodes, "1 min 01 s", "5 min 05 s", "timeout", "32 URLs"):
        assert words in tables


def test_every_run_has_a_page_and_the_index_has_all_runs(result: RunResult, store: Store, recipe: Recipe) -> None:
    whole = console.written_page(result, store, recipe, ASKED)
    smaller = RunResult({"acquire": NodeResult(result.nodes["acquire"].artifact, True, 3.0)}, None, 3.0)
    part = console.written_page(smaller, store, recipe, Asked("quickstart", (f"source.port={HOSTILE}",)))
    assert whole is not None
    assert part is not None
    assert whole != part
    assert "KID, 87 % closed" in whole.read_text()
    assert newest_page(recipe) == part
    assert places(part) == {"summary": str(part), "all runs": str(part.parent / "index.html")}
    index = (part.parent / "index.html").read_text()
    assert re.findall(r'href="([^"]+)"', index) == [part.name, whole.name]
    rows = re.findall(r"<tr>(.*?)</tr>", index.partition("<tbody>")[2], re.DOTALL)
    told = [re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", row)) for row in rows]
    assert "acquire" in told[0]
    assert "--set source.port=&lt;script&gt;" in told[0]
    assert "--set models.base.train.seed=5" in told[1]
    assert "base: KID 0.041 ± 0.002, FD 169, CLIP score 27.3" in told[1]
    assert "32 URLs, 24 kept" in told[1]
    assert "<script" not in index


def test_what_is_damaged_among_the_summaries_is_passed_over(result: RunResult, store: Store, recipe: Recipe) -> None:
    first = console.written_page(result, store, recipe, ASKED)
    assert first is not None
    for name, text in (("2020.json", "{"), ("2021.json", "[]"), ("2022.json", '{"page": "2022.html"}'), ("x.json", "")):
        (first.parent / name).write_text(text)
    second = console.written_page(result, store, recipe, ASKED)
    assert second is not None
    assert re.findall(r'href="([^"]+)"', (first.parent / "index.html").read_text()) == [second.name, first.name]
    second.unlink()
    assert newest_page(recipe) == first


def test_a_page_that_cannot_be_written_does_not_fail_the_run(result: RunResult, store: Store, recipe: Recipe) -> None:
    Path(recipe.state_dir).mkdir()
    (Path(recipe.state_dir) / "summaries").write_text("a file is in the way")
    assert console.written_page(result, store, recipe, ASKED) is None
