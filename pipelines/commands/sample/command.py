"""`ldm sample` on the command line."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.commands.sample.request import Progress

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
    out: Annotated[Path, option("Folder for the PNG files.")] = Path("outputs"),
    grid: Annotated[Path | None, option("Also one picture of all of them.")] = None,
    seed: Annotated[int, option("Of the first picture; the next ones count up.")] = 0,
    count: Annotated[int, option("Pictures of each prompt.", min=1)] = 1,
    size: Annotated[str | None, option("Pixels; the model's own if left out.", metavar="HxW")] = None,
    negative_prompt: Annotated[list[str] | None, option("To go away from; one, or one each.", PROMPTS)] = None,
    guidance_scale: Annotated[float, option("1 is no guidance.", PROMPTS, min=0.0)] = 3.0,
    guidance_rescale: Annotated[float, option("0 to 1: against glare of strong guidance.", PROMPTS)] = 0.0,
    guidance_interval: Annotated[
        str, option("Shares of noise between which to guide.", PROMPTS, metavar="FROM,TO")
    ] = "0,1",
    weak: Annotated[
        str | None, option("Guide away from this weaker model, and not from the empty prompt.", PROMPTS, "MODEL")
    ] = None,
    long_prompts: Annotated[str, option("Over the token limit: cut, or chunks.", PROMPTS)] = "cut",
    sampler: Annotated[
        str,
        option(
            "ddpm, ddim, plms, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde, unipc, flow_euler, flow_heun.",
            SOLVING,
        ),
    ] = "dpmpp_2m",
    steps: Annotated[int, option("Calls of the network, or about as many.", SOLVING, min=1)] = 20,
    spacing: Annotated[str | None, option("leading, trailing, linspace or karras.", SOLVING)] = None,
    eta: Annotated[float | None, option("Noise drawn anew on the way, 0 to 1.", SOLVING)] = None,
    threshold: Annotated[
        str | None, option("Dynamic thresholding of models of pixels, as 0.995,1.", SOLVING, "SHARE,LIMIT")
    ] = None,
    image: Annotated[list[Path] | None, option("To begin from, vary or enlarge; repeatable.", IMAGES, "FILE")] = None,
    mask: Annotated[list[Path] | None, option("White where --image is to be made anew.", IMAGES, "FILE")] = None,
    strength: Annotated[float | None, option("How much of --image is made anew, 0 to 1.", IMAGES)] = None,
    noise_level: Annotated[int | None, option("How freely an upscaler repaints.", IMAGES, min=0)] = None,
    refiner: Annotated[str | None, option("Takes over near the end.", MORE, "MODEL")] = None,
    refine_from: Annotated[float, option("Share of the process before that.", MORE)] = 0.8,
    upscaler: Annotated[
        list[str] | None, option("Makes the pictures larger; repeatable: a cascade.", MORE, "MODEL")
    ] = None,
    original_size: Annotated[
        str | None, option("Told to networks that take sizes, such as SDXL.", SIZES, metavar="HxW")
    ] = None,
    crop: Annotated[str, option("Likewise: what was cut off.", SIZES, metavar="TOPxLEFT")] = "0x0",
    aesthetic_score: Annotated[float, option("Likewise, to SDXL's refiner: 1 to 10.", SIZES)] = 6.0,
    batch_size: Annotated[int, option("Pictures at a time.", MORE, min=1)] = 16,
    max_pixels: Annotated[int | None, option("Decoded at a time; larger images in tiles.", MORE)] = None,
    device: Annotated[str, option("auto, cpu or cuda.", MORE)] = "auto",
    dtype: Annotated[str, option("float32, bfloat16 or float16.", MORE)] = "float32",
    variant: Annotated[str | None, option("Of a folder's files, such as fp16.", MORE)] = None,
    prediction: Annotated[str | None, option("Of a checkpoint file: eps or v, where it needs one.", MORE)] = None,
    allow_pickle: Annotated[bool, option("Read .ckpt and .bin files, as plain tensors only.", MORE)] = False,
) -> None:
    """Make pictures: of prompts, from images (--image), in a part of them (--mask), like them, or larger."""
    from pipelines.commands.sample.request import Request
    from pipelines.commands.sample.request import sample as make

    with _progress() as progress:
        written = make(
            Request(
                model,
                overrides=set_ or (),
                prompts=prompt or (),
                negative_prompts=negative_prompt or (),
                images=image or (),
                masks=mask or (),
                count=count,
                seed=seed,
                size=None if size is None else _size("--size", size),
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
                threshold=None if threshold is None else _pair("--threshold", threshold),
                original_size=None if original_size is None else _size("--original-size", original_size),
                crop=_size("--crop", crop),
                aesthetic_score=aesthetic_score,
                batch_size=batch_size,
                max_pixels=max_pixels,
                variant=variant,
                long_prompts=long_prompts,
                device=device,
                dtype=dtype,
                prediction=prediction,  # type: ignore[arg-type]
                allow_pickle=allow_pickle,
                progress=progress,
                tell=lambda line: print(line, file=sys.stderr),  # noqa: T201
            ),
            out,
            grid,
        )
    for path in written:
        print(path)  # noqa: T201


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("sampling")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _size(name: str, text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise UsageError(f"{name} {text}: must be two numbers of pixels, vertical first, such as 512x768")
    return int(height), int(width)


def _pair(name: str, text: str) -> tuple[float, float]:
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{name} {text}: must be two numbers with a comma between them") from None
    return first, second
