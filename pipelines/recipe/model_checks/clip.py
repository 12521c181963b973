"""What of a CLIP does not go together: its towers, its batch, and the split it learns from."""

from __future__ import annotations

from pipelines.recipe import ClipModel, Recipe
from pipelines.recipe.columns import ledger_columns, scored_by
from pipelines.recipe.data_checks import check_split, side_px
from pipelines.recipe.networks import clip_misfits
from pipelines.recipe.problems import Findings


def check(recipe: Recipe, name: str, model: ClipModel, findings: Findings) -> None:
    where, columns = f"models.{name}", ledger_columns(recipe.named_sources)
    for field, message in clip_misfits(model.network, side_px(recipe)).items():
        findings.refuse(f"{where}.network.{field}", message)
    if model.train.global_batch_size < 2:
        findings.refuse(
            f"{where}.train.global_batch_size", "1: a pair is told from the others of its batch; give 2 or more"
        )
    if model.split is not None and scored_by(model.split.by) and model.split.by not in columns:
        findings.refuse(
            f"{where}.split.by",
            f"{model.split.by!r} is a column of scores, which are made after this model; give a column of the source",
        )
    elif model.split is not None:
        check_split(f"{where}.split", model.split, columns, findings)
    elif recipe.select.split.by not in columns and scored_by(recipe.select.split.by):
        findings.refuse(
            f"{where}.split",
            f"none, and by default as select.split, by column {recipe.select.split.by!r}; scores are made after this"
            " model: give it a split by a column of the source",
        )
