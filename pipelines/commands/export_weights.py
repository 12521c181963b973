"""`python -m pipelines.commands.export_weights RECIPE MODEL FOLDER`: a trained autoencoder as weights to start from.

Writes config.json, the weights in half precision, and manifest.json: what they were trained on, for how long, and how
good they are, as the store's manifests say. `configs/weights/` is made by this.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from infra.storage import Store
from ldm.autoencoder import AutoencoderKL
from ldm.interchange import load_network, save_network
from pipelines.artifacts import Artifact, fetch_folder, load
from pipelines.dataset.acquired import acquired_of
from pipelines.dataset.figures import figures_of, is_number, records
from pipelines.errors import LatentworksError, WrongUsage
from pipelines.recipe import Recipe
from pipelines.recipe.file import load_recipe
from pipelines.recipe.weights import WEIGHTS
from pipelines.workflow.graph import build_graph
from pipelines.workflow.plan import plan

MANIFEST = "manifest.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines.commands.export_weights", description=__doc__)
    parser.add_argument("recipe", help="a shipped recipe's name or a YAML file")
    parser.add_argument("model", help="name of one of its autoencoders")
    parser.add_argument("folder", type=Path, help="where the weights go")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a key of the recipe")
    options = parser.parse_args(arguments)
    try:
        export_weights(load_recipe(options.recipe, options.set), options.model, options.folder)
    except LatentworksError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    sys.stdout.write(f"{options.folder}\n")


def export_weights(recipe: Recipe, model_name: str, folder: Path) -> None:
    """Write the recipe's trained autoencoder to the folder. Raises `WrongUsage` if it isn't trained yet."""
    store = Store(recipe.store)
    name = f"train.{model_name}"
    rows = {row.node: row for row in plan(build_graph(recipe), store, recipe.name)}
    if name not in rows or rows[name].artifact is None:
        raise WrongUsage(f"{name} of {recipe.name} is not made yet; run `ldm run {recipe.name} --until {name}` first")
    artifact = rows[name].artifact
    assert artifact is not None
    (unit,) = artifact.units
    network = load_network(AutoencoderKL, fetch_folder(store, unit, "vae"))
    save_network(network.half(), folder)
    weights = (folder / WEIGHTS).read_bytes()
    facts = manifest(artifact, store) | {"sha256": hashlib.sha256(weights).hexdigest(), "dtype": "float16"}
    (folder / MANIFEST).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def manifest(artifact: Artifact, store: Store) -> dict[str, Any]:
    """What the weights were made from and how good they are."""
    inputs = {name: load(store, name, revision) for name, revision in artifact.manifest["inputs"].items()}
    acquired, selected = acquired_of(inputs).settings, inputs["select"].manifest
    training = {name: value for name, value in artifact.info.items() if is_number(value)}
    return {
        "node": artifact.stage,
        "revision": artifact.revision,
        "spec": artifact.manifest["spec"],
        "training": training,
        "figures": records(figures_of(artifact)),
        "data": {
            **{name: acquired[name] for name in ("source", "sources") if name in acquired},
            "image": acquired["acquire"]["image"],
            "selection": selected["spec"],
            "train": selected["info"]["train"],
            "held_out": selected["info"]["held_out"],
            "revisions": {name: one.revision for name, one in inputs.items()},
        },
        "finished_at": artifact.manifest["finished_at"],
        "versions": artifact.manifest["versions"],
        "git_revision": artifact.manifest["git_revision"],
    }


if __name__ == "__main__":
    main()
