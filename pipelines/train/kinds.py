"""The kinds of model, by the name that a recipe's key `kind` gives: what trains each, imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

from pipelines.recipe import AutoencoderModel, ClipModel, Recipe, TextToImageModel
from pipelines.recipe.models import AnyModel
from pipelines.recipe.weights import weights_sha256

if TYPE_CHECKING:
    import torch

    from pipelines.train.job import TrainJob
    from pipelines.train.trainable import TimedStep, Trainable


@dataclass(frozen=True)
class TrainKind(Generic[AnyModel]):
    """A kind of model as training sees it. A node's key is made of its block, but for what lies `elsewhere`."""

    trainable: Callable[[TrainJob, torch.device, bool], Trainable]
    """Data, network and loss of a job on a device; with true, this process will be asked for previews. Raises the
    errors of its data and of its network."""
    timed_step: Callable[[Recipe, AnyModel, int, torch.device], TimedStep]
    """What `ldm doctor` times: the network of a checked recipe and its forward pass on so many random samples."""
    elsewhere: frozenset[str]
    """Fields of the block that have no bearing on the weights: they say how the model is used."""
    begins_with: Callable[[AnyModel], Mapping[str, str | None]]
    """What of the weights that training begins with is in its key beside the block. Raises `RecipeError` if they can't
    be read."""


def build_trainable(job: TrainJob, device: torch.device, *, previews: bool) -> Trainable:
    """The trainable of the job's kind of model; `previews`: this process will be asked for them.

    Raises the errors of its data and of its network.
    """
    return KINDS[job.model.kind].trainable(job, device, previews)


def nothing(_model: object) -> Mapping[str, str | None]:
    """The `begins_with` of a kind whose initial weights follow from its block."""
    return {}


# -- autoencoder -------------------------------------------------------------------------------------------------------


def _autoencoder(job: TrainJob, device: torch.device, _previews: bool) -> Trainable:
    from pipelines.train.autoencoder import AutoencoderTraining

    return AutoencoderTraining(job, device)


def _autoencoder_step(recipe: Recipe, model: AutoencoderModel, batch_size: int, device: torch.device) -> TimedStep:
    from pipelines.train.autoencoder import timed_step

    return timed_step(recipe, model, batch_size, device)


def _init_sha256(model: AutoencoderModel) -> Mapping[str, str | None]:
    """Initial weights count by their content, wherever they lie."""
    return {"init_sha256": weights_sha256(model.init)}


AUTOENCODER: TrainKind[AutoencoderModel] = TrainKind(_autoencoder, _autoencoder_step, frozenset(), _init_sha256)

# -- CLIP --------------------------------------------------------------------------------------------------------------


def _clip(job: TrainJob, device: torch.device, _previews: bool) -> Trainable:
    from pipelines.train.clip import ClipTraining

    return ClipTraining(job, device)


def _clip_step(recipe: Recipe, model: ClipModel, batch_size: int, device: torch.device) -> TimedStep:
    from pipelines.train.clip import timed_step

    return timed_step(recipe, model, batch_size, device)


CLIP: TrainKind[ClipModel] = TrainKind(_clip, _clip_step, frozenset(), nothing)

# -- text to image -----------------------------------------------------------------------------------------------------


def _text_to_image(job: TrainJob, device: torch.device, previews: bool) -> Trainable:
    from pipelines.train.text_to_image import TextToImageTraining

    return TextToImageTraining(job, device, previews=previews)


def _text_to_image_step(recipe: Recipe, model: TextToImageModel, batch_size: int, device: torch.device) -> TimedStep:
    from pipelines.train.text_to_image import timed_step

    return timed_step(recipe, model, batch_size, device)


TEXT_TO_IMAGE: TrainKind[TextToImageModel] = TrainKind(
    _text_to_image, _text_to_image_step, frozenset({"encode", "sampling", "evaluate"}), nothing
)

KINDS: dict[str, TrainKind[Any]] = {
    "autoencoder": AUTOENCODER,
    "clip": CLIP,
    "text_to_image": TEXT_TO_IMAGE,
}
