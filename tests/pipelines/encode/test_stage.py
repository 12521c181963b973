"""`encode` as a stage: from published shards and a selection to the cache, with real networks."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from infra.storage import Store
from ldm.autoencoder import AutoencoderKL
from ldm.conditioning.text import load_text_encoder
from ldm.errors import LdmError
from ldm.features import load_extractor
from ldm.interchange import load_network
from ldm.latents import pixels_from_uint8, pixels_to_uint8
from ldm.metrics import frechet_distance_of_features
from pipelines.artifacts import Artifact, artifact_key, fetch_folder
from pipelines.dataset.cache import CacheFile, open_cache
from pipelines.dataset.errors import DatasetError, UnusableImage
from pipelines.dataset.figures import figures_of
from pipelines.dataset.images import square
from pipelines.dataset.samples import selected_samples
from pipelines.dataset.shards import images_of
from pipelines.encode import stage
from pipelines.recipe import Execution, Predicate, TextToImageModel

pytestmark = pytest.mark.usefixtures("in_process")

EXTRACTOR = "efficientnet_lite0"


@pytest.fixture
def inputs(published: Any) -> dict[str, Artifact]:
    acquired = published.acquire()
    return {
        "acquire": acquired,
        "select": published.select(acquired),
        "train.autoencoder": published.autoencoder(),
    }


def encode(
    inputs: dict[str, Artifact],
    store: Store,
    model: TextToImageModel,
    report: Any,
    *,
    extractor: str | None = None,
    **how: Any,
) -> Artifact:
    execution = Execution(device="cpu", extractor=extractor, **how)
    return stage.encode("base", model, inputs, store, report, execution)


def files(artifact: Artifact, store: Store) -> list[CacheFile]:
    return [open_cache(store.fetch(unit.path("cache.arrow"))) for unit in artifact.units[:-1]]


def selected_rows(inputs: dict[str, Artifact], store: Store) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(
        store.open(inputs["select"].units[0].path("selection.parquet"))
    ).to_pylist()
    return rows


def test_cache_holds_what_the_networks_say_of_every_selected_sample(
    inputs: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    artifact = encode(inputs, store, model, report, extractor=EXTRACTOR)
    rows = selected_rows(inputs, store)
    cached = files(artifact, store)

    assert [unit.info["shard"] for unit in artifact.units[:-1]] == ["00000", "00001", "00002"]
    for column in ("uid", "key", "split"):
        assert [value for file in cached for value in file.strings(column)] == [row[column] for row in rows]
    assert artifact.counts.total == artifact.counts.kept == len(rows) == inputs["select"].counts.kept
    sides = [row["split"] for row in rows]
    for side in ("train", "held_out"):
        assert sum(unit.info[side] for unit in artifact.units[:-1]) == sides.count(side) > 0

    vae = load_network(AutoencoderKL, fetch_folder(store, inputs["train.autoencoder"].units[0], "vae"))
    text = load_text_encoder("minilm", 12)
    pixels = [
        square(image, 16)
        for task in selected_samples(inputs["acquire"], inputs["select"], store)
        for image in images_of(task.source, task.keys, store)
    ]
    captions = [value for file in cached for value in file.strings("caption")]
    assert captions == [
        f"{['flag of France', 'red heart', 'grinning face', 'sun', 'cat', 'keycap 7'][n % 6]}, {n} noto style"
        for n in (int(row["key"]) for row in rows)
    ]
    with torch.inference_mode():
        moments = vae.encode(pixels_from_uint8(torch.from_numpy(np.stack(pixels)))).numpy()
        states = text.encode(captions).context.numpy()
        null = text.null(1).context[0].numpy()
    np.testing.assert_allclose(np.concatenate([m for file in cached for m in file.moments()]), moments, atol=2e-3)
    np.testing.assert_allclose(np.concatenate([t for file in cached for t in file.text()]), states, atol=2e-3)
    widths = [value for file in cached for value in file.table.column("original_width").to_pylist()]
    assert widths == [64 + int(row["key"]) for row in rows]

    last = artifact.units[-1]
    assert (last.info["null"], last.counts.total) == (True, 0)
    empty = open_cache(store.fetch(last.path("null.arrow")), cached[0].schema.binding())
    np.testing.assert_allclose(empty.text()[0][0], null, atol=2e-3)

    (weights,) = (e for e in inputs["train.autoencoder"].units[0].files if e.name.endswith(".safetensors"))
    measured = {name: artifact.info[name] for name in ("captions_cut", "figures")}
    assert artifact.info == cached[0].schema.binding() | measured
    assert artifact.info["moments_shape"] == [4, 4, 4]
    assert artifact.info["text_shape"] == [12, 384]
    assert artifact.info["autoencoder_sha256"] == weights.sha256
    assert artifact.info["text_encoder"] == text.identity
    done = [done for done, total, unit, _ in report.steps if (total, unit) == (len(rows), "images")]
    assert done == sorted(done)
    assert done[-1] == len(rows)
    assert report.values["images_per_s"] > 0


def test_long_captions_are_cut_and_counted(published: Any, store: Store, model: TextToImageModel, report: Any) -> None:
    acquired = published.acquire((8,), captions={2: "word " * 11, 4: "word " * 10, 5: "a b"})
    inputs = {"acquire": acquired, "select": published.select(acquired), "train.autoencoder": published.autoencoder()}
    artifact = encode(inputs, store, model, report)
    text = load_text_encoder("minilm", 12)
    captions = [caption for file in files(artifact, store) for caption in file.strings("caption")]
    expected = sum(count > 12 for count in text.num_tokens(captions))
    assert artifact.info["captions_cut"] == report.values["captions_cut"] == expected > 0
    assert expected < len(captions)
    assert any("captions have more than 12 tokens" in note for note in report.notes)


def test_published_units_are_not_made_again(
    inputs: dict[str, Artifact], published: Any, store: Store, model: TextToImageModel, report: Any
) -> None:
    """A selection that leaves a shard alone doesn't encode it again; nor does a new run after a part was done."""
    first = encode(inputs, store, model, report)
    rule = Predicate(name="one_less", column="key", op="!=", value="000000001")
    changed = inputs | {"select": published.select(inputs["acquire"], where=(rule,))}
    second = encode(changed, store, model, report)
    assert second.revision != first.revision
    assert second.counts.kept == first.counts.kept - 1
    shared = [a.key == b.key for a, b in zip(first.units, second.units, strict=True)]
    assert shared == [False, True, True, True]

    lost = first.units[1]  # as if the run had been killed before this one
    store.delete(f"{lost.stage}/units/{lost.key}")
    store.delete(f"{lost.stage}/keys/{first.key}.json")
    kept = {
        unit.key: store.fetch(unit.path(unit.files[0].name)).stat().st_mtime_ns for unit in first.units if unit != lost
    }
    again = encode(inputs, store, model, report)
    assert again.revision == first.revision
    assert {
        unit.key: store.fetch(unit.path(unit.files[0].name)).stat().st_mtime_ns
        for unit in again.units
        if unit.key != lost.key
    } == kept


