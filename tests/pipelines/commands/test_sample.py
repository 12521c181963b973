"""`ldm sample`: what MODEL may be, and each of its tasks."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from filled import filled
from sampled import KINDS, facts_of, ldm_sample, pixels_of, write_models

from infra.registry import ModelFacts, RegistryError
from infra.storage import Store
from infra.tracking import Tracker, TrackingSpec
from ldm.interchange import model_hash
from pipelines.artifacts import Counts
from pipelines.commands.sample.models import find_model
from pipelines.errors import UsageError
from pipelines.publishing import publish_unit
from pipelines.recipe.errors import RecipeError
from pipelines.recipe.file import load_recipe

# MLflow 3.17 maps its tables in a way that SQLAlchemy 2.1 gives up.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def test_a_registered_model_leads_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UsageError, match=r"no ldm-state/mlflow\.db here"):
        find_model("models:/quickstart@champion")

    store = Store(tmp_path / "store")
    publish_unit(store, "release", "abc", {"model_index.json": b"{}", "unet/config.json": b"{}"}, Counts(1, 1))
    run = Tracker(TrackingSpec(None, "quickstart", tmp_path / "ldm-state")).start_run("run")
    run.model(ModelFacts("a" * 32, store.location("release/units/abc"), "f" * 64))
    assert run.finish(timeout_s=120)

    folder = find_model("models:/quickstart@champion").path
    assert folder == tmp_path / "store/release/units/abc"
    assert (folder / "model_index.json").is_file()
    with pytest.raises(RegistryError, match="no model 'quickstart' with alias 'best'"):
        find_model("models:/quickstart@best")
    with pytest.raises(UsageError, match="models:/NAME@ALIAS"):
        find_model("models:/quickstart/1")
    store.delete("release/units/abc")
    with pytest.raises(UsageError, match="where no model is"):
        find_model("models:/quickstart@candidate")


RECIPE = """
name: mine
source: {kind: urls, files: [urls.csv]}
report: false
models:
  autoencoder: {kind: autoencoder, network: {block_out_channels: [8, 8], norm_num_groups: 4}, train: {steps: 3}}
  base:
    kind: text_to_image
    first_stage: autoencoder
    network: {block_out_channels: [32, 32], cross_attention: [false, true]}
    train: {steps: 3}
    sampling: {prompts: [red heart]}
