import numpy as np
import pytest
import torch

from pipelines.dataset.errors import UnusableData, UnusableImage
from pipelines.dataset.images import SelectedImages, square
from pipelines.dataset.samples import sample_id

SIZE_PX = 16


def images(store, artifacts, split="train", **options) -> SelectedImages:
    acquire, select = artifacts
    return SelectedImages(store, acquire, select, split=split, **options)


def test_only_the_split_that_is_asked_for(store, pictures):
    artifacts = pictures(num=23)
    train, held_out = images(store, artifacts), images(store, artifacts, "held_out")
    assert (len(train), len(held_out)) == (19, 4)
    assert held_out.sample_ids(range(4)) == [sample_id(f"{number:032x}") for number in (4, 9, 14, 19)]


def test_pixels_are_those_of_the_tar(store, pictures):
    import io
    import tarfile

    from PIL import Image

    acquire, select = pictures()
    with tarfile.open(fileobj=io.BytesIO(store.read_bytes(acquire.units[2].path("00002.tar")))) as tar:
        expected = np.asarray(Image.open(tar.extractfile("000020003.png")))
    batch = images(store, (acquire, select)).rows([11, 0, 11])
    assert batch.dtype == torch.uint8
    assert batch.shape == (3, SIZE_PX, SIZE_PX, 3)
    np.testing.assert_array_equal(batch[0].numpy(), expected)
    assert torch.equal(batch[0], batch[2])
    assert not torch.equal(batch[0], batch[1])


@pytest.mark.parametrize("cache_bytes", [0, 3 * SIZE_PX * SIZE_PX * 3 + 1, 10**9])
def test_the_cache_is_bounded_and_changes_nothing(store, pictures, cache_bytes):
    artifacts = pictures()
    dataset = images(store, artifacts, cache_bytes=cache_bytes)
    batches = [dataset.rows(range(len(dataset))) for _ in range(2)]
    assert torch.equal(*batches)
    assert torch.equal(batches[0], images(store, artifacts).rows(range(len(dataset))))
    kept_bytes = sum(pixels.nbytes for pixels in dataset._decoded.values())
    assert kept_bytes <= cache_bytes
    assert len(dataset._decoded) == min(cache_bytes // (SIZE_PX * SIZE_PX * 3), len(dataset))


def test_other_sizes_become_squares_of_the_size_asked_for(store, pictures):
    assert images(store, pictures(), size_px=8).rows([0, 1]).shape == (2, 8, 8, 3)


def test_square_takes_the_middle():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    assert (square(pixels, 10) == 200).all()
    assert (square(pixels, 5) == 200).all()
    assert square(pixels[:, :7], 20).shape == (20, 20, 3)


def test_a_damaged_image_is_named(store, pictures):
    acquire, select = pictures()
    path = acquire.units[0].path("00000.tar")
    store.publish_bytes(path, store.read_bytes(path).replace(b"\x89PNG", b"GIF8"))
    with pytest.raises(UnusableImage, match=r"image '000000000' of .*00000\.tar can't be decoded"):
        images(store, (acquire, select)).rows([0])


def test_an_image_that_is_not_there_is_named(store, pictures):
    _, select = pictures(num=24)
    acquire, _ = pictures(num=20)
    with pytest.raises(UnusableData, match="shard 4, which `acquire` did not publish"):
        images(store, (acquire, select)).rows([16])
