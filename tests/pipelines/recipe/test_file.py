from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.recipe import Recipe
from pipelines.recipe.errors import RecipeError
from pipelines.recipe.file import load_recipe, recipe_text, shipped_recipes


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_valid_and_opens_with_its_command(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    head = recipe_text(name)[1].splitlines()[:4]
    assert any(line.startswith("# Run:") and f"ldm run {name}" in line for line in head)
    assert any(line.startswith("# Needs:") for line in head)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.base.trian.steps=4", r"models\.base\.trian \(--set\): unknown key 'trian'; did you mean 'train'\?"),
        ("select.where.0.opp=1", r"select\.where\.0\.opp \(--set\): unknown key 'opp'; did you mean 'op'\?"),
        ("models.base.train.steps=abc", r"models\.base\.train\.steps \(--set\): .*valid integer, got \"abc\""),
        ("models.base.train.steps=0", "greater than 0, got 0"),
        ("models.base.train.lanes=5", r"lanes \(5\) must divide global_batch_size \(32\)"),
        ("models.base.first_stage=foo", r"'foo' is no autoencoder model of this recipe; it has \['autoencoder'\]"),
        ("release.model=autoencoder", "is no text_to_image model"),
        ("source.kind=magic", "'magic' found using 'kind' does not match any of the expected tags"),
        ("source.files=[a]", r"unknown key 'files'; known here: fault_rate"),
        ("select.where.7.op=in", r"'7' is no position in a list of 4"),
        ("name.x.y=1", "has no parts"),
        ("nonsense", r"expected dotted\.path=value"),
        ("execution.zero_stage=4", "1, 2 or 3, got 4"),
        ("acquire.image.encode_quality=95", "PNG's compression level here: 0 to 9, not 95"),
        ("models.Base.kind=autoencoder", "models.Base"),
    ],
)
def test_one_clear_message_for_each_mistake(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", [override])


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nmodels: {}\n")
    with pytest.raises(RecipeError, match=r"r\.yaml: source: missing"):
        load_recipe(str(path))


def test_a_duplicate_key_names_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: a\nmodels: {}\nname: b\n")
    with pytest.raises(RecipeError, match="line 3: duplicate key 'name', given before in line 1"):
        load_recipe(str(path))


def test_a_mistake_in_the_file_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe_text("quickstart")[1].replace("salt:", "salt:").replace("  port: 8377", "  prot: 8377"))
    line = path.read_text().splitlines().index("  prot: 8377") + 1
    with pytest.raises(RecipeError, match=rf"source\.prot \(line {line}\): unknown key 'prot'; did you mean 'port'"):
        load_recipe(str(path))


def test_yaml_1_2_scalars() -> None:
    recipe = load_recipe(
        "quickstart",
        ["models.base.train.optimizer.learning_rate=1e-4", "acquire.image.resize_mode=no", "description=2026-01-01"],
    )
    assert recipe.models["base"].train.optimizer.learning_rate == 1e-4
    assert recipe.acquire.image.resize_mode == "no"
    assert recipe.description == "2026-01-01"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("path: a, captions: sidecars", r"source\.captions.*'sidecar', 'filename' or 'metadata', got \"sidecars\""),
        ("path: a, keep_columns: [licence]", r"source.*columns of metadata; captions is 'sidecar': set it to metadata"),
        ("path: ''", r"source\.path.*at least 1 character"),
        ("captions: filename", r"source\.path \(line 3\): missing"),
        ("path: a, files: [b]", r"source\.files.*unknown key 'files'"),
    ],
)
def test_a_folder_that_is_described_wrongly(tmp_path: Path, keys: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"name: r\nmodels: {{}}\nsource: {{kind: folder, {keys}}}\n")
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "a recipe is a mapping"),
        ("a: [", "not valid YAML"),
        ("1: x", "a key must be a word"),
        ("", "mapping"),
    ],
)
def test_what_is_no_recipe_says_so(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path))


def test_unknown_names_and_files() -> None:
    with pytest.raises(RecipeError, match="did you mean 'quickstart'"):
        load_recipe("quickstrat")
    with pytest.raises(RecipeError, match=r"no file 'absent\.yaml'"):
        load_recipe("absent.yaml")


def test_every_key_has_a_place_in_the_schema() -> None:
    schema = Recipe.model_json_schema()
    assert schema["additionalProperties"] is False
    assert "description" in schema["$defs"]["TrainSpec"]["properties"]["max_minutes"]
