"""`ldm sample`: how a picture is sampled by default and when asked, by which weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from filled import filled
from PIL import Image
from safetensors.torch import load_file, save_file
from sampled import facts_of, ldm_sample, pixels_of, sampled, write_models

from ldm.generate import text_to_image
from ldm.interchange import LAYOUTS, layout_of, load_model, load_single_file, merge_lora, save_single_file
from pipelines.artifacts import file_sha256
from pipelines.commands.sample.models import RecipeSampling, find_model
from pipelines.errors import EXIT_USAGE
from pipelines.recipe.file import load_recipe

STEPS = ["--steps", 2]
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
    sampling: {prompts: [red heart], sampler: ddim, steps: 3, guidance_scale: 2}
release: {model: base}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    loaded = load_model(folder / "text")
    layer = loaded.unet.get_parameter("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight")
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
    drawn = [
        torch.randn(shape, generator=torch.Generator().manual_seed(7))
        for shape in ((2, layer.shape[1]), (layer.shape[0], 2))
    ]
    save_file(
        {f"{name}{end}.weight": value for end, value in zip("AB", drawn, strict=True)}, folder / "lora.safetensors"
    )
    return folder


def test_the_folder_s_scheduler_is_used_and_told_unless_another_is_asked_for(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    own, told = sampled(capsys, tmp_path / "own", "--prompt", "a", model="ancestral")
    line = "sampling: euler_ancestral, trailing spacing (the folder's); 20 steps, guidance scale 3 (by default)"
    assert line in told.splitlines()
    facts = facts_of(own[0])
    assert (facts["sampler"], facts["spacing"], facts["steps"]) == ("euler_ancestral", "trailing", "20")
    model = load_model(models / "ancestral").for_inference()
    assert np.array_equal(pixels_of(own[0]), text_to_image(model, ["a"], seeds=[0])[0])

    asked, told = sampled(
        capsys,
        tmp_path / "asked",
        "--prompt",
        "a",
        "--sampler",
        "ddim",
        "--spacing",
        "leading",
        "--steps",
        3,
        model="ancestral",
    )
    assert "sampling: ddim, leading spacing, 3 steps (as asked); guidance scale 3 (by default)" in told.splitlines()
    expected = text_to_image(model, ["a"], seeds=[0], sampler="ddim", spacing="leading", steps=3)[0]
    assert np.array_equal(pixels_of(asked[0]), expected)


def test_a_recipe_s_release_samples_as_the_recipe_does(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("urls.csv").write_text("url,caption\nhttps://example.org/1.png,one\n")
    Path("mine.yaml").write_text(RECIPE)
    folder = models / "ancestral"
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    released = filled(load_recipe("mine.yaml"), files=files)["release"]

    made, told = sampled(capsys, tmp_path / "made", "--prompt", "a", model="mine.yaml")
    assert "sampling: ddim, 3 steps, guidance scale 2 (the recipe's)" in told.splitlines()
    facts = facts_of(made[0])
    assert [facts[name] for name in ("sampler", "steps", "guidance_scale")] == ["ddim", "3", "2.0"]
    assert "spacing" not in facts  # the sampler's own, as in `evaluate`, and not the folder's
    model = load_model(folder).for_inference()
    model.spacing = None
    expected = text_to_image(model, ["a"], seeds=[0], sampler="ddim", steps=3, guidance_scale=2.0)[0]
    assert np.array_equal(pixels_of(made[0]), expected)

    _, told = sampled(
        capsys, tmp_path / "asked", "--prompt", "a", "--steps", 2, "--guidance-scale", 4, model="mine.yaml"
    )
    assert "sampling: ddim (the recipe's); 2 steps, guidance scale 4 (as asked)" in told.splitlines()
    location = released.store.location(f"release/units/{released.units[0].key}")
    _, told = sampled(capsys, tmp_path / "folder", "--prompt", "a", *STEPS, model=location)
    assert "euler_ancestral, trailing spacing (the folder's)" in told

    def location_of(*_: object) -> str:
        return location

    monkeypatch.setattr("pipelines.commands.sample.models.location_of", location_of)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    found = find_model("models:/mine@champion")
    assert (str(found.path), found.sampling) == (location, RecipeSampling("ddim", 3, 2.0))


def test_a_lora_is_merged_at_its_scale_and_told_in_the_picture(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    given = {"without": [], "none": ["--lora", "lora.safetensors:0"], "whole": ["--lora", "lora.safetensors"]}
    given["halves"] = ["--lora", "lora.safetensors:0.5"] * 2
    made = {
        name: sampled(capsys, tmp_path / name, "--prompt", "a", *STEPS, *loras)[0][0] for name, loras in given.items()
    }
    pictures = {name: pixels_of(file).astype(int) for name, file in made.items()}
    assert np.array_equal(pictures["without"], pictures["none"])
    assert np.abs(pictures["without"] - pictures["whole"]).max() > 5
    # Rounded twice, once for each half: a grey level at most.
    assert np.abs(pictures["halves"] - pictures["whole"]).max() <= 1
    model = load_model(models / "text")
    merge_lora(model, models / "lora.safetensors", 1.0)
    expected = text_to_image(model.for_inference(), ["a"], seeds=[0], steps=2)[0]
    assert np.array_equal(pixels_of(made["whole"]), expected)
    sha256 = file_sha256(models / "lora.safetensors")
    told = [json.loads(facts_of(made[name]).get("loras", "[]")) for name in ("without", "whole", "halves")]
    assert told == [[], [{"sha256": sha256, "scale": 1.0}], [{"sha256": sha256, "scale": 0.5}] * 2]
    save_file({"unet.nowhere.to_q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "alien.safetensors")
    alien = ["--lora", tmp_path / "alien.safetensors", "--out", tmp_path / "other"]
    code, _, err = ldm_sample(capsys, "text", "--prompt", "a", *alien)
    assert code == EXIT_USAGE
    assert f"error: --lora: {tmp_path}/alien.safetensors has unet.nowhere" in err
    assert not (tmp_path / "other").exists()


def test_a_single_file_makes_the_folder_s_pictures_and_a_pickle_is_read_once_when_allowed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = load_model(models / "text")
    monkeypatch.setitem(LAYOUTS, "tiny", layout_of(model))
    monkeypatch.setattr("ldm.interchange.single_file._tokenizer", lambda _: model.text_encoder.tokenizer)  # type: ignore[attr-defined]
    save_single_file(model, Path("tiny.safetensors"), layout_kept=True)
    torch.save(load_file("tiny.safetensors"), "tiny.ckpt")
    asked = ["--prompt", "a", "--sampler", "ddim", "--spacing", "trailing", *STEPS]
    own, _ = sampled(capsys, tmp_path / "own", *asked, model=str(models / "text"))
    read = []

    def counted(*arguments: object, **named: object) -> object:
        read.append(arguments[0])
        return load_single_file(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("pipelines.commands.sample.making.load_single_file", counted)
    for name, more in (("tiny.safetensors", []), ("tiny.ckpt", ["--allow-pickle"])):
        made, told = sampled(capsys, tmp_path / name[5:], *asked, *more, model=name)
        assert np.array_equal(pixels_of(made[0]), pixels_of(own[0]))
        assert facts_of(made[0])["model"] == file_sha256(Path(name))
    assert read == [Path("tiny.safetensors"), Path("tiny.ckpt")]
    _, told = sampled(capsys, tmp_path / "default", "--prompt", "a", *STEPS, model="tiny.safetensors")
    assert "sampling: dpmpp_2m, guidance scale 3 (by default); 2 steps (as asked)" in told.splitlines()


def test_a_variant_is_read_where_a_network_has_it_and_told_where_none_has(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "text", "text")
    unet = Path("text/unet/diffusion_pytorch_model.safetensors")
    save_file({name: value * 0.9 for name, value in load_file(unet).items()}, unet.with_suffix(".fp16.safetensors"))
    made, told = sampled(capsys, tmp_path / "fp16", "--prompt", "a", *STEPS, "--variant", "fp16")
    usual, _ = sampled(capsys, tmp_path / "usual", "--prompt", "a", *STEPS)
    assert not np.array_equal(pixels_of(made[0]), pixels_of(usual[0]))
    assert facts_of(made[0])["variant"] == "fp16"
    lines = [line for line in told.splitlines() if "no files of variant fp16" in line]
    assert [line.split()[0] for line in lines] == ["text/vae", "text/text_encoder"]


def test_an_image_is_taken_upright(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    with Image.open("image.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise
        image.save(tmp_path / "turned.png", exif=exif)
        image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    made = [
        sampled(capsys, tmp_path / name, "--prompt", "a", *STEPS, "--image", tmp_path / f"{name}.png")[0][0]
        for name in ("turned", "upright")
    ]
    assert np.array_equal(pixels_of(made[0]), pixels_of(made[1]))


def test_a_picture_names_the_image_that_was_read_also_where_another_took_its_place(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    given = tmp_path / "out" / "00000.png"
    given.parent.mkdir()
    given.write_bytes(Path("image.png").read_bytes())
    sha256 = file_sha256(given)
    made, _ = sampled(
        capsys, tmp_path / "out", "--prompt", "a", *STEPS, "--image", given, "--count", 2, "--batch-size", 1,
        "--overwrite",
    )  # fmt: skip
    assert file_sha256(given) != sha256
    assert [facts_of(path)["image_sha256"] for path in made] == [sha256] * 2
