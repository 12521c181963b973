"""The card of a released model: what it is, how to use it, and what it was made from, as the manifests say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.storage import Store
from pipelines.artifacts import Artifact, Counts, load

LICENCE = "licence"
UNKNOWN = "not stated"

USE = """\
## Use

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("path/to/this/folder")
pipeline("{prompt}", height={size_px}, width={size_px}, guidance_scale={guidance_scale}).images[0].save("sample.png")
```
"""


def write_card(model_name: str, inputs: Mapping[str, Artifact], store: Store) -> str:
    """Markdown, with the front matter that model hubs read.

    Raises `pipelines.artifacts.ArtifactError` if a manifest is missing.
    """
    nodes = ancestors(inputs, store)
    trained = nodes[f"train.{model_name}"]
    sampling = nodes[f"evaluate.{model_name}"].manifest["spec"]["sampling"]
    size_px = _size_px(nodes, model_name)
    example = USE.format(
        prompt=sampling["prompts"][0].replace('"', "'"), size_px=size_px, guidance_scale=sampling["guidance_scale"]
    )
    parts = [
        "---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n---\n",
        f"# {model_name}: a text-to-image latent diffusion model\n",
        "Made with Latentworks. All figures are from the manifests of the run that made it.\n",
        "![samples](grid.png)\n",
        example,
        f"## Training\n\n{_table(('part', 'steps', 'samples', 'revision'), _training(nodes))}",
        _data(nodes, store),
        f"## Versions\n\n{', '.join(f'{name} {version}' for name, version in trained.manifest['versions'].items())}\n",
    ]
    return "\n".join(parts)


def ancestors(inputs: Mapping[str, Artifact], store: Store) -> dict[str, Artifact]:
    """The inputs and all that they were made from, by node.

    Raises `pipelines.artifacts.ArtifactError` if a manifest is missing.
    """
    found = dict(inputs)
    pending = list(inputs.values())
    while pending:
        for name, revision in pending.pop().manifest["inputs"].items():
            if name not in found:
                found[name] = load(store, name, revision)
                pending.append(found[name])
    return found


def licences(acquired: Artifact, selected: Artifact, store: Store) -> Counter[str]:
    """How many selected samples there are of each licence, as the ledgers state it."""
    with store.open(selected.units[0].path("selection.parquet")) as file:
        selection = pq.read_table(file, columns=["shard", "key"])
    counted: Counter[str] = Counter()
    for unit in acquired.units:
        keys = selection.filter(pc.equal(selection.column("shard"), int(unit.info["shard"]))).column("key")
        with store.open(unit.only(".parquet")) as file:
            ledger = pq.ParquetFile(file)
            if LICENCE not in ledger.schema_arrow.names:
                counted[UNKNOWN] += len(keys)
                continue
            rows = ledger.read(["key", LICENCE])
        used = rows.filter(pc.is_in(rows.column("key"), keys.combine_chunks())).column(LICENCE).cast(pa.string())
        for entry in pc.value_counts(pc.fill_null(used, UNKNOWN)).to_pylist():
            counted[entry["values"] or UNKNOWN] += entry["counts"]
    return counted


def _training(nodes: Mapping[str, Artifact]) -> list[tuple[Any, ...]]:
    return [
        (name, _count(artifact.info.get("steps")), _count(artifact.counts.kept), f"`{artifact.revision}`")
        for name, artifact in sorted(nodes.items())
        if name.startswith("train.")
    ]


def _data(nodes: Mapping[str, Artifact], store: Store) -> str:
    if "acquire" not in nodes or "select" not in nodes:
        return "## Data\n\nNo record of it.\n"
    acquired, selected = nodes["acquire"], nodes["select"]
    kind = acquired.manifest["spec"].get("source", {}).get("kind", UNKNOWN)
    sides = f"{_count(selected.info['train'])} to train on, {_count(selected.info['held_out'])} held out"
    rows = [*_funnel("acquire", "URLs", acquired.counts), *_funnel("select", "pairs", selected.counts)]
    stated = sorted(licences(acquired, selected, store).items(), key=lambda item: (-item[1], item[0]))
    return (
        f"## Data\n\nSource: {kind}. {sides}.\n\n{_table(('stage', 'outcome', 'reason', 'count'), rows)}\n"
        f"## Licences of the images\n\n{_table(('licence', 'samples'), [(name, _count(n)) for name, n in stated])}"
    )


def _funnel(stage: str, unit: str, counts: Counts) -> list[tuple[Any, ...]]:
    rows = [(stage, "in", "", f"{_count(counts.total)} {unit}")]
    for outcome, reasons in (("dropped", counts.dropped), ("failed", counts.failed)):
        rows += [("", outcome, reason, _count(count)) for reason, count in sorted(reasons.items()) if count]
    return [*rows, ("", "kept", "", f"{_count(counts.kept)} {unit}")]


def _size_px(nodes: Mapping[str, Artifact], model_name: str) -> int:
    """Of the pictures that the model makes: that of the images it was trained on."""
    transform = str(nodes[f"encode.{model_name}"].info["transform"])
    return int(transform.rpartition(" ")[2])


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *rows]
    return "".join("| " + " | ".join(_cell(value) for value in line) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else UNKNOWN