def test_other_weights_and_other_lengths_are_other_units(
    inputs: dict[str, Artifact], published: Any, store: Store, model: TextToImageModel, report: Any
) -> None:
    first = encode(inputs, store, model, report)
    other = encode(inputs | {"train.autoencoder": published.autoencoder(seed=1)}, store, model, report)
    longer = model.model_copy(update={"text": model.text.model_copy(update={"tokens": 13})})
    third = encode(inputs, store, longer, report)
    keys = [{unit.key for unit in artifact.units} for artifact in (first, other, third)]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]


def test_the_cache_is_the_same_bytes_every_time(
    inputs: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any, published: Any, tmp_path: Any
) -> None:
    first = encode(inputs, store, model, report)
    elsewhere = type(published)(Store(tmp_path / "other"), tmp_path / "networks2")
    acquired = elsewhere.acquire()
    again = {
        "acquire": acquired,
        "select": elsewhere.select(acquired),
        "train.autoencoder": elsewhere.autoencoder(),
    }
    second = encode(again, elsewhere.store, model, report)
    assert second.revision == first.revision
    assert [unit.files for unit in second.units] == [unit.files for unit in first.units]


def test_size_of_batches_makes_nothing_anew(
    inputs: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    first = encode(inputs, store, model, report)
    larger = model.model_copy(update={"encode": model.encode.model_copy(update={"batch_size": 64})})
    assert encode(inputs, store, larger, report, encode_workers=2) == first


def test_a_shard_without_selected_samples_is_an_empty_unit(
    published: Any, store: Store, model: TextToImageModel, report: Any
) -> None:
    acquired = published.acquire((8, 8))
    only_first = published.select(acquired, where=(Predicate(name="first", column="key", op="<", value="000000008"),))
    inputs = {"acquire": acquired, "select": only_first, "train.autoencoder": published.autoencoder()}
    artifact = encode(inputs, store, model, report)
    assert [len(file) for file in files(artifact, store)] == [6, 0]
    assert artifact.units[1].info.items() >= {"shard": "00001", "captions_cut": 0, "train": 0, "held_out": 0}.items()


def test_damaged_image_is_named_and_nothing_is_published(
    published: Any, store: Store, model: TextToImageModel, report: Any
) -> None:
    acquired = published.acquire((8,), spoil="000000005")
    inputs = {"acquire": acquired, "select": published.select(acquired), "train.autoencoder": published.autoencoder()}
    with pytest.raises(UnusableImage, match=r"'000000005'.*can't be decoded"):
        encode(inputs, store, model, report)
    assert store.listdir("encode.base/units") == []
    assert store.listdir("encode.base/revisions") == []


def test_values_that_are_not_numbers_are_refused_with_the_sample(
    published: Any, store: Store, model: TextToImageModel, report: Any
) -> None:
    def spoil(network: AutoencoderKL) -> None:
        with torch.no_grad():
            network.encoder.conv_out.bias.fill_(1e6)  # beyond float16

    acquired = published.acquire((4,))
    inputs = {
        "acquire": acquired,
        "select": published.select(acquired),
        "train.autoencoder": published.autoencoder(change=spoil),
    }
    with pytest.raises(UnusableImage, match=r"sample 0{32} \('000000000' of shard 00000, 'flag of France.*moments"):
        encode(inputs, store, model, report)
    assert store.listdir("encode.base/revisions") == []


def test_selection_of_other_shards_is_refused(
    inputs: dict[str, Artifact], published: Any, store: Store, model: TextToImageModel, report: Any
) -> None:
    with pytest.raises(DatasetError, match=r"shards \['00002'\]"):
        encode(inputs | {"acquire": published.acquire((12, 12))}, store, model, report)
    swapped = published.acquire((12, 12, 8), captions={0: "another"})
    select = published.select(published.acquire((10, 10, 12)))
    with pytest.raises(DatasetError, match="select again"):
        encode(inputs | {"acquire": swapped, "select": select}, store, model, report)


def test_missing_text_encoder_is_told_as_it_is(
    inputs: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    absent = model.model_copy(update={"text": model.text.model_copy(update={"encoder": "/absent/encoder"})})
    with pytest.raises(LdmError, match="'/absent/encoder'"):
        encode(inputs, store, absent, report)


def test_key_is_the_one_that_a_plan_computes(
    inputs: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any
) -> None:
    artifact = encode(inputs, store, model, report)
    assert artifact.key == artifact_key("encode.base", stage.FORMAT_VERSION, stage.identity(model).content, inputs)
    for unit in inputs["acquire"].units:  # answered from the manifest alone
        store.delete(unit.only(".tar"))
    assert encode(inputs, store, model, report) == artifact


def test_what_the_cache_decodes_to_is_held_against_the_images(
    inputs: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of some of the entries, by features; it is told, and has no bearing on what is published."""
    monkeypatch.setattr(stage, "DECODED_IMAGES", 11)
    artifact = encode(inputs, store, model, report, extractor=EXTRACTOR)
    (distance,) = figures_of(artifact)
    assert (distance.label, distance.count) == ("frechet_distance/reconstructions/efficientnet_lite0_128px", 11)
    assert report.values[distance.label] == distance.value
    vae = load_network(AutoencoderKL, fetch_folder(store, inputs["train.autoencoder"].units[0], "vae"))
    total = artifact.counts.kept
    chosen = [number * total // 11 for number in range(11)]
    moments = np.concatenate([m for file in files(artifact, store) for m in file.moments()])[chosen]
    tasks = selected_samples(inputs["acquire"], inputs["select"], store)
    pixels = [square(image, 16) for task in tasks for image in images_of(task.source, task.keys, store)]
    with torch.inference_mode():
        decoded = vae.decode(torch.from_numpy(moments[:, :2]).float())
    extract = load_extractor("efficientnet_lite0")
    originals = extract(torch.from_numpy(np.stack([pixels[row] for row in chosen])))
    expected = frechet_distance_of_features(extract(pixels_to_uint8(decoded)), originals)
    assert distance.value == pytest.approx(expected, rel=0.01)

    store.delete(f"{artifact.stage}/keys")
    store.delete(f"{artifact.stage}/revisions")
    unmeasured = encode(inputs, store, model, report)
    assert unmeasured.revision == artifact.revision
    assert figures_of(unmeasured) == []


def test_without_the_extractors_package_the_cache_is_made_and_a_note_says_so(
    inputs: dict[str, Artifact], store: Store, model: TextToImageModel, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setattr("pipelines.encode.worker.load_extractor", load_extractor)
    artifact = encode(inputs, store, model, report, extractor=EXTRACTOR)
    assert artifact.counts.kept > 0
    assert any("not measured" in note and 'pip install "latentworks[demo]"' in note for note in report.notes)
