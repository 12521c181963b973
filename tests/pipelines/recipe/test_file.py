from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.recipe.errors import RecipeError
from pipelines.recipe.file import checked_recipe, load_recipe, recipe_text, shipped_recipes


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
        ("select.where.0.opp=1", r"select\.where\.0\.opp \(caption_too_long, --set\): unknown key 'opp'; did you mean"),
        ("select.where.0.op=sort_of", r"select\.where\.0\.op \(caption_too_long, --set\): must be one of ==, !=, >,"),
        ("models.base.train.steps=abc", r"models\.base\.train\.steps \(--set\): must be a whole number, got \"abc\""),
        ("models.base.train.steps=0", "must be 1 or more, got 0"),
        ("models.base.first_stage=foo", r"first_stage \(--set\): 'foo' is no autoencoder model of this recipe; it has"),
        ("release.model=autoencoder", "is no text_to_image model"),
        ("source.kind=magic", r"source\.kind \(--set\): must be one of gallery, urls, folder, got \"magic\""),
        ("source.kind=folders", "did you mean 'folder'"),
        ("models.new={}", r"models\.new\.kind \(--set\): missing; one of autoencoder, clip, text_to_image"),
        ("models.base=5", r"models\.base \(--set\): must be a block of keys, got 5"),
        ("source.files=[a]", r"unknown key 'files'; known here: fault_rate"),
        ("select.where.7.op=in", r"'7' is no position in a list of 4"),
        ("select.where.².op=in", r"'²' is no position in a list of 4"),
        (f"select.where.{'9' * 5000}.op=in", "is no position in a list of 4"),
        ("name.x.y=1", "has no parts"),
        (".name=x", r"expected dotted\.path=value"),
        ("models..base=x", r"expected dotted\.path=value"),
        ("models.\udcff=1", r"expected dotted\.path=value"),
        ("source=!!map [a]", "a value is not of the kind that its tag says"),
        ("models.bas.train.steps=5", r"models\.bas\.kind \(--set\): missing; .*; did you mean models\.base\?"),
        ("execution.zero_stage='1'", r"must be one of 1, 2, 3, got \"1\"$"),
        ("nonsense", r"expected dotted\.path=value"),
        ("models.base.train.steps=[", r"--set 'models\.base\.train\.steps=\[': the value is not valid YAML"),
        ("source={port: 1, port: 2}", r"--set 'source=.*duplicate key 'port'"),
        ("execution.zero_stage=4", "must be one of 1, 2, 3, got 4"),
        ("models.base.train.optimizer.betas=[0.9]", r"betas\.1.*: missing; the list must have more entries"),
        ("models.base.train.optimizer.betas=[0.9, 1.0]", r"betas\.1 .*: must be below 1, got 1"),
        ("models.base.train.ema_decay=1", r"ema_decay .*: must be below 1, got 1"),
        ("models.base.train.optimizer.learning_rate=1e999", "must be a finite number"),
        (
            "models.base.train.seed=99999999999999999999",
            "must be below 9,007,199,254,740,992, got 99999999999999999999",
        ),
        ("models.Base.kind=autoencoder", "models.Base"),
        ("name=Über", "must be lower-case letters, digits, _ and -"),
        ("description=5", r"must be text \(put it in quotes\), got 5"),
    ],
)
def test_one_clear_message_for_each_mistake(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", [override])


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(RecipeError, match=r"quickstart \(shipped\): 3 errors") as told:
        load_recipe("quickstart", ["source.prot=1", "models.base.train.steps=-1", "select.where.1.name=7"])
    assert [line.split()[0] for line in str(told.value).splitlines()[1:]] == [
        "source.prot",
        "select.where.1.name",
        "models.base.train.steps",
    ]


def test_a_block_that_is_null_can_be_set_from_outside(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ["models.base.evaluate=null", "models.base.evaluate.images=5"])
    assert recipe.models["base"].evaluate.images == 5


def test_what_does_not_go_together_is_placed_in_the_file_too(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe_text("quickstart")[1].replace("size_px: 64", "size_px: 50").replace("ranks: 2", "ranks: 3"))
    lines = path.read_text().splitlines()
    image = next(number for number, line in enumerate(lines, 1) if "size_px: 50" in line)
    ranks = next(number for number, line in enumerate(lines, 1) if "ranks: 3" in line)
    load_recipe(str(path))
    with pytest.raises(RecipeError) as told:
        checked_recipe(str(path), ["models.base.sampling.sampler=plms"])
    message = str(told.value)
    assert f"acquire.image.size_px (line {image}): 50 px" in message
    assert f"execution.ranks (line {ranks}): 3 ranks" in message
    assert "models.base.sampling.sampler (--set): plms with a flow" in message


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_pass_every_check(name: str) -> None:
    assert checked_recipe(name).notes == []


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
        ("path: a, captions: sidecars", r"source\.captions.*one of sidecar, filename, metadata, got \"sidecars\"; did"),
        ("path: ''", r"source\.path.*must be a text that is not empty"),
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
    with pytest.raises(RecipeError, match="no recipe 'aaa"):
        load_recipe("a" * 5000)
