"""The kind "text_to_image": its nodes, from the cache to the figures, and what they need of this machine."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.errors import LdmError
from pipelines.recipe import Recipe, TextToImageModel
from pipelines.workflow.kinds.kind import (
    WorkflowKind,
    encode_node,
    evaluate_node,
    selected_pairs,
    train_node,
)
from pipelines.workflow.needs import Here, check_extractor, check_files, check_pretrained_clip
from pipelines.workflow.node import Node

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")


def _nodes(recipe: Recipe, name: str, model: TextToImageModel) -> Sequence[Node]:
    first_stage = f"train.{model.first_stage}"
    return (
        encode_node(name, model, (*recipe.acquired, "select", first_stage)),
        train_node(name, model, (f"encode.{name}", first_stage)),
        evaluate_node(name, model, (f"train.{name}", first_stage, *_measured_against(recipe, model))),
    )


def _measured_against(recipe: Recipe, model: TextToImageModel) -> tuple[str, ...]:
    """What a model's figures need besides the model: real pairs, their features if there are, and the judge."""
    if model.evaluate is None:
        return ()
    features = recipe.score is not None and recipe.score.features == model.evaluate.extractor
    judge = model.evaluate.judge
    return (
        *recipe.acquired,
        "select",
        *(("score",) if features else ()),
        *((f"train.{judge}",) if judge in recipe.models else ()),
    )


def _released(name: str, model: TextToImageModel) -> tuple[str, ...]:
    return f"evaluate.{name}", f"train.{name}", f"train.{model.first_stage}"


def _check(here: Here, name: str, model: TextToImageModel) -> None:
    release = here.recipe.release
    released = ("release",) if release is not None and release.model == name else ()
    if here.any_of(f"encode.{name}", f"train.{name}", f"evaluate.{name}", *released):
        _check_text_encoder(here, f"models.{name}.text", model)
    if model.evaluate is not None and here.any_of(f"evaluate.{name}"):
        path = f"models.{name}.evaluate"
        check_extractor(here, f"{path}.extractor", model.evaluate.extractor, "set evaluate to null")
        if model.evaluate.judge is not None:
            check_pretrained_clip(here, f"{path}.judge", model.evaluate.judge)


def _check_text_encoder(here: Here, path: str, model: TextToImageModel) -> None:
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
        check_files(here, f"{path}.encoder", folder, {"weights": ("*.safetensors",), "a tokenizer": TOKENIZERS})
    most = config.get("max_position_embeddings")
    if isinstance(most, int) and model.text.tokens > most:
        here.absent(f"{path}.tokens", f"{model.text.tokens}, but {encoder} reads {most} at most; give fewer")


TEXT_TO_IMAGE: WorkflowKind[TextToImageModel] = WorkflowKind(
    _nodes, released=_released, check=_check, pairs=selected_pairs
)
