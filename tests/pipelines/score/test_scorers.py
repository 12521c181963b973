"""Scorers by name: the built-in ones are what the recipe knows of them, and those of plugins score beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from own_weights import KINDS, own_extractor
from plugged import PLUGIN, no_plugins_left, plugin_at

from infra.storage import Store
from ldm.errors import FolderError
from ldm.features import extractor_sha256
from pipelines.artifacts import Artifact
from pipelines.dataset.facts import PartFacts
from pipelines.dataset.scores import load_features, load_scores
from pipelines.recipe import Execution, ScoreSpec
from pipelines.recipe.errors import RecipeError
from pipelines.recipe.plugins import use_plugins
from pipelines.recipe.registered import check_scorer, scorer_key
from pipelines.recipe.scorers import SCORERS
from pipelines.score import stage
from pipelines.score.clip import ClipSimilarity
from pipelines.score.errors import ScoreError
from pipelines.score.features import ImageFeatures
from pipelines.score.nsfw import OpenNsfw
from pipelines.score.phash import PerceptualHash
from pipelines.score.scorers import BUILT_IN


@pytest.fixture(autouse=True)
def _built_in_alone() -> Iterator[None]:
    with no_plugins_left():
        yield


def score(acquired: Artifact, store: Store, report: Any, **spec: Any) -> Artifact:
    asked = ScoreSpec.model_validate({"phash": False, "scorers": {"brightness": {}}} | spec)
    return stage.score(asked, {"acquire": acquired}, store, report, Execution(device="cpu"))


def computed(scored: Artifact) -> dict[str, int]:
    """Rows that were computed and not copied, by scorer."""
    found: dict[str, int] = {}
    for facts in map(PartFacts.of, scored.units):
        found[facts.scorer] = found.get(facts.scorer, 0) + facts.computed
    return found


def test_built_in_scorers_give_the_columns_that_the_recipe_knows() -> None:
    classes: dict[str, Any] = {
        "clip": ClipSimilarity,
        "nsfw": OpenNsfw,
        "phash": PerceptualHash,
        "features": ImageFeatures,
    }
    assert SCORERS.keys() == BUILT_IN.keys() == classes.keys()
    for name, scorer in classes.items():
        assert tuple(column.field for column in SCORERS[name].columns) == scorer.fields
        assert SCORERS[name].reads_captions == scorer.reads_captions


@pytest.mark.usefixtures("in_process")
def test_a_plugins_scorer_has_a_column_and_figures(published: Any, store: Store, report: Any, tmp_path: Path) -> None:
    use_plugins([plugin_at(tmp_path)])
    acquired = published.acquire((8, 4))
    scored = score(acquired, store, report, phash=True)
    table = load_scores(scored, store, ["brightness", "phash"])
    assert table.schema.field("brightness").type == pa.float32()
    assert table.num_rows == acquired.counts.kept
    values = table.column("brightness").to_pylist()
    assert all(0 < value < 1 for value in values)
    assert report.values["mean_brightness/acquired"] == pytest.approx(sum(values) / len(values), rel=1e-6)
    halved = score(acquired, store, report, phash=True, scorers={"brightness": {"scale": 0.5}})
    assert halved.key != scored.key
    assert computed(halved)["brightness"] == acquired.counts.kept
    # float32 of a half is half of the float32.
    assert load_scores(halved, store, ["brightness"]).column("brightness").to_pylist() == [v / 2 for v in values]


@pytest.mark.usefixtures("in_process")
def test_another_text_of_the_plugin_scores_its_own_columns_again(
    published: Any, store: Store, report: Any, tmp_path: Path
) -> None:
    use_plugins([plugin_at(tmp_path)])
    acquired = published.acquire((8,))
    first = score(acquired, store, report, phash=True)
    assert score(acquired, store, report, phash=True) == first
    use_plugins([plugin_at(tmp_path, PLUGIN + "# of no consequence\n")])
    second = score(acquired, store, report, phash=True)
    assert second.key != first.key
    parts = {PartFacts.of(unit).scorer: unit.key for unit in second.units}
    before = {PartFacts.of(unit).scorer: unit.key for unit in first.units}
    assert parts["phash"] == before["phash"]
    assert parts["brightness"] != before["brightness"]
    assert computed(second)["brightness"] == acquired.counts.kept
    defaults = score(acquired, store, report, phash=True, scorers={"brightness": {"scale": 1.0}})
    assert defaults.key == second.key, "an option at its default is no other question"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("returns", "message"),
    [
        ("{'brightness': [0.5]}", r"brightness: 1 values of \d images; give one each"),
        ("{'brightness': [None for _ in images]}", r"brightness: 0 values of \d images"),
        ("{'brightness': [2.0 for _ in images]}", r"brightness is 2\.0, registered as 0\.0 to 1\.0"),
        ("{'brightness': [float('nan') for _ in images]}", "are not numbers"),
        ("{'brightness': ['a' for _ in images]}", "brightness is no column of float"),
        ("{'bright': [0.5 for _ in images]}", "gives bright; its columns are brightness"),
        ("[0.5 for _ in images]", "gives a list; a scorer gives the values of each column by its name"),
        ("1 / 0", r"mine\.py, line 16: ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_plugins_scorer_gets_wrong_is_told_with_its_name(
    returns: str, message: str, published: Any, store: Store, report: Any, tmp_path: Path
) -> None:
    right = '{"brightness": [options.scale * float(image.mean()) / 255 for image in images]}'
    use_plugins([plugin_at(tmp_path, PLUGIN.replace(right, returns))])
    with pytest.raises(ScoreError, match=message) as told:
        score(published.acquire((4,)), store, report)
    assert "brightness" in str(told.value)
    assert "\n" not in str(told.value)


WITH_WEIGHTS = """
import pyarrow as pa

