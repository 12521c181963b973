from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from infra.storage import FileDamaged, Store
from pipelines.dataset.errors import CacheMismatch, UnusableData
from pipelines.dataset.samples import sample_id
from pipelines.train.loader import LatentCache


def column(store, artifact, name):
    """All values of a column, read the plain way, with the split of each row."""
    tables = [
        pa.ipc.open_file(pa.BufferReader(store.read_bytes(unit.path("cache.arrow")))).read_all()
        for unit in artifact.units[:-1]
    ]
    table = pa.concat_tables(tables)
    return [
        value
        for value, split in zip(table.column(name).to_pylist(), table.column("split").to_pylist(), strict=True)
        if split == "train"
    ]


def test_rows_are_those_of_the_train_split_in_the_order_of_the_shards(store, latents):
    artifact = latents(num=23)
    cache = LatentCache(store, artifact.units, {})
    assert len(cache) == 19
    batch = cache.rows(range(19))
    assert batch.sample_ids == [sample_id(uid) for uid in column(store, artifact, "uid")]
    assert batch.moments.dtype == batch.text.dtype == torch.float16
    np.testing.assert_array_equal(batch.moments.reshape(19, -1).numpy(), np.array(column(store, artifact, "moments")))
    np.testing.assert_array_equal(batch.text.reshape(19, -1).numpy(), np.array(column(store, artifact, "text")))


def test_rows_can_be_asked_for_in_any_order_and_again(store, latents):
    cache = LatentCache(store, latents().units, {})
    rows = [18, 3, 3, 7, 0]
    batch = cache.rows(rows)
    assert batch.moments.shape == (5, 8, 4, 4)
    assert batch.text.shape == (5, 3, 6)
    for at, row in enumerate(rows):
        assert torch.equal(batch.moments[at], cache.rows([row]).moments[0])


def test_a_batch_is_a_copy_so_that_the_cache_can_not_be_written_through_it(store, latents):
    cache = LatentCache(store, latents().units, {})
    before = cache.rows([2]).moments
    cache.rows([2]).moments.zero_()
    assert torch.equal(cache.rows([2]).moments, before)


def test_the_empty_prompt_has_its_own_states(store, latents):
    assert torch.equal(LatentCache(store, latents().units, {}).null_text(), torch.full((3, 6), 0.5).half())


def test_held_out_rows_are_apart(store, latents):
    train, held_out = (LatentCache(store, latents().units, {}, split=split) for split in ("train", "held_out"))
    assert len(held_out) == 4
    ids = [set(cache.rows(range(len(cache))).sample_ids) for cache in (train, held_out)]
    assert ids[0].isdisjoint(ids[1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("autoencoder_sha256", "bbbb"),
        ("text_encoder", "minilm@2"),
        ("text_shape", [24, 384]),
        ("transform", "center_square 64"),
    ],
)
def test_a_cache_made_with_something_else_is_refused_by_name(store, latents, name, expected):
    artifact = latents(autoencoder_sha256="aaaa", text_encoder="minilm@1")
    with pytest.raises(CacheMismatch, match=f"made with {name} .* encode"):
        LatentCache(store, artifact.units, {name: expected}).rows([0])


def test_a_cache_made_with_the_same_is_accepted(store, latents):
    artifact = latents(autoencoder_sha256="aaaa", text_encoder="minilm@1")
    binding = {"autoencoder_sha256": "aaaa", "text_encoder": "minilm@1", "text_shape": [3, 6]}
    assert LatentCache(store, artifact.units, binding).rows([0]).moments.shape == (1, 8, 4, 4)


def test_a_file_with_other_rows_than_its_record_says_is_refused(store, latents):
    unit = latents(num=23).units[4]
    with pytest.raises(UnusableData, match="has 3 train rows, its record says 4"):
        LatentCache(store, [replace(unit, info={**unit.info, "train": 4})], {}).rows([0])


def test_another_units_file_is_refused(store, latents):
    artifact = latents(num=23)
    short = store.read_bytes(artifact.units[4].path("cache.arrow"))
    store.publish_bytes(artifact.units[0].path("cache.arrow"), short)
    with pytest.raises(FileDamaged, match=r"cache\.arrow has \d+ bytes, but was published with"):
        LatentCache(store, artifact.units, {}).rows([0])


def test_a_flipped_bit_in_a_copy_of_a_remote_file_is_noticed_and_the_file_fetched_anew(latents, s3_url, tmp_path):
    artifact = latents.func(Store(s3_url), tmp_path)
    before = LatentCache(artifact.store, artifact.units, {})
    rows, null = before.rows(range(len(before))), before.null_text()
    copies = list((tmp_path / "cache" / "files").rglob("*.arrow"))
    assert len(copies) == len(artifact.units)
    for copy in copies:
        data = bytearray(copy.read_bytes())
        data[len(data) // 2 :] = bytes(byte ^ 1 for byte in data[len(data) // 2 :])
        copy.write_bytes(data)
    after = LatentCache(artifact.store, artifact.units, {})
    assert torch.equal(after.rows(range(len(after))).moments, rows.moments)
    assert torch.equal(after.null_text(), null)
