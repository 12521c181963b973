"""One tiny run from URLs to pictures, and what must hold of it afterwards."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny import STAGES, TinyRecipe, free_port

from infra.storage import Store
from pipelines.artifacts import file_sha256, load
from pipelines.dataset.figures import Figure, metrics_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TinyRecipe:
    recipe = TinyRecipe(tmp_path_factory.mktemp("run"), free_port())
    done = recipe.ldm()
    assert done.returncode == 0, done.stdout
    recipe.output = done.stdout
    return recipe


def test_every_node_is_up_to_date_and_a_rerun_starts_nothing(finished) -> None:
    nodes = finished.status()
    assert list(nodes) == list(STAGES)
    assert {node["state"] for node in nodes.values()} == {"up to date"}
    again = finished.ldm()
    assert again.returncode == 0
    assert "nothing was to do" in again.stdout
    assert "starting Ray" not in again.stdout
    assert finished.status() == nodes


def test_counts_add_up_from_urls_to_samples(finished) -> None:
    nodes = finished.status()
    store = Store(finished.store)
    acquire = load(store, "acquire", nodes["acquire"]["revision"])
    ledgers = [pq.read_table(store.open(unit.only(".parquet"))) for unit in acquire.units]
    outcomes = [outcome for ledger in ledgers for outcome in ledger.column("outcome").to_pylist()]
    counts = nodes["acquire"]["counts"]
    assert counts["total"] == len(outcomes) > 96  # the faults come on top of the images
    assert counts["kept"] == outcomes.count("kept")
    assert sum(counts["dropped"].values()) == outcomes.count("dropped") > 0
    assert sum(counts["failed"].values()) == outcomes.count("failed") > 0
    assert nodes["select"]["counts"]["total"] == counts["kept"]
    assert nodes["encode.base"]["counts"]["total"] == nodes["select"]["counts"]["kept"]
    encode = load(store, "encode.base", nodes["encode.base"]["revision"])
    in_train = sum(unit.info.get("train", 0) for unit in encode.units)
    held_out = sum(unit.info.get("held_out", 0) for unit in encode.units)
    assert in_train + held_out == nodes["select"]["counts"]["kept"]
    assert nodes["train.base"]["counts"]["total"] == in_train > 0
    assert held_out > 0


def test_mlflow_has_the_same_counts(finished) -> None:
    database = sqlite3.connect(Path(finished.folder) / "state" / "mlflow.db")
    rows = database.execute(
        "select t.value, m.key, m.value from latest_metrics m join tags t on t.run_uuid = m.run_uuid"
        " where t.key = 'node' and m.key like 'counts/%'"
    ).fetchall()
    database.close()
    seen: dict[str, dict[str, float]] = {}
    for node, key, value in rows:
        seen.setdefault(node, {})[key] = value
    for node, facts in finished.status().items():
        assert seen[node]["counts/total"] == facts["counts"]["total"]
        assert seen[node]["counts/kept"] == facts["counts"]["kept"]


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
def test_mlflow_has_the_runs_figures_and_the_checkpoints_that_they_are_of(finished) -> None:
    import mlflow

    nodes = finished.status()
    figures = {f"{name}/{label}": value for name, node in nodes.items() for label, value in told(node).items()}
    client = mlflow.MlflowClient(f"sqlite:///{Path(finished.folder) / 'state' / 'mlflow.db'}")
    (experiment,) = (found for found in client.search_experiments() if found.name == "quickstart")
    kid = "evaluate.base/kernel_distance/seen/efficientnet_lite0_128px"
    (run,) = client.search_runs([experiment.experiment_id], f"metrics.`{kid}` > -1000")
    assert run.data.metrics == pytest.approx(figures)

    models = {model.name: model for model in client.search_logged_models([experiment.experiment_id])}
    kept = [name for name in models if "-step-" in name]
    assert sorted(kept) == [
        *(f"train_{name}-step-{step:06d}" for name, step in (("autoencoder", 12), ("base", 24))),
        *(f"train_{name}-step-000006" for name in ("clip", "judge")),
    ]
    model = models["train_base-step-000024"]
    assert (Path(model.tags["latentworks.location"]) / "manifest.json").is_file()
    assert {metric.key: metric.value for metric in model.metrics} == pytest.approx(told(nodes["evaluate.base"]))
    assert {metric.dataset_digest for metric in model.metrics} == {nodes["select"]["revision"]}


def told(node) -> dict[str, float]:
    """A node's figures as MLflow names them."""
    return metrics_of([Figure.from_json(record) for record in node["figures"]])


