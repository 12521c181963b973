"""The cache's format: what is written comes back, and what it is bound to is held."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.dataset import cache
from pipelines.dataset.cache import CacheRows, CacheSchema, null_file, open_cache, write_cache
from pipelines.dataset.errors import CacheDamaged, CacheMismatch

SCHEMA = CacheSchema(
    moments_shape=(8, 2, 3),
    text_shape=(4, 5),
    autoencoder_sha256="a" * 64,
    text_encoder="minilm@1234",
    text_form="padded",
    transform="center_square 16",
)


def rows(n: int, first: int = 0) -> CacheRows:
    random = np.random.default_rng(first)
    return CacheRows(
        uid=[f"{first + i:032x}" for i in range(n)],
        key=[f"{first + i:09d}" for i in range(n)],
        split=["held_out" if (first + i) % 4 == 0 else "train" for i in range(n)],
        caption=[f"é {first + i}" for i in range(n)],
        moments=random.normal(size=(n, *SCHEMA.moments_shape)).astype(np.float16),
        text=random.normal(size=(n, *SCHEMA.text_shape)).astype(np.float16),
        original_width=range(first, first + n),
        original_height=[7] * n,
    )


def write(path: Path, *parts: CacheRows) -> Path:
    with write_cache(path, SCHEMA) as writer:
        for part in parts:
            writer.append(part)
    return path


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    parts = [rows(3), rows(5, first=3)]
    file = open_cache(write(tmp_path / "c.arrow", *parts))
    assert len(file) == 8
    assert file.schema == SCHEMA
    np.testing.assert_array_equal(np.concatenate(file.moments()), np.concatenate([part.moments for part in parts]))
    np.testing.assert_array_equal(np.concatenate(file.text()), np.concatenate([part.text for part in parts]))
    for column in ("uid", "key", "split", "caption"):
        assert file.strings(column) == [value for part in parts for value in getattr(part, column)]
    assert file.table.column("original_width").to_pylist() == list(range(8))
    assert file.table.schema.field("original_width").type == pa.int32()


def test_bytes_do_not_depend_on_the_batches_they_were_encoded_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "ROWS_PER_BATCH", 8)
    whole = rows(20)
    names = ("uid", "key", "split", "caption", "moments", "text", "original_width", "original_height")
    cuts = ([0, 20], [0, 7, 8, 9, 20], [0, 8, 16, 20], [0, 1, 19, 20], list(range(21)))
    written = set()
    for number, cut in enumerate(cuts):
        parts = [CacheRows(**{name: getattr(whole, name)[a:b] for name in names}) for a, b in itertools.pairwise(cut)]
        path = write(tmp_path / f"{number}.arrow", *parts)
        written.add(path.read_bytes())
        assert [len(view) for view in open_cache(path).moments()] == [8, 8, 4]
    assert len(written) == 1


def test_no_rows_are_a_file_too(tmp_path: Path) -> None:
    file = open_cache(write(tmp_path / "c.arrow"))
    assert len(file) == 0
    assert file.schema == SCHEMA


def test_arrays_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    """Opening a large cache takes no memory; nothing can write through a view."""
    path = write(tmp_path / "c.arrow", *(rows(500, first=500 * i) for i in range(4)))
    before = pa.total_allocated_bytes()
    file = open_cache(path)
    views = file.moments()
    assert pa.total_allocated_bytes() - before < 4096 < sum(view.nbytes for view in views)
    assert not views[0].flags.writeable
    assert not views[0].flags.owndata


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("autoencoder_sha256", "b" * 64),
        ("text_encoder", "other@1"),
        ("text_shape", [4, 6]),
        ("dtype", "bfloat16"),
        ("transform", "center_square 32"),
    ],
)
def test_another_binding_is_refused_by_name(tmp_path: Path, name: str, value: object) -> None:
    path = write(tmp_path / "c.arrow", rows(2))
    assert len(open_cache(path, SCHEMA.binding())) == 2
    with pytest.raises(CacheMismatch, match=name) as caught:
        open_cache(path, SCHEMA.binding() | {name: value})
    assert repr(value) in str(caught.value)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "c.arrow", rows(50))
    whole = path.read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("empty", b""), ("other", b"PK\x03\x04" * 99)):
        damaged = tmp_path / name
        damaged.write_bytes(content)
        with pytest.raises(CacheDamaged, match=name):
            open_cache(damaged)
    with pytest.raises(FileNotFoundError):
        open_cache(tmp_path / "absent")


def test_an_arrow_file_of_others_is_refused(tmp_path: Path) -> None:
    table = pa.table({"text": [1, 2]})
    with pa.ipc.new_file(str(tmp_path / "other.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(CacheDamaged, match="does not say what it was made with"):
        open_cache(tmp_path / "other.arrow")


def test_a_broken_write_leaves_no_readable_file(tmp_path: Path) -> None:
    path = tmp_path / "c.arrow"
    with pytest.raises(KeyError), write_cache(path, SCHEMA) as writer:  # noqa: PT012
        writer.append(rows(300))
        raise KeyError
    if path.exists():
        assert len(pa.ipc.open_file(str(path)).read_all()) < 300


def test_null_states(tmp_path: Path) -> None:
    states = np.random.default_rng(0).normal(size=SCHEMA.text_shape).astype(np.float16)
    (tmp_path / "null.arrow").write_bytes(null_file(SCHEMA, states))
    file = open_cache(tmp_path / "null.arrow", SCHEMA.binding())
    assert file.table.column_names == ["text"]
    np.testing.assert_array_equal(file.text()[0][0], states)
