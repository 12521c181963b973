"""What is wanted of a model, in parts: pictures, real images and texts that are told of alike.

A row of a part is known by a hash of what it is told of, a *column* by who tells: see `known`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.artifacts import Unit, digest
from pipelines.dataset.earlier import Inputs, inputs_of
from pipelines.evaluate.generate import Network, Shot
from pipelines.evaluate.known import PICTURES, picture_rows
from pipelines.evaluate.pairs import Comparison, Pair
from pipelines.evaluate.worker import ImagesTask, Kind, MeasureJob, PicturesTask, Task, TextsTask
from pipelines.recipe import EvaluateSpec
from pipelines.recipe.registered import hashes_of, sampler_key

SHOWN = 8
"""Prompts of each side whose pictures are shown beside the real images."""
SAMPLES_AT_ONCE = 16

Make = Callable[[int, Sequence[Kind], Sequence[int]], Task]
"""The task of a number that tells some kinds of the rows at some places."""


@dataclass(frozen=True)
class Part:
    """Rows of one `subject`, which is the first half of their columns' names: "trained", "initial", "real", "text"."""

    subject: str
    kinds: tuple[Kind, ...]
    """Told of all rows."""
    rows: Inputs
    make: Make
    batch_size: int
    num_pictures: int = 0
    """Number of rows, the first ones, that are wanted as pictures too."""

    @property
    def is_seen(self) -> bool:
        """Whether the part is of pictures or images, and not of texts."""
        return self.subject != "text"

    def wanted(self, place: int) -> tuple[Kind, ...]:
        return (*self.kinds, "pictures") if place < self.num_pictures else self.kinds

    def column(self, kind: Kind) -> str:
        """Name of the column that tells it."""
        return f"{self.subject}.{kind}"


def column_keys(job: MeasureJob, identities: Mapping[str, str], size_px: int) -> dict[str, str]:
    """What columns are known by, by name: who tells with what, as `worker.Measurer.identities` has it."""
    model = job.model
    sampling = model.sampling.content(exclude=frozenset({"prompts", "seed", "sampler"}))
    sampling["sampler"] = sampler_key(model.sampling.sampler)
    alike = {
        "autoencoder": folder_hashes(job.autoencoder, "vae"),
        "text": [identities["text_encoder"], model.text.content()],
        "diffusion": model.diffusion.content(),
        "sampling": sampling,
    }
    unet = folder_hashes(job.unet, "unet")
    subjects = {
        "trained": [unet, alike],
        "initial": [unet["unet/config.json"], model.train.seed, alike],
        "real": ["square", size_px],
    }
    keys = {PICTURES: digest(subjects["trained"])}
    if job.figures is not None:
        extractor: list[Any] = [identities["extractor"], identities["extractor_sha256"]]
        hashes = hashes_of(job.figures.extractor_key)
        extractor += [hashes] if hashes else []
        keys |= {f"{subject}.features": digest([made, extractor]) for subject, made in subjects.items()}
    if "judge" in identities:
        judge = identities["judge"]
        keys |= {f"{subject}.judged": digest([made, judge]) for subject, made in subjects.items()}
        keys["text.texts"] = digest(["text", judge])
    return keys


def folder_hashes(unit: Unit, folder: str) -> dict[str, str]:
    """sha256 of each file of the unit under `folder`, by name."""
    return {entry.name: entry.sha256 for entry in unit.files if entry.name.startswith(f"{folder}/")}


def sample_part(samples: Sequence[Shot]) -> Part:
    """The pictures of the recipe's prompts."""
    return _pictures("trained", (), samples, SAMPLES_AT_ONCE, len(samples))


def parts_of(comparison: Comparison, spec: EvaluateSpec, *, features_known: bool) -> dict[str, Part]:
    """What figures are taken from, by name. `features_known`: those of real images are, from elsewhere."""
    judged: tuple[Kind, ...] = () if spec.judge is None else ("judged",)
    both, size = ("features", *judged), spec.batch_size
    seen, unseen = (_shots(pairs, spec.seed) for pairs in (comparison.described, comparison.held_out))
    of_images: tuple[Kind, ...] = () if features_known else ("features",)
    parts = {
        "seen": _pictures("trained", both, seen, size, SHOWN),
        "untrained": _pictures("initial", both, seen if spec.untrained else [], size),
        "unseen": _pictures("trained", both, unseen, size, SHOWN),
        "described": _images((*of_images, *judged), comparison.described, size),
        "reference": _images(of_images, comparison.reference, size),
        "held_out": _images(of_images, comparison.held_out, size),
        "prompts_seen": _texts(seen if judged else [], size),
        "prompts_unseen": _texts(unseen if judged else [], size),
    }
    return {name: part for name, part in parts.items() if len(part.rows) and (part.kinds or part.num_pictures)}


def identifiers(comparison: Comparison, spec: EvaluateSpec) -> dict[str, Any]:
    """The uid of each row's pair in the parts of pictures and images, and of pictures the seed, as lists by name."""
    sides = {"seen": comparison.described, "unseen": comparison.held_out}
    found: dict[str, Any] = {
        f"{name}.seed": [_noise_seed(spec.seed, p.uid) for p in side] for name, side in sides.items()
    }
    sides |= {"reference": comparison.reference}
    return found | {f"{name}.uid": [pair.uid for pair in side] for name, side in sides.items()}


def _pictures(
    network: Network, kinds: tuple[Kind, ...], shots: Sequence[Shot], batch_size: int, num_pictures: int = 0
) -> Part:
    def make(number: int, kinds: Sequence[Kind], places: Sequence[int]) -> PicturesTask:
        return PicturesTask(number, kinds, network, [shots[place] for place in places])

    rows = picture_rows([shot.prompt for shot in shots], [shot.seed for shot in shots])
    return Part(network, kinds, rows, make, batch_size, min(num_pictures, len(shots)))


def _images(kinds: tuple[Kind, ...], pairs: Sequence[Pair], batch_size: int) -> Part:
    def make(number: int, kinds: Sequence[Kind], places: Sequence[int]) -> ImagesTask:
        return ImagesTask(number, kinds, pairs[0].split, [pairs[place].row for place in places])

    return Part("real", kinds, inputs_of([pair.content for pair in pairs]), make, batch_size)


def _texts(shots: Sequence[Shot], batch_size: int) -> Part:
    texts = [shot.prompt for shot in shots]

    def make(number: int, kinds: Sequence[Kind], places: Sequence[int]) -> TextsTask:
        return TextsTask(number, kinds, [texts[place] for place in places])

    return Part("text", ("texts",), inputs_of(["text"] * len(texts), texts), make, batch_size)


def _shots(pairs: Sequence[Pair], seed: int) -> list[Shot]:
    """A picture for each caption, whose noise depends on the pair alone."""
    return [Shot(pair.caption, _noise_seed(seed, pair.uid)) for pair in pairs]


def _noise_seed(seed: int, uid: str) -> int:
    return int.from_bytes(hashlib.sha256(f"noise\0{seed}\0{uid}".encode()).digest()[:6])
