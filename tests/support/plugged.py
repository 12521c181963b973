"""A plugin to try things with, and a way to have its names unknown again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.recipe import plugins

PLUGIN = '''\
"""How bright a picture is, and Euler's solver by another name."""

import pyarrow as pa

from ldm.samplers import SAMPLERS, Sampler
from pipelines.plugins import Block, Column, register_sampler, register_scorer


class Options(Block):
    scale: float = 1.0
    """What brightness is multiplied with."""


def make(options, place):
    def score(images, captions):
        return {"brightness": [options.scale * float(image.mean()) / 255 for image in images]}

    return score


column = Column("brightness", pa.float32(), 0.0, 1.0, told=True)
register_scorer("brightness", make, [column], options=Options, reads_captions=False)
register_sampler("own_euler", Sampler(SAMPLERS["euler"].levels_of, SAMPLERS["euler"].solve))
'''


def write_plugin(folder: Path, text: str = PLUGIN, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def plugin_at(folder: Path, text: str = PLUGIN, name: str = "mine.py") -> plugins.Plugin:
    """One that is written to a file, and read."""
    (read,), problems = plugins.read_plugins([name], write_plugin(folder, text, name).parent)
    assert problems == []
    return read


@contextmanager
def no_plugins_left() -> Iterator[None]:
    """What is loaded within is not known after it."""
    try:
        yield
    finally:
        for plugin in list(plugins._in_use):
            plugins._withdraw(plugin)