from pipelines.plugins import Block, Column, WeightsPath, register_scorer


class Options(Block):
    weights: WeightsPath


def make(options, place):
    value = float(open(options.weights).read())
    return lambda images, captions: {"constant": [value for _ in images]}


register_scorer("constant", make, [Column("constant", pa.float64())], options=Options)
"""


def test_files_that_options_name_count_by_their_content(tmp_path: Path) -> None:
    use_plugins([plugin_at(tmp_path, WITH_WEIGHTS)])
    for name, text in (("one", "1.0"), ("same", "1.0"), ("two", "2.0")):
        (tmp_path / name).write_text(text)

    def content(name: str) -> Any:
        return stage.identity(ScoreSpec(scorers={"constant": {"weights": str(tmp_path / name)}})).content

    assert content("one") == content("same") != content("two")
    with pytest.raises(RecipeError, match=r"score\.scorers\.constant\.weights: .*No such file"):
        content("gone")


@pytest.mark.parametrize("kind", ["WeightsPath", "WeightsPath | None"])
def test_files_at_a_default_path_count_by_their_content(kind: str, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("1.0")
    text = WITH_WEIGHTS.replace("weights: WeightsPath", f"weights: {kind} = {str(tmp_path / 'one')!r}")
    assert text != WITH_WEIGHTS
    use_plugins([plugin_at(tmp_path, text)])

    def content(options: Any) -> Any:
        return stage.identity(ScoreSpec(scorers={"constant": options})).content

    before = content({})
    assert content({"weights": str(tmp_path / "one")}) == before
    (tmp_path / "one").write_text("2.0")
    assert content({}) != before


def test_a_worker_with_other_files_than_the_keys_is_refused(tmp_path: Path) -> None:
    use_plugins([plugin_at(tmp_path, WITH_WEIGHTS)])
    (tmp_path / "one").write_text("1.0")
    options = {"weights": str(tmp_path / "one")}
    key = scorer_key("constant", options)
    check_scorer("constant", options, key)
    (tmp_path / "one").write_text("2.0")
    with pytest.raises(RecipeError, match=r"score\.scorers\.constant: files .* are not what they were"):
        check_scorer("constant", options, key)


def test_an_option_that_a_scorer_does_not_take_is_one_message_wherever_keys_are_made(tmp_path: Path) -> None:
    use_plugins([plugin_at(tmp_path)])
    with pytest.raises(RecipeError, match=r"score\.scorers\.brightness\.scael: unknown option 'scael'"):
        stage.identity(ScoreSpec(scorers={"brightness": {"scael": 2.0}}))


# -- extractors by path ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
def test_features_of_weights_of_ones_own_are_known_by_their_content(
    published: Any, store: Store, report: Any, clip_folder: Path, tmp_path: Path
) -> None:
    acquired = published.acquire((8,))
    scored = score(acquired, store, report, scorers={}, features=f"clip:{clip_folder}")
    wanted = [("00000", row["key"]) for row in load_scores(scored, store, ["key"]).to_pylist()]
    assert load_features(scored, store, wanted).shape == (acquired.counts.kept, 8)
    assert scored.info["scorers"]["features"]["model"].startswith("clip_")
    moved = clip_folder.rename(tmp_path / "moved")
    assert score(acquired, store, report, scorers={}, features=f"clip:{moved}") == scored
    with pytest.raises(FolderError, match=r"score\.features, clip:.*a_clip"):
        score(acquired, store, report, scorers={}, features=f"clip:{clip_folder}")
    (moved / "note.json").write_text("{}")
    other = score(acquired, store, report, scorers={}, features=f"clip:{moved}")
    assert other.key != scored.key
    assert computed(other) == {"features": acquired.counts.kept}


def test_a_worker_with_other_weights_at_the_path_is_refused(clip_folder: Path) -> None:
    extractor = ImageFeatures(f"clip:{clip_folder}", "cpu", "0" * 64)
    with pytest.raises(FolderError, match=r"is not what it was where the run began \(000000000000\)"):
        _ = extractor.identity


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_of_any_extractor_by_path(
    kind: str, published: Any, store: Store, report: Any, tmp_path: Path
) -> None:
    if kind == "inception":
        pytest.importorskip("torch_fidelity")
    name = own_extractor(kind, tmp_path)
    scored = score(published.acquire((4,)), store, report, scorers={}, features=name)
    keys = [("00000", row["key"]) for row in load_scores(scored, store, ["key"]).to_pylist()]
    features = load_features(scored, store, keys)
    assert features.shape == (3, {"inception": 2048}.get(kind, 8))
    assert float(abs(features).max()) > 0
    who = scored.info["scorers"]["features"]
    assert who["model"].startswith(name.partition(":")[0])
    assert who["sha256"] == extractor_sha256(name)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_rays_workers_run_the_plugin_as_it_was_read(published: Any, store: Store, report: Any, tmp_path: Path) -> None:
    plugin = plugin_at(tmp_path)
    use_plugins([plugin])
    Path(plugin.path).write_text("raise RuntimeError\n")  # by somebody, while it runs
    acquired = published.acquire((4, 4, 4))
    spec = ScoreSpec(phash=False, scorers={"brightness": {}})
    scored = stage.score(spec, {"acquire": acquired}, store, report, Execution(device="cpu", score_workers=2))
    assert load_scores(scored, store, ["brightness"]).num_rows == acquired.counts.kept
    use_plugins([broken := plugin_at(tmp_path, PLUGIN.replace("/ 255", "/ nothing"))])
    with pytest.raises(ScoreError, match=r"score\.scorers\.brightness: .*mine\.py, line 16: NameError: .*'nothing'"):
        stage.score(spec, {"acquire": acquired}, store, report, Execution(device="cpu", score_workers=2))
    assert broken != plugin
