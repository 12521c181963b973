"""What is known of pictures, images and texts already, by this evaluation before it was killed, and by earlier ones.

Values are rows of *columns*. A column's key is a hash of who tells them and with what; a row is known by a hash of what
they are told of. Published units have those they made in `features.npz`, and say in `columns` which they are.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.storage import Store
from pipelines.artifacts import Unit, find_unit
from pipelines.dataset.earlier import UNREADABLE, Inputs, inputs_of, recorded_file
from pipelines.dataset.shards import Pixels

FEATURES, SAMPLES = "features.npz", "samples.json"
PICTURES = "trained.pictures"
"""Name of the column of the trained network's pictures, which units hold as PNG too."""
ROWS = ".rows"

Values = NDArray[Any]

logger = logging.getLogger(__name__)


class Known:
    """Rows that need not be made again; those made now are kept in the folder `work` of the store."""

    def __init__(self, store: Store, work: str) -> None:
        self._store = store
        self._work = work
        self._rows: dict[str, dict[bytes, Values]] = {}
        for columns in self._unfinished(work):
            self._take(columns)

    def has(self, column: str, row: bytes) -> bool:
        return row in self._rows.get(column, {})

    def values(self, column: str, rows: Inputs) -> Values:
        """A row for each of `rows`, all of which must be known."""
        known = self._rows.get(column, {})
        return np.stack([known[row] for row in rows.tolist()])

    def add(self, columns: Mapping[str, Values], rows: Inputs) -> None:
        """Values by column, for `rows`: kept for whoever goes on if this process dies."""
        made = {column: (rows, values) for column, values in columns.items()}
        data = packed(made)
        self._store.publish_bytes(f"{self._work}/{_name_of(data)}", data)
        self._take(made)

    def take_over(self, stage: str, columns: Collection[str], wanted_pictures: Collection[bytes]) -> None:
        """Learn of `columns` all that the stage's units hold, published ones and others that were not finished.

        Of the trained network's pictures only those in `wanted_pictures`.
        """
        for key in self._store.listdir(f"{stage}/unfinished"):
            if f"{stage}/unfinished/{key}" != self._work:
                for found in self._unfinished(f"{stage}/unfinished/{key}"):
                    self._take({column: rows for column, rows in found.items() if column in columns})
        for key in self._store.listdir(f"{stage}/units"):
            unit = find_unit(self._store, stage, key)
            own: Mapping[str, str] = {} if unit is None else unit.info.get("columns", {})
            fitting = {name: column for name, column in own.items() if column in columns}
            if unit is None or not fitting:
                continue
            try:
                self._take_from(unit, fitting, wanted_pictures)
            except UNREADABLE as error:
                logger.warning("nothing is taken over from unit %s of %s: %s", key, stage, error)

    def _take_from(self, unit: Unit, columns: Mapping[str, str], wanted_pictures: Collection[bytes]) -> None:
        if unit.has(FEATURES):
            found = unpacked(recorded_file(self._store, unit, FEATURES).read_bytes())
            self._take({column: found[name] for name, column in columns.items() if name in found})
        if PICTURES in columns:
            column = columns[PICTURES]
            for sample in json.loads(recorded_file(self._store, unit, SAMPLES).read_bytes())["samples"]:
                (row,) = picture_rows([sample["prompt"]], [sample["seed"]]).tolist()
                if row in wanted_pictures and not self.has(column, row):
                    picture = _pixels(recorded_file(self._store, unit, sample["file"]).read_bytes())
                    self._rows.setdefault(column, {})[row] = picture

    def _unfinished(self, work: str) -> Iterator[dict[str, tuple[Inputs, Values]]]:
        """The files that `add` left in a folder, by column; those that are damaged are left out."""
        for name in self._store.listdir(work):
            try:
                data = self._store.read_bytes(f"{work}/{name}")
            except FileNotFoundError:
                continue  # that evaluation ended meanwhile
            if name == _name_of(data):
                yield unpacked(data)
            else:
                logger.warning("%s is not what was written: it is made again", self._store.location(f"{work}/{name}"))

    def _take(self, columns: Mapping[str, tuple[Inputs, Values]]) -> None:
        for column, (rows, values) in columns.items():
            known = self._rows.setdefault(column, {})
            for row, value in zip(rows.tolist(), values, strict=True):
                known.setdefault(row, value)


def picture_rows(prompts: Sequence[str], seeds: Sequence[int]) -> Inputs:
    """What pictures are known by, beside who makes them."""
    return inputs_of([str(seed) for seed in seeds], list(prompts))


def packed(columns: Mapping[str, tuple[Inputs, Values]], beside: Mapping[str, Values] | None = None) -> bytes:
    """An npz of the values by name, and of their rows, with `beside` as it is. The same for the same values."""
    sink = io.BytesIO()
    arrays = {name: values for name, (_, values) in columns.items()}
    arrays |= {f"{name}{ROWS}": rows for name, (rows, _) in columns.items()}
    np.savez(sink, **arrays, **(beside or {}))  # type: ignore[arg-type]
    return sink.getvalue()


def unpacked(data: bytes) -> dict[str, tuple[Inputs, Values]]:
    """Rows and values by name, of what `packed` made, without what is beside them."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        names = [name for name in file.files if f"{name}{ROWS}" in file.files]
        return {name: (np.asarray(file[f"{name}{ROWS}"], "S16"), file[name]) for name in names}


def _name_of(data: bytes) -> str:
    """By which a file that was cut short or edited is told."""
    return f"{hashlib.sha256(data).hexdigest()[:32]}.npz"


def _pixels(png: bytes) -> Pixels:
    """RGB, uint8 [H, W, 3]."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return np.array(image.convert("RGB"))
