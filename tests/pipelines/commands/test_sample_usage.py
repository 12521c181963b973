"""`ldm sample` that can't be: each wrong usage is one message with the option's name, before any weights are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sampled import ldm_sample, set_scheduler, write_models

from pipelines.errors import EXIT_USAGE

PROMPTS: dict[str, str | bytes] = {
    "both.txt": "a\nb\n",
    "none.txt": "\n\n",
    "latin.txt": b"caf\xe9\n",
    "negative.csv": "prompt,negative_prompt\na,b\n",
    "typo.csv": "prompt,negative\na,b\n",
    "twice.csv": "prompt,prompt\na,b\n",
    "headless.csv": "a red apple\na green apple\n",
    "cells.csv": "prompt,seed\na, b,3\n",
    "empty.csv": "prompt,seed\n,3\n",
    "seed.csv": "prompt,seed\na,seven\n",
    "seed.jsonl": '{"prompt": "a", "seed": -1}\n',
    "true.jsonl": '{"prompt": "a", "seed": true}\n',
    "number.jsonl": '{"prompt": 7}\n',
    "broken.jsonl": '{"prompt": "a"}\n{"prompt": \n',
    "twice.jsonl": '{"prompt": "a", "prompt": "b"}\n',
    "list.jsonl": '["a"]\n',
    "typo.jsonl": '{"prompt": "a", "sed": 1}\n',
    "promptless.jsonl": '{"seed": 1}\n',
    "large.csv": "prompt,seed\na,9223372036854775807\n",
    "prompts.yaml": "- a\n",
}


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose JSON files are sound, and whose weights can't be read."""
    folder = tmp_path_factory.mktemp("unreadable")
    write_models(folder)
    for name in ("text", "refiner"):
        (folder / f"{name}-euler").mkdir()
        for file in (folder / name).rglob("*"):
            target = folder / f"{name}-euler" / file.relative_to(folder / name)
            target.mkdir(exist_ok=True) if file.is_dir() else target.write_bytes(file.read_bytes())
        set_scheduler(folder / f"{name}-euler", "EulerDiscreteScheduler")
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"no weights")
    for name, content in PROMPTS.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    save_file({"a": torch.zeros(2, 2)}, folder / "lora.safetensors")
    save_file({}, folder / "empty.safetensors")
    shapes = {"input_blocks.0.0.weight": (320, 4, 3, 3), "middle_block.1.attn2.to_k.weight": (1, 1024)}
    prefixed = {f"model.diffusion_model.{name}": np.zeros(shape, np.float16) for name, shape in shapes.items()}
    save_file({name: torch.from_numpy(value) for name, value in prefixed.items()}, folder / "sd2.safetensors")
    (folder / "pickle.ckpt").write_bytes(b"no pickle")
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(folder / "deep.png")
    (folder / "plain").mkdir()
    (folder / "taken").mkdir()
    (folder / "taken/00001.png").write_bytes(b"a person's picture")
    return folder


