"""`ldm sample`, from the request to the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.artifacts import file_sha256
from pipelines.commands.sample.given import read_given
from pipelines.commands.sample.models import CHECKPOINTS, Found, find_model
from pipelines.commands.sample.request import Request, check_request
from pipelines.commands.sample.writing import check_places, facts_of, facts_of_picture, file_of, write
from pipelines.errors import Interrupted, UsageError
from pipelines.terminal.live import TerminalReport

if TYPE_CHECKING:
    from pipelines.commands.sample.outline import Outline

COLUMNS = 8
"""Columns of the grid."""
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")
"""Parts of a folder that have weights."""


def sample(request: Request, terminal: TerminalReport) -> list[Path]:
    """Write one PNG a picture, and the grid if one is asked for; the paths written. Each file says how it was made.

    Whatever can be known of a wrong request without a model's weights is said before these are read.

    Raises `UsageError` for what can't be asked for, or of these models; `ldm.errors.LdmError` if one of them fails;
    `Interrupted` where a person stops it among the pictures.
    """
    check_request(request)
    given = read_given(request)
    check_places(request, len(given.pictures))
    found = {
        name: find_model(name, request.overrides if name == request.model else (), request.tell, request.allow_plugins)
        for name in request.names
    }
    _check_files(request, found)
    import torch

    from ldm.errors import ConfigError, FolderError, InputError
    from ldm.images import image_grid
    from pipelines.commands.sample.making import hash_of, load_models, make
    from pipelines.commands.sample.plan import apply_recipe, planned

    _check_device(request)
    try:
        outlines = {name: _outline(request, name, found) for name in found}
        apply_recipe(outlines[request.model].model, found[request.model].sampling)
        plan = planned(request, given, outlines, found)
        for line in plan.told:
            request.tell(line)
        with terminal.doing(f"loading {', '.join(found)}"):
            ready = {name: each.model for name, each in outlines.items() if each.model.device.type != "meta"}
            models = load_models(request, found, ready)
            hashes = {name: hash_of(each.path) for name, each in found.items()}
            hashes |= {str(lora.file): file_sha256(lora_file(lora.file)) for lora in request.loras}
    except (ConfigError, FolderError) as error:
        raise UsageError(str(error)) from error
    facts, written, pictures = facts_of(request, plan, hashes), [], []
    batches = len(list(given.batches(request.batch_size)))
    calls = sum(way.calls for way in plan.ways.values())
    with terminal.node("sample"):

        def progress(done: float, made: int) -> None:
            note = f"{made}/{len(given.pictures)} pictures"
            terminal.progress(round(done * calls), batches * calls, "steps", note)

        try:
            for number, (batch, images) in enumerate(make(request, plan, given, models, progress), 1):
                for picture, image in zip(batch, images, strict=True):
                    file = file_of(request, picture.number)
                    write(image, file, facts | facts_of_picture(given, picture), overwrite=request.overwrite)
                    written.append(file)
                progress(number, len(written))
                if request.grid is not None:
                    pictures.append(images)
        except (ConfigError, InputError) as error:  # what was asked for doesn't fit the model
            raise UsageError(str(error)) from error
        except KeyboardInterrupt as error:
            done = f"{len(written)} of {len(given.pictures)} pictures are in {request.out}"
            raise Interrupted(f"interrupted; {done}, --overwrite makes all of them anew") from error
        if request.grid is not None:
            grid = image_grid(torch.cat(pictures), columns=min(COLUMNS, len(given.pictures)))
            write(grid, request.grid, facts, overwrite=request.overwrite)
            written.append(request.grid)
    return written


def lora_file(path: Path) -> Path:
    """The file of a LoRA: of a folder that diffusers wrote, the one in it."""
    from ldm.interchange.lora import WEIGHTS

    return path / WEIGHTS if path.is_dir() else path


def _outline(request: Request, name: str, found: Mapping[str, Found]) -> Outline:
    from pipelines.commands.sample.making import prediction_of, read_model
    from pipelines.commands.sample.outline import Outline, outline_of_file, outline_of_folder

    path = found[name].path
    if path.is_dir():
        return outline_of_folder(path)
    if path.suffix == CHECKPOINTS[0]:
        return outline_of_file(path, prediction_of(request, name))
    return Outline(read_model(request, name, found))  # a pickle has no header that could be read alone


def _check_device(request: Request) -> None:
    import torch

    kind, _, number = request.device.partition(":")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {request.device}: this machine has {torch.cuda.device_count()} CUDA devices")


def _check_files(request: Request, found: Mapping[str, Found]) -> None:
    """What is of folders alone, or of single files."""
    for name, each in found.items():
        if each.path.suffix == ".ckpt" and each.path.is_file() and not request.allow_pickle:
            raise UsageError(f"{name} is a pickle: --allow-pickle reads it, as plain tensors only")
    if request.prediction is not None and found[request.model].path.is_dir():
        raise UsageError(f"--prediction {request.prediction}: leave it out, the folder {request.model} says it")
    if request.variant is not None:
        _check_variant(request, request.variant, [each.path for each in found.values()])


def _check_variant(request: Request, variant: str, paths: Sequence[Path]) -> None:
    """Refused if no network has it. Of those that have none, the usual files are read, and that is told."""
    kinds = ("safetensors", "json", *(("bin",) if request.allow_pickle else ()))
    networks = [path / part for path in paths for part in NETWORKS if (path / part).is_dir()]
    without = [
        part for part in networks if not any(file for kind in kinds for file in part.glob(f"*.{variant}*.{kind}"))
    ]
    if without == networks:
        raise UsageError(f"--variant {variant}: {', '.join(map(str, paths))} has no files of that variant")
    for part in without:
        request.tell(f"{part} has no files of variant {variant}: those without are read")
