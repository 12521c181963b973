"""`ldm sample`: what MODEL may be, and each of its tasks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from filled import filled
from PIL import Image
from stock import stock_pipeline

from infra.registry import ModelFacts, RegistryError
from infra.storage import Store
from infra.tracking import Tracker, TrackingSpec
from ldm.interchange import model_hash
from pipelines.artifacts import Counts
from pipelines.cli import main
from pipelines.commands.sample.models import resolve_model
from pipelines.errors import EXIT_USAGE, UsageError
from pipelines.publishing import publish_unit
from pipelines.recipe.errors import RecipeError
from pipelines.recipe.file import load_recipe

# MLflow 3.17 maps its tables in a way that SQLAlchemy 2.1 gives up.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def test_a_registered_model_leads_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UsageError, match=r"no ldm-state/mlflow\.db here"):
        resolve_model("models:/quickstart@champion")

    store = Store(tmp_path / "store")
    publish_unit(store, "release", "abc", {"model_index.json": b"{}", "unet/config.json": b"{}"}, Counts(1, 1))
    run = Tracker(TrackingSpec(None, "quickstart", tmp_path / "ldm-state")).start_run("run")
    run.model(ModelFacts("a" * 32, store.location("release/units/abc"), "f" * 64))
    assert run.finish(timeout_s=120)

    folder = resolve_model("models:/quickstart@champion")
    assert folder == tmp_path / "store/release/units/abc"
    assert (folder / "model_index.json").is_file()
    with pytest.raises(RegistryError, match="no model 'quickstart' with alias 'best'"):
        resolve_model("models:/quickstart@best")
    with pytest.raises(UsageError, match="models:/NAME@ALIAS"):
        resolve_model("models:/quickstart/1")
    store.delete("release/units/abc")
    with pytest.raises(UsageError, match="where no model is"):
        resolve_model("models:/quickstart@candidate")


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
        resolve_model("mine.yaml", (), told.append)
    released = {}
    for seed in (1, 2):
        recipe = load_recipe("mine.yaml", [f"models.base.train.seed={seed}"])
        released[seed] = filled(recipe, files={"model_index.json": b"{}"})["release"]

    folder = resolve_model("mine.yaml", (), told.append)  # the recipe as it is has none
    assert folder == Path(released[2].store.location(f"release/units/{released[2].units[0].key}"))
    finished = released[2].manifest["finished_at"].replace("T", " ").replace("Z", " UTC")
    assert told == [f"model: release {released[2].revision[:12]} of mine, made {finished}"]
    folder = resolve_model("mine.yaml", ["models.base.train.seed=1"], told.append)
    assert folder == Path(released[1].store.location(f"release/units/{released[1].units[0].key}"))
    assert told[1].startswith(f"model: release {released[1].revision[:12]} of mine, made ")
    with pytest.raises(UsageError, match=r"`ldm run mine\.yaml --set models\.base\.train\.seed=3` makes one"):
        resolve_model("mine.yaml", ["models.base.train.seed=3"], told.append)
    with pytest.raises(UsageError, match=r"--set with .*: leave it out, it is of recipes"):
        resolve_model(str(folder), ["models.base.train.seed=1"], told.append)
    with pytest.raises(RecipeError, match="unknown key"):
        resolve_model("mine.yaml", ["models.base.train.sead=1"], told.append)


# -- tasks, with tiny models that stock diffusers saved ----------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, kind in (("text", ""), ("inpaint", "Inpaint"), ("upscale", "Upscale"), ("vary", "ImageVariation")):
        stock_pipeline(f"StableDiffusion{kind}Pipeline").save_pretrained(folder / name)
    random = np.random.default_rng(0)
    for name, side in (("small", 8), ("image", 16), ("larger", 32)):
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(folder / f"{name}.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    mask.save(folder / "mask.png")
    return folder


def ldm(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["ldm", "sample", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "sides"),
    [
        (["text", "--prompt", "a", "--prompt", "b", "--steps", 2], [16, 16]),
        (["text", "--prompt", "a", "--count", 3, "--steps", 2, "--size", "16x24"], [24, 24, 24]),
        (["text", "--prompt", "a", "--image", "image.png", "--strength", 0.5, "--steps", 4], [16]),
        (["text", "--prompt", "a", "--image", "image.png", "--mask", "mask.png", "--steps", 2], [16]),
        (["inpaint", "--prompt", "a", "--image", "image.png", "--mask", "mask.png", "--steps", 2], [16]),
        (["upscale", "--prompt", "a", "--image", "small.png", "--noise-level", 5, "--steps", 2], [16]),
        (["vary", "--image", "larger.png", "--count", 2, "--steps", 2, "--size", "16x16"], [16, 16]),
        (["text", "--prompt", "a", "--upscaler", "upscale", "--steps", 2], [32]),
        (["text", "--prompt", "a", "--weak", "text", "--sampler", "ddim", "--eta", 1, "--steps", 2], [16]),
        (["text", "--prompt", "a", "--refiner", "text", "--refine-from", 0.5, "--steps", 4], [16]),
        (["text", "--prompt", " a" * 99, "--long-prompts", "chunks", "--steps", 2], [16]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_every_task_on_the_command_line(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    sides: list[int],
) -> None:
    monkeypatch.chdir(models)
    code, out, err = ldm(capsys, *arguments, "--seed", 7, "--out", tmp_path, "--grid", tmp_path / "grid.png")
    assert code == 0, err
    *files, grid = map(Path, out.split())
    assert grid.name == "grid.png"
    for number, (file, side) in enumerate(zip(files, sides, strict=True)):
        with Image.open(file) as picture:
            facts, width = picture.text, picture.width
        assert width == side
        assert facts["model"] == model_hash(models / str(arguments[0]))
        assert (facts["seed"], facts["steps"]) == (str(7 + number), str(arguments[arguments.index("--steps") + 1]))
        assert facts["sampler"] == ("ddim" if "ddim" in arguments else "dpmpp_2m")
        prompts = [after for option, after in pairwise(arguments) if option == "--prompt"]
        assert facts.get("prompt") == (prompts[min(number, len(prompts) - 1)] if prompts else None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text"], "no prompts: give --prompt"),
        (["vary", "--prompt", "a"], "--prompt with vary: leave it out"),
        (["vary"], "give --image"),
        (["upscale", "--prompt", "a"], "makes images larger: give --image"),
        (["text", "--prompt", "a", "--mask", "mask.png"], "--mask with text: leave it out, no image is given"),
        (["text", "--prompt", "a", "--image", "model_index.json"], "model_index.json can't be read"),
        (["text", "--prompt", "a", "--image", "image.png", "--image", "small.png"], "must be of one size"),
        (["text", "--prompt", "a", "--size", "big"], "--size big: must be two numbers of pixels"),
        (["text", "--prompt", "a", "--guidance-interval", "1"], "--guidance-interval 1: must be two numbers"),
        (["text", "--prompt", "a", "--sampler", "magic"], "sampler 'magic' is unknown"),
        (["text", "--prompt", "a", "--device", "cuda"], "has 0 CUDA devices"),
        (["text", "--prompt", "a", "--prediction", "v"], "--prediction v with a folder"),
        (["text", "--prompt", "a", "--upscaler", "text"], "--upscaler text: the model is no upscaler"),
        (["text", "--prompt", "a", "--upscaler", "nothing"], "'nothing' is neither"),
        (["text", "--prompt", "a", "--device", "tpu"], "--device tpu: must be auto, cpu, cuda"),
        (["text", "--prompt", "a", "--seed", "99999999999999999999"], "must be from 0 to below 2^63"),
        (["text", "--prompt", "a", "--noise-level", "5"], "--noise-level without"),
        (["text", "--prompt", "a", "--refine-from", "0.5"], "--refine-from without --refiner"),
        (["text", "--prompt", "a", "--long-prompts", "chuncks"], "long_prompts = 'chuncks'"),
        (["text", "--prompt", "a", "--grid", "mask.png/grid.png"], "--grid: mask.png is no folder"),
        (["text", "--prompt", "a", "--max-pixels", "9"], "max_pixels = 9"),
        (["inpaint", "--prompt", "a"], "the U-Net takes 9 channels, and this task gives it 4"),
        (["vary", "--image", "larger.png", "--upscaler", "upscale"], "--upscaler with vary: leave it out"),
        (["absent.safetensors", "--prompt", "a"], "neither a folder nor a recipe"),
    ],
)
def test_what_can_not_be_asked_for_is_one_clear_error(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(models)
    code, _, err = ldm(capsys, *arguments, "--steps", 1, "--out", tmp_path / "out")
    assert code == EXIT_USAGE
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
