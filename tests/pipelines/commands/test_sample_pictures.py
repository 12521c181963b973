"""`ldm sample`: how a picture is sampled by default and when asked, what prompts files say, and where pictures go."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from filled import filled
from safetensors.torch import save_file
from sampled import facts_of, ldm_sample, pixels_of, write_models

from ldm.generate import text_to_image
from ldm.interchange import load_model, merge_lora
from pipelines.artifacts import file_sha256
from pipelines.commands.sample import run
from pipelines.commands.sample.models import RecipeSampling, find_model
from pipelines.commands.sample.request import Request
from pipelines.commands.sample.writing import check_places, write
from pipelines.errors import EXIT_USAGE, Interrupted
from pipelines.recipe.file import load_recipe
from pipelines.terminal.live import TerminalReport

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


def sampled(
    capsys: pytest.CaptureFixture[str], out: Path, *arguments: object, model: str = "text"
) -> tuple[list[Path], str]:
    """The files, and what was told."""
    code, shown, err = ldm_sample(capsys, model, *arguments, "--out", out)
    assert code == 0, err
    return [Path(line) for line in shown.splitlines()], err


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


# -- prompts files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", '\ufeffprompt,negative_prompt,seed\na,,\n"b, c",d,5\n'),
        ("rows.jsonl", '{"prompt": "a"}\n\n{"prompt": "b, c", "negative_prompt": "d", "seed": 5}\n'),
    ],
)
def test_a_row_of_a_prompts_file_wins_over_the_options(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str,
) -> None:
    monkeypatch.chdir(models)
    (tmp_path / name).write_text(content, encoding="utf-8")
    rows = ["--prompts-file", tmp_path / name, "--count", 2, "--seed", 70, *STEPS]
    made, told = sampled(capsys, tmp_path / "rows", *rows)
    facts = [facts_of(file) for file in made]
    keys = ("prompt", "negative_prompt", "seed")
    expected = [("a", None, "70"), ("a", None, "71"), ("b, c", "d", "5"), ("b, c", "d", "6")]
    assert [tuple(each.get(key) for key in keys) for each in facts] == expected
    assert ("empty lines are skipped, 1 of 3" in told) == (name == "rows.jsonl")

    made, _ = sampled(capsys, tmp_path / "options", *rows, "--negative-prompt", "of all")
    assert [facts_of(file)["negative_prompt"] for file in made] == ["of all", "of all", "d", "d"]


def test_a_row_without_a_negative_prompt_goes_away_from_no_words_beside_one_that_has_one(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SDXL's empty condition is zeros, and not the empty prompt."""
    monkeypatch.chdir(models)
    (tmp_path / "rows.csv").write_text("prompt,negative_prompt\na,\na,b\n")
    mixed, _ = sampled(capsys, tmp_path / "mixed", "--prompts-file", tmp_path / "rows.csv", *STEPS, model="xl")
    alone, _ = sampled(capsys, tmp_path / "alone", "--prompt", "a", *STEPS, model="xl")
    empty, _ = sampled(capsys, tmp_path / "empty", "--prompt", "a", "--negative-prompt", "", *STEPS, model="xl")
    assert np.array_equal(pixels_of(mixed[0]), pixels_of(alone[0]))
    assert not np.array_equal(pixels_of(empty[0]), pixels_of(alone[0]))


def test_a_text_file_has_a_prompt_a_line(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    (tmp_path / "prompts.txt").write_text("  a, with commas \r\n\nb\n", newline="")
    made, told = sampled(capsys, tmp_path / "made", "--prompts-file", tmp_path / "prompts.txt", *STEPS)
    assert [facts_of(file)["prompt"] for file in made] == ["a, with commas", "b"]
    assert "prompts.txt: empty lines are skipped, 1 of 3" in told


# -- where pictures go -------------------------------------------------------------------------------------------------


def test_pictures_are_replaced_only_when_that_is_asked_for(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    made, _ = sampled(capsys, tmp_path / "out", "--prompt", "a", *STEPS, "--grid", tmp_path / "out/grid.png")
    before = {file: file.read_bytes() for file in made}
    again = ["text", "--prompt", "a", "--seed", 1, *STEPS, "--out", tmp_path / "out"]
    code, _, err = ldm_sample(capsys, *again)
    assert code == EXIT_USAGE
    assert "00000.png is there already: give another place, or --overwrite" in err
    assert {file: file.read_bytes() for file in made} == before
    code, _, err = ldm_sample(capsys, *again, "--overwrite")
    assert code == 0, err
    assert facts_of(made[0])["seed"] == "1"
    assert sorted((tmp_path / "out").iterdir()) == sorted(made)


def test_pictures_are_written_as_they_are_made_and_lines_say_how_far_it_is(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    prompts = ["--prompt", "a", "--count", 3, "--batch-size", 2, *STEPS]
    _, told = sampled(capsys, tmp_path / "out", *prompts)
    lines = told.splitlines()
    assert lines[1:3] == ["loading text", "sample: started"]
    assert any(line.startswith("sample: 4/4 steps  100%") for line in lines)
    assert lines[-1] == "sample: 3/3 pictures"

    (tmp_path / "late").mkdir()
    sizes = sampled_until(tmp_path / "late", capsys, *prompts)
    assert sizes == ["00000.png", "00001.png"]


def sampled_until(out: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """What is there when the third picture finds its place taken by another."""
    taken = out / "00002.png"
    with pytest.MonkeyPatch.context() as patch:

        def check_then_take(request: Request, count: int) -> None:
            check_places(request, count)
            taken.write_bytes(b"another's")

        patch.setattr(run, "check_places", check_then_take)
        code, _, err = ldm_sample(capsys, "text", *arguments, "--out", out)
    assert code == EXIT_USAGE
    assert "00002.png has been written by another meanwhile" in err
    assert taken.read_bytes() == b"another's"
    return sorted(file.name for file in out.iterdir() if file != taken)


def test_stopped_it_says_how_many_pictures_there_are(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(image: torch.Tensor, file: Path, facts: dict[str, object], *, overwrite: bool) -> None:
        if file.name == "00001.png":
            raise KeyboardInterrupt
        write(image, file, facts, overwrite=overwrite)

    monkeypatch.setattr(run, "write", stopped)
    request = Request(str(models / "text"), tmp_path / "out", prompts=["a"], count=3, steps=2)
    with pytest.raises(Interrupted, match="interrupted; 1 of 3 pictures are in"):
        run.sample(request, TerminalReport(StringIO(), watch=False))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["00000.png"]


def test_on_a_terminal_a_bar_shows_steps_and_pictures(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    run.sample(Request(str(models / "text"), tmp_path / "out", prompts=["a"], steps=2), TerminalReport(stream))
    assert "\x1b[" in stream.getvalue()
    assert "2/2 steps" in stream.getvalue()
    assert "sample: 1/1 pictures" not in stream.getvalue()  # a line of plain output