def test_the_summary_names_the_places_and_the_next_commands(finished) -> None:
    for words in ("What became of every URL", "grid", "model", "report", "summary", "ldm status", "ldm ui", "log:"):
        assert words in finished.output
    assert "Traceback" not in finished.output


@pytest.mark.parametrize(
    ("override", "first_to_do"),
    [
        ("select.where.0.value=80", "select"),
        ("models.autoencoder.train.steps=13", "train.autoencoder"),
        ("models.base.train.steps=25", "train.base"),
        ("models.base.sampling.seed=8", "evaluate.base"),
        ("execution.ranks=2", None),
        ("execution.zero_stage=1", None),
    ],
)
def test_a_change_redoes_only_what_follows(finished, override: str, first_to_do: str | None) -> None:
    plan = finished.ldm("--set", override, "--dry-run").stdout
    states = {line.split()[0]: line for line in plan.splitlines() if line.split() and line.split()[0] in STAGES}
    for stage in STAGES:
        if stage == first_to_do:
            assert "to do" in states[stage]
            assert override.partition("=")[0].rpartition(".")[2] in states[stage]
            break
        assert "up to date" in states[stage]


def test_the_released_folder_samples_alike_in_diffusers(finished, tmp_path: Path) -> None:
    location = Path(finished.status()["release"]["location"])
    release = load(Store(finished.store), "release", location.name)
    folder = Path(finished.store) / Path(release.units[0].path("model_index.json")).parent
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pipelines.cli", "sample", str(folder), "--prompt", "flag of Japan, noto style"),
            *("--out", str(tmp_path), "--grid", str(tmp_path / "grid.png"), "--seed", "7", "--steps", "4"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "00000.png"), str(tmp_path / "grid.png")]

    import numpy as np
    import torch
    from diffusers import StableDiffusionPipeline
    from PIL import Image

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(7))
    image = pipeline(
        "flag of Japan, noto style", latents=noise, guidance_scale=3.0, num_inference_steps=4, height=64, width=64
    ).images[0]
    difference = np.abs(np.asarray(image, np.int16) - np.asarray(Image.open(tmp_path / "00000.png"), np.int16))
    assert (difference <= 1).mean() > 0.999


def test_a_trained_autoencoder_is_exported_as_weights_to_start_from(finished, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    command = (sys.executable, "-m", "pipelines.commands.export_weights", "quickstart")
    done = subprocess.run(
        [*command, "autoencoder", str(folder), *finished.arguments()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts["sha256"] == file_sha256(folder / "diffusion_pytorch_model.safetensors")
    assert facts["revision"] == finished.status()["train.autoencoder"]["revision"]
    assert next(figure["value"] for figure in facts["figures"] if figure["name"] == "psnr") > 0
    plan = finished.ldm("--set", f"models.autoencoder.init={folder}", "--dry-run").stdout
    assert "init" in next(line for line in plan.splitlines() if line.startswith("train.autoencoder"))

    unknown = subprocess.run(
        [*command, "no_such", str(folder), *finished.arguments()], capture_output=True, text=True, check=False
    )
    assert (unknown.returncode, "train.no_such" in unknown.stderr) == (2, True)
    assert "Traceback" not in unknown.stderr


def test_a_report_needs_no_cluster(finished) -> None:
    revision = finished.status()["report"]["revision"]
    done = finished.ldm("--until", "report", "--force", "report")
    assert done.returncode == 0, done.stdout
    assert "starting Ray" not in done.stdout
    assert finished.status()["report"]["revision"] == revision
