"""A recipe whose nodes are published without work: small files under the keys that the recipe's own graph asks for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from infra.storage import Store
from pipelines.artifacts import Artifact, Counts
from pipelines.building import building
from pipelines.publishing import publish_unit
from pipelines.recipe import Recipe
from pipelines.recipe.file import load_recipe
from pipelines.workflow.graph import build_graph
from pipelines.workflow.plan import remember

RECIPE = """\
name: small
source: {{kind: urls, files: ["{urls}"], url_column: url, caption_column: caption}}
acquire:
  fetch: {{user_agent: tests/1, contact: "https://example.org/contact"}}
report: false
models:
  autoencoder:
    kind: autoencoder
    network: {{block_out_channels: [8, 8], layers_per_block: 1, norm_num_groups: 4, mid_block_add_attention: false}}
    train: {{steps: 10, global_batch_size: 2}}
store: "{store}"
state_dir: "{state}"
"""
NODES = ("acquire", "select", "train.autoencoder")
ROWS = 7
"""Of each shard."""


class MadeRecipe:
    """A recipe file, and its store. `images` are the shards' contents: equal ones are equal files."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self.store = Store(url or folder / "store")
        self.file = str(folder / "small.yaml")
        (folder / "urls.csv").write_text("url,caption\nhttps://example.org/1.png,one\n")
        text = RECIPE.format(urls=folder / "urls.csv", store=self.store.url, state=folder / "state")
        Path(self.file).write_text(text)
        self.units_made: list[str] = []

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe(self.file, list(overrides))

    def make(self, *overrides: str, images: Sequence[str] = ("a", "b", "c")) -> dict[str, Artifact]:
        """Bring the nodes up to date; what had to be made is in `units_made`, as node and content."""
        self.units_made = []
        found: dict[str, Artifact] = {}
        recipe = self.recipe(*overrides)
        for node in build_graph(recipe).values():
            inputs = {name: found[name] for name in node.inputs}
            made_from = [artifact.revision for artifact in inputs.values()]
            contents = images if node.name == "acquire" else [f"{node.name} {' '.join(made_from)}"]
            with building(self.store, node.name, node.identity, inputs, {}, node.format_version) as build:
                units = []
                for content in contents:
                    key = build.unit_key({"content": content, "made_from": made_from})
                    unit = build.find_unit(key)
                    if unit is None:
                        self.units_made.append(f"{node.name} {content}")
                        data = (content.encode() * 1000)[:1000]
                        files: dict[str, Path | bytes] = {"inner/data.bin": data, "note.txt": content.encode()}
                        unit = publish_unit(self.store, node.name, key, files, Counts(ROWS, ROWS), {"is": content})
                    units.append(unit)
                found[node.name] = build.publish(units)
            remember(self.store, recipe.name, node.name, found[node.name])
        return found

    def path(self, path: str) -> Path:
        """Of a local store."""
        return Path(self.store.location(path))

    def files(self) -> set[str]:
        """All that lies in the store, but for locks."""
        return {name for name in self.store.sizes("") if not name.startswith("locks/")}

    def flip(self, path: str, place: int | None = None) -> None:
        """One bit of a file, by default in its middle."""
        data = bytearray(self.store.read_bytes(path))
        place = 4 * len(data) if place is None else place
        data[place // 8] ^= 1 << place % 8
        self.store.publish_bytes(path, bytes(data))

    def age(self, days: float) -> None:
        """Have all files written so long ago."""
        for path in Path(self.store.url).rglob("*"):
            if path.is_file():
                stat = path.stat()
                os.utime(path, (stat.st_atime, stat.st_mtime - days * 86_400))