release: {model: base}
"""


def test_a_recipe_means_its_newest_release_or_the_one_with_these_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("urls.csv").write_text("url,caption\nhttps://example.org/1.png,one\n")
    Path("mine.yaml").write_text(RECIPE)
    told: list[str] = []
    with pytest.raises(UsageError, match=r"has released no model yet .*`ldm run mine\.yaml` makes one"):
        find_model("mine.yaml", (), told.append)
    released = {}
    for seed in (1, 2):
        recipe = load_recipe("mine.yaml", [f"models.base.train.seed={seed}"])
        released[seed] = filled(recipe, files={"model_index.json": b"{}"})["release"]

    folder = find_model("mine.yaml", (), told.append).path  # the recipe as it is has none
    assert folder == Path(released[2].store.location(f"release/units/{released[2].units[0].key}"))
    finished = released[2].manifest["finished_at"].replace("T", " ").replace("Z", " UTC")
    assert told == [f"model: release {released[2].revision[:12]} of mine, made {finished}"]
    folder = find_model("mine.yaml", ["models.base.train.seed=1"], told.append).path
    assert folder == Path(released[1].store.location(f"release/units/{released[1].units[0].key}"))
    assert told[1].startswith(f"model: release {released[1].revision[:12]} of mine, made ")
    with pytest.raises(UsageError, match=r"`ldm run mine\.yaml --set models\.base\.train\.seed=3` makes one"):
        find_model("mine.yaml", ["models.base.train.seed=3"], told.append)
    with pytest.raises(UsageError, match=r"--set with .*: leave it out, it is of recipes"):
        find_model(str(folder), ["models.base.train.seed=1"], told.append)
    with pytest.raises(RecipeError, match="unknown key"):
        find_model("mine.yaml", ["models.base.train.sead=1"], told.append)


# -- tasks, with tiny models that stock diffusers saved ----------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


STEPS = ["--steps", 2]
TASKS: list[tuple[list[object], list[int], dict[str, object]]] = [
    (["text", "--prompt", "a", "--prompt", "b", *STEPS], [16, 16], {"sampler": "dpmpp_2m", "spacing": "linspace"}),
    (["text", "--prompt", "a", "--count", 3, *STEPS, "--size", "16x24"], [24, 24, 24], {}),
    (["text", "--prompt", "a", "--negative-prompt", "b", *STEPS], [16], {"negative_prompt": "b"}),
    (["text", "--prompt", "a", "--guidance-scale", 1, *STEPS], [16], {"guidance_scale": 1.0}),
    (["text", "--prompt", "a", "--guidance-rescale", 0.5, *STEPS], [16], {"guidance_rescale": 0.5}),
    (["text", "--prompt", "a", "--guidance-interval", "0,.5", *STEPS], [16], {"guidance_interval": [0.0, 0.5]}),
    (["text", "--prompt", "a", "--threshold", ".9,1", *STEPS], [16], {"threshold": [0.9, 1.0]}),
    (["text", "--prompt", "a", "--weak", "text", "--sampler", "ddim", "--eta", 1, *STEPS], [16],
     {"sampler": "ddim", "spacing": "linspace", "eta": 1.0, "weak": "text"}),
    (["text", "--prompt", "a", "--sampler", "euler", "--spacing", "karras", *STEPS], [16],
     {"sampler": "euler", "spacing": "karras"}),
    (["text", "--prompt", " a" * 99, "--long-prompts", "chunks", *STEPS], [16], {"long_prompts": "chunks"}),
    (["text", "--prompt", "a", "--image", "image.png", "--strength", 0.5, "--steps", 4], [16], {"strength": 0.5}),
    (["text", "--prompt", "a", "--prompt", "b", "--image", "image.png", *STEPS], [16, 16], {"strength": 0.6}),
    (["text", "--prompt", "a", "--image", "image.png", "--mask", "mask.png", *STEPS], [16], {"strength": 1.0}),
    (["inpaint", "--prompt", "a", "--image", "image.png", "--mask", "mask.png", *STEPS], [16], {}),
    (["upscale", "--prompt", "a", "--image", "small.png", "--noise-level", 5, *STEPS], [16], {"noise_level": 5}),
    (["vary", "--image", "larger.png", "--count", 2, *STEPS, "--size", "16x16"], [16, 16], {}),
    (["text", "--prompt", "a", "--upscaler", "upscale", *STEPS], [32],
     {"upscalers": [{"model": "upscale", "sampler": "dpmpp_2m", "spacing": "linspace"}], "noise_level": 20}),
    (["text", "--prompt", "a", "--refiner", "text", "--refine-from", 0.5, "--steps", 4], [16],
     {"refiner": {"model": "text", "sampler": "dpmpp_2m", "spacing": "linspace"}, "refine_from": 0.5}),
    (["xl", "--prompt", "a", "--refiner", "refiner", "--aesthetic-score", 7, "--steps", 6], [16],
     {"aesthetic_score": 7.0, "refine_from": 0.8}),
    (["xl", "--prompt", "a", "--original-size", "8x8", "--crop", "2x3", *STEPS], [16],
     {"original_size": [8, 8], "crop": [2, 3]}),
    (["text", "--prompt", "a", "--dtype", "bfloat16", "--device", "cpu", *STEPS], [16], {"dtype": "bfloat16"}),
    (["text", "--prompt", "a", "--count", 3, "--batch-size", 2, "--max-pixels", 256, *STEPS], [16] * 3, {}),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "sides", "facts"), TASKS, ids=lambda value: str(value)[:60])
def test_every_task_on_the_command_line(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    sides: list[int],
    facts: dict[str, object],
) -> None:
    monkeypatch.chdir(models)
    code, out, err = ldm_sample(capsys, *arguments, "--seed", 7, "--out", tmp_path, "--grid", tmp_path / "grid.png")
    assert code == 0, err
    *files, grid = map(Path, out.split())
    assert grid.name == "grid.png"
    assert sorted(tmp_path.iterdir()) == sorted([*files, grid, *tmp_path.glob("cache")])
    prompts = [after for option, after in pairwise(arguments) if option == "--prompt"]
    for number, (file, side) in enumerate(zip(files, sides, strict=True)):
        told = facts_of(file)
        assert pixels_of(file).shape[1] == side
        assert told["model"] == model_hash(models / str(arguments[0]))
        assert (told["seed"], told["steps"]) == (str(7 + number), str(arguments[arguments.index("--steps") + 1]))
        assert told.get("prompt") == (prompts[min(number, len(prompts) - 1)] if prompts else None)
        for name, value in facts.items():
            assert told[name] == value or json.loads(hashes_as_names(told[name], models)) == value, name


def hashes_as_names(text: str, models: Path) -> str:
    for name in KINDS:
        text = text.replace(model_hash(models / name), name)
    return text if text.startswith(("[", "{")) or text[0].isdigit() else json.dumps(text)
