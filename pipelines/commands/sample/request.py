"""What `ldm sample` is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.commands.sample.models import ignored
from pipelines.errors import UsageError

DTYPES = ("float32", "bfloat16", "float16")
LARGEST_SEED = 2**63
NAMES = {
    "prompts": "--prompt",
    "negative_prompts": "--negative-prompt",
    "images": "--image",
    "masks": "--mask",
    "upscalers": "--upscaler",
    "loras": "--lora",
}


@dataclass(frozen=True)
class Lora:
    """A LoRA file, and how much of it is added to MODEL's weights."""

    file: Path
    scale: float = 1.0


@dataclass(frozen=True)
class Request:
    """One call of `ldm sample`. Names are those of its options; None and empty: not given."""

    model: str
    out: Path
    grid: Path | None = None
    overwrite: bool = False
    overrides: Sequence[str] = ()
    """Overrides of the recipe that `model` names."""
    prompts: Sequence[str] = ()
    prompts_file: Path | None = None
    negative_prompts: Sequence[str] = ()
    images: Sequence[Path] = ()
    masks: Sequence[Path] = ()
    loras: Sequence[Lora] = ()
    count: int = 1
    """Pictures of each prompt, or of each image."""
    seed: int = 0
    """Seed of the first picture; the next ones count up."""
    size: tuple[int, int] | None = None
    """Height and width in pixels."""
    strength: float | None = None
    noise_level: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    weak: str | None = None
    refiner: str | None = None
    refine_from: float | None = None
    upscalers: Sequence[str] = ()
    sampler: str | None = None
    steps: int | None = None
    spacing: str | None = None
    eta: float | None = None
    threshold: tuple[float, float] | None = None
    original_size: tuple[int, int] | None = None
    """Size that networks which are conditioned on sizes are told, as the next two."""
    crop: tuple[int, int] | None = None
    aesthetic_score: float | None = None
    batch_size: int = 16
    max_pixels: int | None = None
    long_prompts: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    variant: str | None = None
    prediction: str | None = None
    allow_pickle: bool = False
    allow_plugins: bool = False
    tell: Callable[[str], None] = field(default=ignored, compare=False)
    """Is told what has been decided: which release it is, how it is sampled."""

    def gives(self, name: str) -> bool:
        """Whether the option of that field was given."""
        value = getattr(self, name)
        return value is not None and value not in ((), [])

    @property
    def names(self) -> list[str]:
        """Every MODEL that is asked for, the main one first."""
        names = (self.model, self.refiner, self.weak, *self.upscalers)
        return list(dict.fromkeys(name for name in names if name is not None))

    def refuse(self, reason: str, *names: str) -> None:
        """Raises `UsageError` if one of these was given."""
        for name in names:
            if self.gives(name):
                raise UsageError(f"{option_of(name)}: leave it out, {reason}")


def option_of(name: str) -> str:
    """The option of a field of `Request`."""
    return NAMES.get(name, "--" + name.replace("_", "-"))


def check_request(request: Request) -> None:
    """Raises `UsageError` for what no model and no file could make right."""
    _check_words(request)
    _check_numbers(request)
    if request.prompts_file is not None:
        request.refuse("--prompts-file has the prompts", "prompts")
    if not request.images:
        request.refuse("no --image is given", "masks", "strength")
    if request.refiner is None:
        request.refuse("there is no --refiner", "refine_from")
    else:
        request.refuse("its guidance is not the refiner's", "weak")
        if request.images:
            request.refuse("pictures from --image take none", "refiner")
    if request.weak is not None:
        request.refuse("--weak takes the place of what pictures go away from", "negative_prompts")


def _check_words(request: Request) -> None:
    for name, known in (("dtype", DTYPES), ("long_prompts", ("cut", "chunks")), ("prediction", ("eps", "v"))):
        value = getattr(request, name)
        if value is not None and value not in known:
            raise UsageError(f"{option_of(name)} {value}: must be one of {', '.join(known)}")
    kind, _, number = request.device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not (kind == "cuda" and number.isdecimal())):
        raise UsageError(f"--device {request.device}: must be auto, cpu, cuda, or cuda:NUMBER")


def _check_numbers(request: Request) -> None:
    def held(name: str, rule: str, is_right: Callable[[Any], bool]) -> None:
        value = getattr(request, name)
        if value is not None and not is_right(value):
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise UsageError(f"{option_of(name)} {shown}: must be {rule}")

    held("seed", "from 0 to below 2^63", lambda value: 0 <= value < LARGEST_SEED)
    held("steps", "1 or more", lambda value: value >= 1)
    held("strength", "above 0 (as the image is) and up to 1 (anew)", lambda value: 0 < value <= 1)
    held("guidance_scale", "0 or above, 1 is no guidance", lambda value: 0 <= value < float("inf"))
    held("guidance_rescale", "from 0 (none) to 1", lambda value: 0 <= value <= 1)
    rising = "two rising shares of noise, from 0 to 1"
    held("guidance_interval", rising, lambda value: 0 <= value[0] < value[1] <= 1)
    held("refine_from", "between 0 and 1", lambda value: 0 < value < 1)
    held("eta", "from 0 (no noise is drawn) to 1 (as ddpm)", lambda value: 0 <= value <= 1)
    share = "a share above 0 and up to 1, and a limit above 0"
    held("threshold", share, lambda value: 0 < value[0] <= 1 and 0 < value[1] < float("inf"))
    held("original_size", "1x1 or more", lambda value: min(value) > 0)
    held("size", "1x1 or more", lambda value: min(value) > 0)
    held("aesthetic_score", "from 1 to 10", lambda value: 1 <= value <= 10)
