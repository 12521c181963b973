"""Kinds of models, and what trains each: imported when it is asked for."""

from __future__ import annotations

import torch

from pipelines.train.job import TrainJob
from pipelines.train.trainable import Trainable


def build_trainable(job: TrainJob, device: torch.device, *, previews: bool) -> Trainable:
    """The trainable of the job's kind of model; `previews`: this process will be asked for them.

    Raises the errors of its data and of its network.
    """
    match job.model.kind:
        case "autoencoder":
            from pipelines.train.autoencoder import AutoencoderTraining

            return AutoencoderTraining(job, device)
        case "clip":
            from pipelines.train.clip import ClipTraining

            return ClipTraining(job, device)
        case "text_to_image":
            from pipelines.train.text_to_image import TextToImageTraining

            return TextToImageTraining(job, device, previews=previews)
