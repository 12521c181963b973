"""Images of acquired shards by number: which they are, how they are cut, and what is said if one can't be read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infra.storage import Store
from pipelines.artifacts import Artifact
from pipelines.dataset.errors import UnusableData, UnusableImage
from pipelines.dataset.images import SelectedImages, square
from pipelines.dataset.samples import sample_id
from pipelines.dataset.selection import Side, read_selection

SIZE_PX = 16


@pytest.fixture
def artifacts(published: Any) -> tuple[Artifact, Artifact]:
    acquired = published.acquire()
    return acquired, published.select(acquired)


def images(artifacts: tuple[Artifact, Artifact], side: Side = "train", **options: Any) -> SelectedImages:
    acquire, select = artifacts
    return SelectedImages(acquire.store, acquire, select, split=side, **options)


@pytest.mark.parametrize("side", ["train", "held_out"])
def test_only_the_split_that_is_asked_for(artifacts: tuple[Artifact, Artifact], store: Store, side: Side) -> None:
    uids = read_selection(artifacts[1], store, ["uid"], side).column("uid").to_pylist()
    found = images(artifacts, side)
    assert len(found) == len(uids) > 0
    assert found.sample_ids(range(len(uids))) == [sample_id(uid) for uid in uids]


def test_pixels_are_those_of_the_tar(artifacts: tuple[Artifact, Artifact], store: Store) -> None:
    row = read_selection(artifacts[1], store, ["shard", "key"], "train").to_pylist()[11]
    (unit,) = [unit for unit in artifacts[0].units if unit.info["shard"] == row["shard"]]
    with tarfile.open(fileobj=io.BytesIO(store.read_bytes(unit.only(".tar")))) as tar:
        member = tar.extractfile(f"{row['key']}.png")
        assert member is not None
        expected = np.asarray(Image.open(member))
    batch = images(artifacts).rows([11, 0, 11])
    assert batch.dtype == torch.uint8
    assert batch.shape == (3, SIZE_PX, SIZE_PX, 3)
    np.testing.assert_array_equal(batch[0].numpy(), square(expected, SIZE_PX))
    assert torch.equal(batch[0], batch[2])
    assert not torch.equal(batch[0], batch[1])


@pytest.mark.parametrize("cache_bytes", [0, 3 * SIZE_PX * SIZE_PX * 3 + 1, 10**9])
def test_the_cache_is_bounded_and_changes_nothing(artifacts: tuple[Artifact, Artifact], cache_bytes: int) -> None:
    dataset = images(artifacts, cache_bytes=cache_bytes)
    batches = [dataset.rows(range(len(dataset))) for _ in range(2)]
    assert torch.equal(*batches)
    assert torch.equal(batches[0], images(artifacts).rows(range(len(dataset))))
    kept_bytes = sum(pixels.nbytes for pixels in dataset._decoded.values())
    assert kept_bytes <= cache_bytes
    assert len(dataset._decoded) == min(cache_bytes // (SIZE_PX * SIZE_PX * 3), len(dataset))


def test_a_flipped_bit_in_a_copy_of_a_remote_shard_is_noticed_and_the_shard_fetched_anew(
    published: Any, s3_url: str, tmp_path: Path
) -> None:
    remote = type(published)(Store(s3_url), tmp_path / "remote")
    acquired = remote.acquire()
    artifacts = acquired, remote.select(acquired)
    rows = images(artifacts).rows(range(10))
    for copy in (tmp_path / "cache" / "files").rglob("*.tar"):
        copy.write_bytes(copy.read_bytes().replace(b"IDAT", b"IDBT"))
    assert torch.equal(images(artifacts).rows(range(10)), rows)


def test_other_sizes_become_squares_of_the_size_asked_for(artifacts: tuple[Artifact, Artifact]) -> None:
    assert images(artifacts, size_px=8).rows([0, 1]).shape == (2, 8, 8, 3)


def test_square_takes_the_middle() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert (square(pixels, 10) == 200).all()
    assert (square(pixels, 5) == 200).all()
    assert square(pixels[:, :7], 20).shape == (20, 20, 3)


def test_a_damaged_image_is_named(published: Any) -> None:
    acquired = published.acquire((8,), spoil="000000005")
    side: Side
    for side in ("train", "held_out"):
        found = images((acquired, published.select(acquired)), side, size_px=8)
        if sample_id(f"{5:032x}") in found.sample_ids(range(len(found))):
            with pytest.raises(UnusableImage, match=r"image '000000005' of .*00000\.tar can't be decoded"):
                found.rows(range(len(found)))
            return
    raise AssertionError("the image is on neither side")


def test_an_image_that_is_not_there_is_named(published: Any) -> None:
    whole, part = published.acquire((12, 12)), published.acquire((12,))
    found = images((part, published.select(whole)))
    with pytest.raises(UnusableData, match="shard 00001, which `acquire` did not publish"):
        found.rows(range(len(found)))
