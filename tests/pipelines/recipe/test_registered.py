"""Names of samplers, extractors and scorers: what they are in keys, and which are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugged import PLUGIN, no_plugins_left, plugin_at

from ldm.errors import FolderError
from ldm.features import extractor_names
from ldm.samplers import SAMPLERS
from pipelines.evaluate import stage as evaluate
from pipelines.recipe import Execution, ScoreSpec, TextToImageModel
from pipelines.recipe.errors import RecipeError
from pipelines.recipe.file import checked_recipe, load_recipe
from pipelines.recipe.models import EvaluateSpec, Sampling
from pipelines.recipe.plugins import plugin_of, use_plugins
from pipelines.recipe.registered import extractor_key, sampler_key
from pipelines.score import stage as score
from pipelines.train import stage as train
from pipelines.workflow.graph import build_graph

EXTRACTOR_PLUGIN = """
from pipelines.plugins import register_extractor


class Mean:
    name, width, sha256 = "mean_colour", 3, ""

    def __call__(self, images):
        return images.float().mean(dim=(1, 2)).cpu()


register_extractor("mean_colour", lambda device: Mean())
"""


@pytest.fixture(autouse=True)
def _built_in_alone() -> Iterator[None]:
    with no_plugins_left():
        yield


def model(**settings: Any) -> TextToImageModel:
    """quickstart's, with `sampling` and `evaluate` changed by dotted key."""
    overrides = [f"models.base.{key.replace('__', '.')}={value}" for key, value in settings.items()]
    found = load_recipe("quickstart", overrides).model("base")
    assert isinstance(found, TextToImageModel)
    return found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.base.sampling.sampler=dpmp_2m", r"must be one of ddpm, .*, got \"dpmp_2m\"; did you mean 'dpmpp_2m'"),
        ("models.base.evaluate.extractor=efficientnet", r"must be one of .*; did you mean 'efficientnet_lite0'\?"),
        ("models.base.evaluate.extractor=inception", r"must be one of .*inception:PATH.*, got \"inception\"$"),
        ("models.base.evaluate.extractor='inception:'", r"must be one of .*inception:PATH"),
        ("models.base.evaluate.extractor='efficientnet_lite0:a'", "must be one of efficientnet_lite0, inception:PATH"),
        ("score.features=dinov3:/a", r"score\.features .*must be one of .*did you mean 'dinov2'"),
        ("execution.extractor=x", r"execution\.extractor .*must be one of"),
        ("score.features=clip:s3://a/b", r"score\.features .*is a URL; weights are local files"),
        ("score.scorers={nsfw: {}}", r"score\.scorers\.nsfw .*built in: ask for it as score\.nsfw"),
        ("score.scorers={brightness: {}}", "is no registered scorer; .*: name its file under plugins"),
    ],
)  # fmt: skip
def test_unknown_names_are_refused_with_what_there_is(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        checked_recipe("quickstart", [override])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{brightness: {scal: 2.0}}", r"scorers\.brightness\.scal: unknown option 'scal'; .*did you mean 'scale'"),
        ("{brightness: {scale: much}}", r"scorers\.brightness\.scale: .*number, got 'much'"),
        ("{brightnes: {}}", r"'brightnes' is no registered scorer; there are brightness; did you mean 'brightness'"),
    ],
)
def test_options_of_scorers_are_checked(options: str, message: str, tmp_path: Path) -> None:
    plugin_at(tmp_path)
    plugins = f"plugins=[{tmp_path / 'mine.py'}]"
    with pytest.raises(RecipeError, match=message):
        checked_recipe("quickstart", [plugins, f"score.scorers={options}"])
    checked_recipe("quickstart", [plugins, "score.scorers={brightness: {scale: 2}}"])


def test_rules_know_a_plugins_column_and_its_range(tmp_path: Path) -> None:
    plugin_at(tmp_path)
    plugins = f"plugins=[{tmp_path / 'mine.py'}]"
    rule = "select.where=[{{name: dark, column: brightness, op: '>=', value: {}}}]"
    checked_recipe("quickstart", [plugins, "score.scorers={brightness: {}}", rule.format(0.5)])
    with pytest.raises(RecipeError, match=r"brightness is from 0 to 1: none is >= 1.5"):
        checked_recipe("quickstart", [plugins, "score.scorers={brightness: {}}", rule.format(1.5)])
    with pytest.raises(RecipeError, match=r"no column 'brightness'; it needs score\.scorers\.brightness"):
        checked_recipe("quickstart", [plugins, rule.format(0.5)])


