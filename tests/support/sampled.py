"""`ldm sample` in this process, and tiny models that stock diffusers saved, for it to sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stock import stock_pipeline

from pipelines.cli import main

KINDS = {
    "text": "",
    "inpaint": "Inpaint",
    "upscale": "Upscale",
    "vary": "ImageVariation",
    "xl": "XL",
    "refiner": "XLImg2Img",
}


def write_models(folder: Path) -> None:
    """A folder of each of `KINDS`, "ancestral" with another scheduler, and images: 8, 16 and 32 pixels, and a mask."""
    for name, kind in KINDS.items():
        stock_pipeline(f"StableDiffusion{kind}Pipeline").save_pretrained(folder / name)
    stock_pipeline("StableDiffusionPipeline").save_pretrained(folder / "ancestral")
    ancestral = {"timestep_spacing": "trailing", "final_sigmas_type": None}
    set_scheduler(folder / "ancestral", "EulerAncestralDiscreteScheduler", **ancestral)
    random = np.random.default_rng(0)
    for name, side in (("small", 8), ("image", 16), ("larger", 32), ("odd", 15)):
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(folder / f"{name}.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    mask.save(folder / "mask.png")


def set_scheduler(folder: Path, class_name: str, **keys: object) -> None:
    """Have a model's folder ask for another scheduler; keys that are None are left out."""
    path = folder / "scheduler/scheduler_config.json"
    values = json.loads(path.read_text()) | {"_class_name": class_name} | keys
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", class_name]}))


def ldm_sample(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["ldm", "sample", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out, captured.err


def sampled(
    capsys: pytest.CaptureFixture[str], out: Path, *arguments: object, model: str = "text"
) -> tuple[list[Path], str]:
    """The files, and what was told."""
    code, shown, err = ldm_sample(capsys, model, *arguments, "--out", out)
    assert code == 0, err
    return [Path(line) for line in shown.splitlines()], err


def facts_of(file: Path) -> dict[str, str]:
    """What a picture's file tells."""
    with Image.open(file) as picture:
        return dict(picture.text)  # type: ignore[attr-defined]


def pixels_of(file: Path) -> np.ndarray:
    """uint8 [H, W, 3]."""
    with Image.open(file) as picture:
        return np.array(picture)
