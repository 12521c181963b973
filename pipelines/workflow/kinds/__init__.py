"""The kinds of model, by the name that a recipe's key `kind` gives: the nodes of each, and what they need."""

from __future__ import annotations

from typing import Any

from pipelines.workflow.kinds.autoencoder import AUTOENCODER
from pipelines.workflow.kinds.clip import CLIP
from pipelines.workflow.kinds.kind import WorkflowKind
from pipelines.workflow.kinds.text_to_image import TEXT_TO_IMAGE

KINDS: dict[str, WorkflowKind[Any]] = {
    "autoencoder": AUTOENCODER,
    "clip": CLIP,
    "text_to_image": TEXT_TO_IMAGE,
}
