"""A damaged store with real shards in it: what is found, what a repair asks again, and what a stage says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from infra.storage import Store
from pipelines.artifacts import Artifact
from pipelines.building import InputsDamaged
from pipelines.recipe.file import load_recipe
from pipelines.workflow.graph import Node, build_graph
from pipelines.workflow.repair import cost, repair
from pipelines.workflow.verification import NodeCheck, verify

RECIPE = """\
name: pictures
source: {{kind: folder, path: "{folder}/pictures", captions: filename}}
acquire:
  shard_size: 5
  image: {{size_px: 16, resize_mode: border, encode_format: png, encode_quality: 1}}
  filter: {{min_side_px: 1}}
report: false
models: {{}}
store: "{folder}/store"
state_dir: "{folder}/state"
"""


class Pictures:
    """A folder of ten pictures, of which `acquire` makes two shards, and `select` chooses."""

    def __init__(self, folder: Path) -> None:
        (folder / "pictures").mkdir()
        for number in range(10):
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
            cv2.imwrite(str(folder / "pictures" / f"picture {number}.png"), pixels)
        (folder / "pictures.yaml").write_text(RECIPE.format(folder=folder))
        self.recipe = load_recipe(str(folder / "pictures.yaml"))
        self.store = Store(self.recipe.store)
        self.nodes = build_graph(self.recipe)

    def make(self, report: Any) -> dict[str, Artifact]:
        found: dict[str, Artifact] = {}
        for name, node in self.nodes.items():
            inputs = {needed: found[needed] for needed in node.inputs}
            found[name] = node.run(inputs, self.store, report, self.recipe.execution)
        return found

    def verify(self) -> list[NodeCheck]:
        return list(verify(self.nodes, self.store, self.recipe.name, lambda *_: None))

    @property
    def select(self) -> Node:
        return self.nodes["select"]


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    return Pictures(tmp_path)


def test_one_flipped_bit_costs_one_picture(local_ray: None, pictures: Pictures, report: Any) -> None:
    before = pictures.make(report)
    assert [check.state for check in pictures.verify()] == ["sound", "sound"]
    spoilt, whole = before["acquire"].units
    tar = Path(pictures.store.location(spoilt.only(".tar")))
    data = bytearray(tar.read_bytes())
    place = data.index(b"IDAT") + 40
    data[place] ^= 1
    tar.write_bytes(bytes(data))

    (found, _) = pictures.verify()
    assert [(damage.path, damage.unit) for damage in found.damages] == [(spoilt.only(".tar"), spoilt.key)]
    assert cost(pictures.store, found).words.startswith("1 shard made again: up to 5 URLs asked again")
    repair(pictures.store, [found])
    untouched = Path(pictures.store.location(whole.only(".tar"))).stat().st_mtime_ns
    after = pictures.make(report)
    assert after["acquire"].revision == before["acquire"].revision, "the same pictures: nothing else is made again"
    assert after["select"].key == before["select"].key
    assert Path(pictures.store.location(whole.only(".tar"))).stat().st_mtime_ns == untouched
    assert {unit.key: unit.info["taken_over"] for unit in after["acquire"].units} == {
        spoilt.key: 4,
        whole.key: whole.info["taken_over"],
    }
    assert [check.state for check in pictures.verify()] == ["sound", "sound"]


@pytest.mark.parametrize("how", ["deleted", "cut"])
def test_a_stage_says_at_once_that_its_input_is_damaged(
    local_ray: None, pictures: Pictures, report: Any, how: str
) -> None:
    """Neither a worker meets it, nor is it tried again."""
    made = pictures.make(report)
    ledger = made["acquire"].units[1].only(".parquet")
    pictures.store.delete(f"select/keys/{made['select'].key}.json")
    if how == "deleted":
        pictures.store.delete(ledger)
    else:
        pictures.store.publish_bytes(ledger, pictures.store.read_bytes(ledger)[:100])
    report.steps.clear()
    what = "is missing" if how == "deleted" else r"has 100 of \d+ bytes"
    with pytest.raises(InputsDamaged, match=rf"{ledger} {what}; .*`ldm store verify RECIPE --repair`"):
        pictures.select.run({"acquire": made["acquire"]}, pictures.store, report, pictures.recipe.execution)
    assert report.steps == []
    repair(pictures.store, pictures.verify())
    assert pictures.make(report)["select"].revision == made["select"].revision