PROMPT = ["--prompt", "a"]
IMAGE = [*PROMPT, "--image", "image.png"]
WRONG: list[tuple[list[object], str]] = [
    # prompts
    (["text"], "--prompt is missing"),
    (["upscale", "--image", "small.png"], "--prompt is missing"),
    (["vary"], "--image is missing: vary varies images"),
    (["vary", "--image", "image.png", *PROMPT], "--prompt: leave it out, vary varies images"),
    (["vary", "--image", "image.png", "--prompts-file", "both.txt"], "--prompts-file: leave it out, vary varies"),
    (["vary", "--image", "image.png", "--long-prompts", "cut"], "--long-prompts: leave it out, vary varies"),
    (["vary", "--image", "image.png", "--upscaler", "upscale"], "--upscaler: leave it out, vary varies"),
    (["text", *PROMPT, "--prompts-file", "both.txt"], "--prompt: leave it out, --prompts-file has the prompts"),
    (["text", "--prompts-file", "absent.txt"], "--prompts-file absent.txt: can't be read"),
    (["text", "--prompts-file", "plain"], "--prompts-file plain: must end in .txt, .csv, .jsonl"),
    (["text", "--prompts-file", "prompts.yaml"], "--prompts-file prompts.yaml: must end in .txt, .csv, .jsonl"),
    (["text", "--prompts-file", "none.txt"], "--prompts-file none.txt: has no prompts"),
    (["text", "--prompts-file", "latin.txt"], "--prompts-file latin.txt: can't be read"),
    (["text", "--prompts-file", "typo.csv"], "--prompts-file typo.csv, line 1: 'negative' is unknown"),
    (["text", "--prompts-file", "twice.csv"], "--prompts-file twice.csv, line 1: a column stands there twice"),
    (["text", "--prompts-file", "headless.csv"], "--prompts-file headless.csv, line 1: 'a red apple' is unknown"),
    (["text", "--prompts-file", "cells.csv"], "--prompts-file cells.csv, line 2: has 3 cells for 2 columns"),
    (["text", "--prompts-file", "empty.csv"], "--prompts-file empty.csv, line 2: has no prompt"),
    (["text", "--prompts-file", "seed.csv"], "--prompts-file seed.csv, line 2: seed = 'seven'"),
    (["text", "--prompts-file", "seed.jsonl"], "--prompts-file seed.jsonl, line 1: seed = -1"),
    (["text", "--prompts-file", "true.jsonl"], "--prompts-file true.jsonl, line 1: seed = True"),
    (["text", "--prompts-file", "number.jsonl"], "--prompts-file number.jsonl, line 1: prompt = 7"),
    (["text", "--prompts-file", "broken.jsonl"], "--prompts-file broken.jsonl, line 2: can't be read"),
    (["text", "--prompts-file", "twice.jsonl"], "twice.jsonl, line 1: can't be read: a key stands there twice"),
    (["text", "--prompts-file", "list.jsonl"], "--prompts-file list.jsonl, line 1: must be an object"),
    (["text", "--prompts-file", "typo.jsonl"], "--prompts-file typo.jsonl, line 1: 'sed' is unknown"),
    (["text", "--prompts-file", "promptless.jsonl"], "--prompts-file promptless.jsonl, line 1: has no prompt"),
    (["text", "--prompts-file", "large.csv", "--count", 2], "--seed 0: picture 1 would have 9223372036854775808"),
    (["text", "--prompts-file", "both.txt", *["--image", "image.png"] * 3], "--image: 3 of them and 2 prompts"),
    (["text", *PROMPT, "--negative-prompt", "b", "--negative-prompt", "c"], "--negative-prompt: 2 of them for 1"),
    # guidance
    (["text", *PROMPT, "--negative-prompt", "b", "--guidance-scale", 1], "--negative-prompt: leave it out, nothing"),
    (["text", "--prompts-file", "negative.csv", "--guidance-scale", 1], "--prompts-file has negative prompts"),
    (["text", "--prompts-file", "negative.csv", "--weak", "text"], "--prompts-file has negative prompts"),
    (["text", *PROMPT, "--guidance-rescale", 0.5, "--guidance-scale", 1], "--guidance-rescale: leave it out, nothing"),
    (["text", *PROMPT, "--guidance-interval", "0,.5", "--guidance-scale", 1], "--guidance-interval: leave it out"),
    (["text", *PROMPT, "--weak", "text", "--guidance-scale", 1], "--weak: leave it out, nothing is guided"),
    (["text", *PROMPT, "--weak", "text", "--negative-prompt", "b"], "--negative-prompt: leave it out, --weak takes"),
    (["text", *PROMPT, "--weak", "inpaint"], "--weak inpaint: its in_channels 9 is not that of text"),
    (["text", *PROMPT, "--weak", "xl"], "--weak xl: its"),
    (["xl", *PROMPT, "--weak", "xl", "--refiner", "refiner"], "--weak: leave it out, its guidance is not"),
    (["text", *PROMPT, "--guidance-scale", -1], "--guidance-scale -1.0: must be 0 or above"),
    (["text", *PROMPT, "--guidance-scale", "nan"], "--guidance-scale nan: must be 0 or above"),
    (["text", *PROMPT, "--guidance-rescale", 2], "--guidance-rescale 2.0: must be from 0"),
    (["text", *PROMPT, "--guidance-interval", "1"], "--guidance-interval 1: must be two numbers"),
    (["text", *PROMPT, "--guidance-interval", "1,0"], "--guidance-interval 1.0,0.0: must be two rising shares"),
    (["text", *PROMPT, "--long-prompts", "chuncks"], "--long-prompts chuncks: must be one of cut, chunks"),
    # solver
    (["text", *PROMPT, "--sampler", "magic"], "--sampler: sampler 'magic' is unknown"),
    (["text", *PROMPT, "--sampler", "flow_euler"], "--sampler flow_euler, text: prediction = 'eps'"),
    (["text", *PROMPT, "--spacing", "even"], "--spacing even, text: spacing = 'even': must be one of"),
    (["text", *PROMPT, "--sampler", "ddim", "--spacing", "karras"], "--spacing karras, text: spacing = 'karras'"),
    (["text", *PROMPT, "--steps", 0], "--steps 0: must be 1 or more"),
    (["text", *PROMPT, "--steps", 1000], "--steps 1000, text: steps = 1000: must be from 1 to 999"),
    (["text", *PROMPT, "--eta", 0.5], "--eta: eta = 0.5 with sampler 'dpmpp_2m': leave it out"),
    (["text", *PROMPT, "--eta", 2, "--sampler", "ddim"], "--eta 2.0: must be from 0"),
    (["text", *PROMPT, "--threshold", "0.9"], "--threshold 0.9: must be two numbers"),
    (["text", *PROMPT, "--threshold", "2,1"], "--threshold 2.0,1.0: must be a share"),
    # images
    (["text", *PROMPT, "--mask", "mask.png"], "--mask: leave it out, no --image is given"),
    (["text", *PROMPT, "--strength", 0.5], "--strength: leave it out, no --image is given"),
    (["text", *IMAGE, "--strength", 0], "--strength 0.0: must be above 0"),
    (["text", *IMAGE, "--strength", 0.1, "--steps", 2], "--strength: strength = 0.1 of 2 steps leaves none"),
    (["text", *PROMPT, "--image", "text/model_index.json"], "--image text/model_index.json: can't be read"),
    (["text", *PROMPT, "--image", "absent.png"], "--image absent.png: can't be read"),
    (["text", *PROMPT, "--image", "deep.png"], "--image deep.png: has more than 8 bits a channel"),
    (["text", *IMAGE, "--image", "small.png"], "--image small.png: is 8x8, and image.png 16x16"),
    (["text", *IMAGE, "--mask", "small.png"], "--mask small.png: is 8x8, and --image 16x16"),
    (["text", *IMAGE, "--mask", "mask.png", "--mask", "mask.png"], "--mask: 2 of them for 1"),
    (["text", *PROMPT, "--image", "odd.png"], "--image odd.png: size = 15x15 pixels"),
    (["text", *IMAGE, "--size", "16x16"], "--size: leave it out, pictures are as large as --image"),
    (["inpaint", *PROMPT], "MODEL inpaint: its network takes 9 channels, it was made for inpainting"),
    (["upscale", *PROMPT], "--image is missing: upscale makes images larger"),
    (["upscale", *IMAGE, "--mask", "mask.png"], "--mask: leave it out, upscale makes images larger"),
    (["upscale", *IMAGE, "--noise-level", 251], "--noise-level 251: upscale takes from 0 to 250"),
    (["text", *PROMPT, "--noise-level", 5], "--noise-level: leave it out, no model here makes images larger"),
    # sizes
    (["text", *PROMPT, "--size", "big"], "--size big: must be two numbers of pixels"),
    (["text", *PROMPT, "--size", "16x15"], "--size: size = 16x15 pixels"),
    (["text", *PROMPT, "--size", "0x16"], "--size 0,16: must be 1x1 or more"),
    (["text", *PROMPT, "--original-size", "64x64"], "--original-size: leave it out, no model here takes sizes"),
    (["text", *PROMPT, "--crop", "0x0"], "--crop: leave it out, no model here takes sizes"),
    (["xl", *PROMPT, "--original-size", "0x0"], "--original-size 0,0: must be 1x1 or more"),
    (["xl", *PROMPT, "--aesthetic-score", 7], "--aesthetic-score: leave it out, no model here takes a score"),
    (["refiner", *PROMPT, "--aesthetic-score", 11], "--aesthetic-score 11.0: must be from 1 to 10"),
    # models
    (["text", *PROMPT, "--refine-from", 0.5], "--refine-from: leave it out, there is no --refiner"),
    (["text", *PROMPT, "--refiner", "text", "--refine-from", 1], "--refine-from 1.0: must be between 0 and 1"),
    (["text", *PROMPT, "--refiner", "text", "--steps", 1], "--refine-from: split at 0.8"),
    (["text", *IMAGE, "--refiner", "text"], "--refiner: leave it out, pictures from --image take none"),
    (["text", *PROMPT, "--refiner", "upscale"], "--refiner upscale: was made for another task"),
    (["xl", *PROMPT, "--refiner", "refiner-euler"], "--refiner refiner-euler (euler, linspace spacing): begins"),
    (["text", *PROMPT, "--upscaler", "text-euler"], "--upscaler text-euler: the model is no upscaler"),
    (["text", *PROMPT, "--upscaler", "nothing"], "'nothing' is neither"),
    (["absent.safetensors", *PROMPT], "neither a folder nor a recipe"),
    (["plain", *PROMPT], "plain has no model_index.json"),
    (["sd2.safetensors", *PROMPT], "doesn't tell what it predicts: give --prediction eps, or v"),
    (["sd2.safetensors", *PROMPT, "--prediction", "x"], "--prediction x: must be one of eps, v"),
    (["text", *PROMPT, "--prediction", "v"], "--prediction v: leave it out, the folder text says it"),
    (["lora.safetensors", *PROMPT], "lora.safetensors has no model.diffusion_model.input_blocks"),
    (["pickle.ckpt", *PROMPT], "pickle.ckpt is a pickle: --allow-pickle reads it"),
    (["text", *PROMPT, "--set", "a=b"], "--set with text: leave it out"),
    (["text", *PROMPT, "--variant", "fp16"], "--variant fp16: text has no files of that variant"),
    (["text", *PROMPT, "--lora", "absent.safetensors"], "--lora absent.safetensors: is absent"),
    (["text", *PROMPT, "--lora", "lora.safetensors:much"], "--lora lora.safetensors:much: after the colon"),
    (["text", *PROMPT, "--lora", "lora.safetensors:inf"], "--lora lora.safetensors:inf: after the colon"),
    (["text", *PROMPT, "--lora", "image.png"], "--lora image.png: is no safetensors"),
    (["text", *PROMPT, "--lora", "empty.safetensors"], "--lora empty.safetensors: has no tensors"),
    (["text", *PROMPT, "--lora", "text"], "--lora text/pytorch_lora_weights.safetensors: is absent"),
    # machine and places
    (["text", *PROMPT, "--device", "cuda:99"], "--device cuda:99: this machine has"),
    (["text", *PROMPT, "--device", "tpu"], "--device tpu: must be auto, cpu, cuda"),
    (["text", *PROMPT, "--dtype", "int8"], "--dtype int8: must be one of float32"),
    (["text", *PROMPT, "--seed", -1], "--seed -1: must be from 0"),
    (["text", *PROMPT, "--seed", "9223372036854775807", "--count", 2], "--seed 9223372036854775807: picture 1"),
    (["text", *PROMPT, "--max-pixels", 9], "--max-pixels: max_pixels = 9"),
    (["text", *PROMPT, "--grid", "mask.png/grid.png"], "--grid: mask.png is no folder"),
    (["text", *PROMPT, "--grid", "grid.jpg"], "--grid grid.jpg: must end in .png"),
    (["text", *PROMPT, "--grid", "taken/00001.png"], "--grid: taken/00001.png is there already"),
    (["text", *PROMPT, "--count", 3, "--out", "taken"], "--out: taken/00001.png is there already"),
    (["text", *PROMPT, "--out", "new", "--grid", "new/00000.png"], "--grid new/00000.png: is the place of a picture"),
    (["text", *PROMPT, "--out", "mask.png"], "--out: mask.png is no folder"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_usage_is_one_message_before_any_weights_are_read(
    unreadable: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    message: str,
) -> None:
    monkeypatch.chdir(unreadable)
    before = sorted(unreadable.rglob("*"))
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    code, shown, err = ldm_sample(capsys, *arguments, *out)
    assert message in err
    assert (code, shown, err.count("\n")) == (EXIT_USAGE, "", 1), err
    assert err.startswith("error: ")
    assert "torch." not in err
    assert not (tmp_path / "out").exists()
    assert sorted(unreadable.rglob("*")) == before


@pytest.mark.parametrize("option", ["--count", "--batch-size", "--max-pixels"])
def test_counts_below_one_are_refused_by_the_option_s_name(
    unreadable: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    monkeypatch.chdir(unreadable)
    code, _, err = ldm_sample(capsys, "text", *PROMPT, option, 0)
    assert code == EXIT_USAGE
    assert option in err


def test_weights_that_can_not_be_read_are_what_a_right_usage_comes_to_here(
    unreadable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That the table above looks no further than configurations is due to this."""
    monkeypatch.chdir(unreadable)
    code, _, err = ldm_sample(capsys, "text", *PROMPT, "--out", tmp_path / "out")
    assert code == EXIT_USAGE
    assert "diffusion_pytorch_model.safetensors is corrupt or can't be read" in err


def test_a_file_that_came_meanwhile_is_not_overwritten_and_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    from pipelines.commands.sample.writing import write
    from pipelines.errors import UsageError

    image, file = torch.zeros(8, 8, 3, dtype=torch.uint8), tmp_path / "new/00000.png"
    with pytest.raises(TypeError, match="not JSON serializable"):
        write(image, file, {"what": object()}, overwrite=False)
    assert list(file.parent.iterdir()) == []
    file.write_bytes(b"another's")
    with pytest.raises(UsageError, match="written by another meanwhile"):
        write(image, file, {}, overwrite=False)
    assert [(each.name, each.read_bytes()) for each in file.parent.iterdir()] == [("00000.png", b"another's")]