@pytest.mark.parametrize(
    ("block", "field"), [(Sampling, "sampler"), (EvaluateSpec, "extractor"), (ScoreSpec, "features")]
)
def test_the_recipes_reference_names_all_that_is_built_in(block: Any, field: str) -> None:
    text = " ".join(str(block.model_fields[field].description).split())
    assert ", ".join(SAMPLERS if field == "sampler" else extractor_names()) in text


# -- keys --------------------------------------------------------------------------------------------------------------


def test_built_in_names_stand_for_themselves() -> None:
    assert [sampler_key(name) for name in SAMPLERS] == list(SAMPLERS)
    assert extractor_key("efficientnet_lite0", "here") == "efficientnet_lite0"


def test_weights_count_by_their_content_wherever_they_lie(tmp_path: Path) -> None:
    first, second = tmp_path / "a.pth", tmp_path / "b.pth"
    first.write_bytes(b"weights")
    second.write_bytes(b"weights")
    contents = [evaluate.identity(model(evaluate__extractor=f"'inception:{path}'")).content for path in (first, second)]
    assert contents[0] == contents[1]
    assert str(tmp_path) not in str(contents[0])
    second.write_bytes(b"others")
    assert evaluate.identity(model(evaluate__extractor=f"'inception:{second}'")).content != contents[0]
    with pytest.raises(FolderError, match=r"evaluate\.extractor, inception:.*gone\.pth.*No such file"):
        evaluate.identity(model(evaluate__extractor=f"'inception:{tmp_path / 'gone.pth'}'"))


def test_a_plugins_hash_is_in_the_keys_of_the_nodes_that_use_its_names_alone(tmp_path: Path) -> None:
    plugin_at(tmp_path)
    overrides = [
        f"plugins=[{tmp_path / 'mine.py'}]", "score.scorers={brightness: {}}", "models.base.sampling.sampler=own_euler",
    ]  # fmt: skip

    def contents(*overrides: str) -> dict[str, Any]:
        nodes = build_graph(load_recipe("quickstart", overrides))
        return {name: node.identity.content for name, node in nodes.items()}

    with_it, without = contents(*overrides[:1]), contents()
    assert with_it == without, "a plugin that nothing uses changes nothing"
    before = contents(*overrides)
    assert {name for name in before if before[name] != without[name]} == {"score", "evaluate.base"}
    plugin_at(tmp_path, PLUGIN + "# changed\n")
    after = contents(*overrides)
    assert {name for name in after if after[name] != before[name]} == {"score", "evaluate.base"}


def test_a_plugins_extractor_counts_with_its_plugin(tmp_path: Path) -> None:
    use_plugins([plugin_at(tmp_path, EXTRACTOR_PLUGIN)])
    asked = ScoreSpec(features="mean_colour")
    before = score.identity(asked)
    plugin = plugin_of("extractor", "mean_colour")
    assert plugin is not None
    assert before.content["features"] == {"name": "mean_colour", "plugin_sha256": plugin.sha256}
    use_plugins([plugin_at(tmp_path, EXTRACTOR_PLUGIN + "# changed\n")])
    assert score.identity(asked).content != before.content


def test_trainings_take_along_what_previews_need(tmp_path: Path) -> None:
    use_plugins([plugin_at(tmp_path), plugin_at(tmp_path, EXTRACTOR_PLUGIN, "extractor.py")])
    text_to_image = model(sampling__sampler="own_euler")
    assert train.identity(text_to_image).content == train.identity(model()).content
    used = train.plugins_of_previews(text_to_image, Execution(extractor="mean_colour"))
    assert [Path(plugin.path).name for plugin in used] == ["mine.py", "extractor.py"]
    assert train.plugins_of_previews(model(), Execution()) == ()
