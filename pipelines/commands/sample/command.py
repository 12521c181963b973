"""`ldm sample` on the command line."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands.options import AllowPluginsOption
from pipelines.errors import UsageError

if TYPE_CHECKING:
    from pipelines.commands.sample.request import Lora

PROMPTS, SOLVING, IMAGES, MORE = "Prompts and guidance", "Solver", "Images given", "Models and machine"
SIZES = "Sizes"


def option(help_: str, panel: str | None = None, metavar: str | None = None, **more: Any) -> Any:
    return typer.Option(help=help_, rich_help_panel=panel, metavar=metavar, **more)


def sample(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A diffusers folder, a .safetensors file, a recipe (its newest release) or models:/NAME@ALIAS.",
        ),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Of a recipe: its release with this; repeatable."),
    ] = None,
    prompt: Annotated[list[str] | None, option("Repeatable; one picture each.")] = None,
    prompts_file: Annotated[
        Path | None,
        option(
            "In their place: .txt, a prompt a line; or .csv or .jsonl, with prompt, negative_prompt, seed, which win"
            " over the options.",
            metavar="FILE",
        ),
    ] = None,
    out: Annotated[Path, option("Folder for the PNG files.")] = Path("outputs"),
    grid: Annotated[Path | None, option("Also one picture of all of them, a .png.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures that are there.")] = False,
    seed: Annotated[int, option("Of the first picture; the next ones count up.")] = 0,
    count: Annotated[int, option("Pictures of each prompt.", min=1)] = 1,
    size: Annotated[str | None, option("Pixels; the model's own if left out.", metavar="HxW")] = None,
    negative_prompt: Annotated[list[str] | None, option("To go away from; one, or one each.", PROMPTS)] = None,
    guidance_scale: Annotated[
        float | None, option("1 is no guidance. The recipe's own if left out, or 3.", PROMPTS)
    ] = None,
    guidance_rescale: Annotated[float | None, option("0 to 1: against glare of strong guidance.", PROMPTS)] = None,
    guidance_interval: Annotated[
        str | None, option("Shares of noise between which to guide.", PROMPTS, metavar="FROM,TO")
    ] = None,
    weak: Annotated[
        str | None, option("Guide away from this weaker model, and not from the empty prompt.", PROMPTS, "MODEL")
    ] = None,
    long_prompts: Annotated[
        str | None, option("Over the token limit: cut, or chunks. Cut if left out.", PROMPTS)
    ] = None,
    sampler: Annotated[
        str | None,
        option(
            "ddpm, ddim, plms, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde, unipc, flow_euler, flow_heun."
            " Or one of the recipe's plugins. The recipe's own, or the folder's, if left out.",
            SOLVING,
        ),
    ] = None,
    steps: Annotated[
        int | None, option("Calls of the network, or about as many. The recipe's own if left out, or 20.", SOLVING)
    ] = None,
    spacing: Annotated[
        str | None, option("leading, trailing, linspace or karras. The folder's if left out.", SOLVING)
    ] = None,
    eta: Annotated[float | None, option("Noise drawn anew on the way, 0 to 1.", SOLVING)] = None,
    threshold: Annotated[
        str | None, option("Dynamic thresholding of models of pixels, as 0.995,1.", SOLVING, "SHARE,LIMIT")
    ] = None,
    image: Annotated[list[Path] | None, option("To begin from, vary or enlarge; repeatable.", IMAGES, "FILE")] = None,
    mask: Annotated[list[Path] | None, option("White where --image is to be made anew.", IMAGES, "FILE")] = None,
    strength: Annotated[float | None, option("How much of --image is made anew, 0 to 1.", IMAGES)] = None,
    noise_level: Annotated[int | None, option("How freely an upscaler repaints.", IMAGES, min=0)] = None,
    lora: Annotated[
        list[str] | None,
        option("Added to MODEL's weights, SCALE times (1 if left out); repeatable.", MORE, "FILE[:SCALE]"),
    ] = None,
    refiner: Annotated[str | None, option("Takes over near the end.", MORE, "MODEL")] = None,
    refine_from: Annotated[float | None, option("Share of the process before that; 0.8 if left out.", MORE)] = None,
    upscaler: Annotated[
        list[str] | None, option("Makes the pictures larger; repeatable: a cascade.", MORE, "MODEL")
    ] = None,
    original_size: Annotated[
        str | None, option("Told to networks that take sizes, such as SDXL.", SIZES, metavar="HxW")
    ] = None,
    crop: Annotated[
        str | None, option("Likewise: what was cut off. 0x0 if left out.", SIZES, metavar="TOPxLEFT")
    ] = None,
    aesthetic_score: Annotated[
        float | None, option("Likewise, to SDXL's refiner: 1 to 10. 6 if left out.", SIZES)
    ] = None,
    batch_size: Annotated[int, option("Pictures at a time.", MORE, min=1)] = 16,
    max_pixels: Annotated[int | None, option("Decoded at a time; larger images in tiles.", MORE, min=1)] = None,
    device: Annotated[str, option("auto, cpu or cuda.", MORE)] = "auto",
    dtype: Annotated[str, option("float32, bfloat16 or float16.", MORE)] = "float32",
    variant: Annotated[str | None, option("Of a folder's files, such as fp16.", MORE)] = None,
    prediction: Annotated[str | None, option("Of a checkpoint file: eps or v, where it needs one.", MORE)] = None,
    allow_pickle: Annotated[bool, option("Read .ckpt and .bin files, as plain tensors only.", MORE)] = False,
    allow_plugins: AllowPluginsOption = False,
) -> None:
    """Make pictures: of prompts, from images (--image), in a part of them (--mask), like them, or larger."""
    from pipelines.commands.sample.request import Request
    from pipelines.commands.sample.run import sample as make
    from pipelines.terminal.live import TerminalReport

    request = Request(
        model,
        out,
        grid,
        overwrite,
        overrides=set_ or (),
        prompts=prompt or (),
        prompts_file=prompts_file,
        negative_prompts=negative_prompt or (),
        images=image or (),
        masks=mask or (),
        loras=[_lora(each) for each in lora or ()],
        count=count,
        seed=seed,
        size=_size("--size", size),
        strength=strength,
        noise_level=noise_level,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        guidance_interval=_pair("--guidance-interval", guidance_interval),
        weak=weak,
        refiner=refiner,
        refine_from=refine_from,
        upscalers=upscaler or (),
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        eta=eta,
        threshold=_pair("--threshold", threshold),
        original_size=_size("--original-size", original_size),
        crop=_size("--crop", crop),
        aesthetic_score=aesthetic_score,
        batch_size=batch_size,
        max_pixels=max_pixels,
        variant=variant,
        long_prompts=long_prompts,
        device=device,
        dtype=dtype,
        prediction=prediction,
        allow_pickle=allow_pickle,
        allow_plugins=allow_plugins,
        tell=lambda line: print(line, file=sys.stderr),  # noqa: T201
    )
    for path in make(request, TerminalReport(sys.stderr)):
        print(path)  # noqa: T201


def _size(name: str, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise UsageError(f"{name} {text}: must be two numbers of pixels, vertical first, such as 512x768")
    return int(height), int(width)


def _pair(name: str, text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{name} {text}: must be two numbers with a comma between them") from None
    return first, second


def _lora(text: str) -> Lora:
    """FILE[:SCALE]; a file whose name has a colon is taken as it is."""
    from pipelines.commands.sample.request import Lora

    file, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Lora(Path(text))
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"--lora {text}: after the colon must be a finite number, the scale")
    return Lora(Path(file), number)
