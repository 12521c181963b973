"""Training a CLIP on the acquired pairs with open_clip's own loss, and measuring how it pairs those it has not seen.

It comes before `select`, whose rules may use its scores; which pairs it learns from is a function of each pair alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from ldm.clip import MEAN, STD, Clip, build_clip, load_imagenet_trunk, normalised, save_clip, tokenizer_of
from pipelines.artifacts import digest
from pipelines.dataset.acquired import acquired_of
from pipelines.dataset.errors import UnusableData
from pipelines.dataset.figures import Figure
from pipelines.dataset.images import ImageRow, ShardImages
from pipelines.dataset.ledgers import common_schema, kept_rows
from pipelines.dataset.split import split_sides
from pipelines.recipe import ClipModel, Recipe, Split
from pipelines.recipe.networks import clip_config
from pipelines.recipe.predicates import require_columns
from pipelines.train.errors import TrainError
from pipelines.train.job import TrainJob
from pipelines.train.order import Sample
from pipelines.train.randomness import Purpose, Randomness
from pipelines.train.trainable import Batch, Forward, Preview, TimedStep, Weights

MAX_LOGIT_SCALE = 100.0
"""Radford et al. 2021, section 2.5."""
MAX_SHIFT_PX = 4
MEASURED_PAIRS = 256
MEASURED_AT_ONCE = 64
TRUNK_AT_ONCE = 16
"""Images that the trunk takes at once. On a CPU, more are slower: activations no longer fit its caches."""


class ClipTraining:
    """The CLIP of a recipe and its pairs. See `trainable.Trainable`."""

    def __init__(self, job: TrainJob, device: torch.device) -> None:
        """
        Raises:
            TrainError: the network can't be built, doesn't fit the images' size, or its batch would be cut.
            UnusableData: there are no pairs to learn from.
        """
        assert isinstance(job.model, ClipModel)
        _check_whole_batch(job)
        self._device = device
        acquire, split = acquired_of(job.inputs), job.model.split or Split()
        sides = _pairs(job, split)
        rows, self._captions = sides["train"]
        if not rows:
            raise UnusableData(f"no pairs to train {job.name} on: split.held_out is {split.held_out}; lower it")
        self._images = ShardImages(job.store, acquire, rows)
        held_out, self._held_out_captions = sides["held_out"]
        self._held_out = ShardImages(job.store, acquire, held_out, size_px=self._images.size_px)
        self.num_samples = len(rows)
        self.revision = digest([acquire.revision, split.content()])
        self._random = Randomness(job.model.train.seed)
        self._config = clip_config(job.model, self._images.size_px)
        self._size_px = self._config["vision_cfg"]["image_size"]
        self._tokenizer = tokenizer_of(self._config)
        self._initial = initial_clip(self._config, job.model.train.seed)
        self._trunk = _Trunk(self._initial, self._images) if job.model.network.image_tower != "vit" else None
        self.module: nn.Module = self._initial if self._trunk is None else Projected(self._initial)

    def batch(self, samples: Sequence[Sample]) -> Batch:
        rows = [sample.row for sample in samples]
        tokens = self._tokenizer([self._captions[row] for row in rows])
        if self._trunk is not None:
            return {"images": self._trunk.features(rows), "tokens": tokens}
        draws = list(zip(self._images.sample_ids(rows), (sample.epoch for sample in samples), strict=True))
        shifts = [self._random.uniform(purpose, draws) for purpose in (Purpose.SHIFT_X, Purpose.SHIFT_Y)]
        return {"images": _pixels(shifted(self._images.rows(rows), *shifts), self._size_px), "tokens": tokens}

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over the global batch: each rank's share is compared with the others' too.

        The mean over ranks of these losses is the global one, and so are their gradients, since what is gathered
        carries gradients back.
        """
        from open_clip.loss import ClipLoss

        images, texts, logit_scale = forward(batch["images"], batch["tokens"])[:3]
        world_size = dist.get_world_size()
        loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=dist.get_rank(), world_size=world_size)
        value: Tensor = loss(images.float(), texts.float(), logit_scale.float().clamp(max=MAX_LOGIT_SCALE))
        return value, {"logit_scale": logit_scale.detach().float()}

    def preview(self, weights: Weights) -> Preview:
        """How pairs find each other among `MEASURED_PAIRS`, seen and held out: shares of 1."""
        clip = self._clip(weights)
        figures = retrieval(clip, self._images, self._captions, "seen")
        if len(self._held_out) > 1:
            figures = [*retrieval(clip, self._held_out, self._held_out_captions, "held_out"), *figures]
        return Preview(figures=figures)

    def write(self, weights: Weights, folder: Path) -> list[Figure]:
        """Writes `clip/`; without figures."""
        save_clip(self._clip(weights).model.cpu().state_dict(), self._config, folder / "clip")
        return []

    def measure(self, weights: Weights) -> Preview:
        """What `preview` gives: it looks at all that it ever looks at."""
        return self.preview(weights)

    def _clip(self, weights: Weights) -> Clip:
        model = copy.deepcopy(self._initial)
        model.load_state_dict(dict(weights), strict=False)  # what is frozen is not among them
        preprocess = {
            "size": self._size_px,
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
            "resize_mode": "squash",
        }
        return Clip(model.to(self._device), self._tokenizer, preprocess, "in training")


class Projected(nn.Module):
    """A CLIP without its frozen trunk: trained on the trunk's features. Parameters are named as in the whole."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        whole: Any = clip
        self.visual = nn.ModuleDict({"head": whole.visual.head})
        self.text = whole.text
        self.logit_scale = whole.logit_scale

    def forward(self, features_BD: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of both, of length 1, and the scale of their products."""
        images = F.normalize(self.visual["head"](features_BD), dim=-1)
        return images, F.normalize(self.text(tokens_BL), dim=-1), self.logit_scale.exp()


class _Trunk:
    """The features of a frozen image tower's trunk: each image goes through it once."""

    def __init__(self, clip: nn.Module, images: ShardImages) -> None:
        whole: Any = copy.deepcopy(clip)
        self._network: nn.Module = whole.visual.trunk.eval().requires_grad_(False)
        self._size_px: int = whole.visual.image_size[0]
        self._images = images
        self._found: dict[int, Tensor] = {}

    @torch.no_grad()
    def features(self, rows: Sequence[int]) -> Tensor:
        """float32 [B, D]."""
        missing = [row for row in dict.fromkeys(rows) if row not in self._found]
        for first in range(0, len(missing), TRUNK_AT_ONCE):
            part = missing[first : first + TRUNK_AT_ONCE]
            self._found |= dict(zip(part, self._network(_pixels(self._images.rows(part), self._size_px)), strict=True))
        return torch.stack([self._found[row] for row in rows])


def initial_clip(config: Mapping[str, Any], seed: int) -> nn.Module:
    """The model before its first step: a function of seed and configuration. A pretrained trunk is frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_clip(config)
    if "timm_model_name" in config["vision_cfg"]:
        load_imagenet_trunk(model)
        trunk: Any = model.visual.trunk  # type: ignore[union-attr]
        trunk.eval().requires_grad_(False)
    return model


def shifted(images_BHWC: Tensor, x_B: Tensor, y_B: Tensor) -> Tensor:
    """Images moved by up to `MAX_SHIFT_PX` each way, the edge repeated, for numbers in [0, 1). No flips: keycaps and
    flags have a right way round."""
    height, width = images_BHWC.shape[1:3]
    padded = F.pad(images_BHWC.permute(0, 3, 1, 2).float(), (MAX_SHIFT_PX,) * 4, mode="replicate").to(torch.uint8)
    offsets = [(numbers * (2 * MAX_SHIFT_PX + 1)).long().tolist() for numbers in (x_B, y_B)]
    moved = [
        image[:, top : top + height, left : left + width] for image, left, top in zip(padded, *offsets, strict=True)
    ]
    return torch.stack(moved).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def retrieval(clip: Clip, images: ShardImages, captions: Sequence[str], side: str) -> list[Figure]:
    """Among at most `MEASURED_PAIRS` pairs: how many images have their own caption among the nearest one and five, the
    other way round, and the mean cosine of the pairs. One's own is in the middle of those that are equally near: two
    equal captions are no mistake, but a model that says the same of all pairs finds none."""
    count = min(MEASURED_PAIRS, len(images))
    rows = [at * len(images) // count for at in range(count)]
    parts = [rows[first : first + MEASURED_AT_ONCE] for first in range(0, count, MEASURED_AT_ONCE)]
    embedded = torch.cat([clip.images(images.rows(part)) for part in parts])
    similarity = embedded @ clip.texts([captions[row] for row in rows]).T
    found: dict[str, float] = {}
    for name, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        own = scores.diagonal()[:, None]
        rank = (scores > own).sum(dim=1) + ((scores == own).sum(dim=1) - 1) / 2
        found |= {f"{name}_top{k}": float((rank < k).float().mean()) for k in (1, 5)}
    found["similarity"] = float(similarity.diagonal().mean())
    return [Figure(name, side, value, count=count) for name, value in found.items()]


def _pixels(images_BHWC: Tensor, size_px: int) -> Tensor:
    """float32 [B, 3, size_px, size_px], as `ldm.clip` gives them to the model that `save_clip` writes."""
    pixels = images_BHWC.permute(0, 3, 1, 2)
    if pixels.shape[-2:] != (size_px, size_px):
        pixels = resize(pixels, [size_px, size_px], InterpolationMode.BICUBIC, antialias=True)
    return normalised(pixels.float() / 255)


def _pairs(job: TrainJob, split: Split) -> Mapping[str, tuple[list[ImageRow], list[str]]]:
    """Rows and captions of each side of the split, by shard and key."""
    import pyarrow as pa

    acquire = acquired_of(job.inputs)
    schema = common_schema(acquire, job.store)
    require_columns([(f"models.{job.name}.split.by", split.by)], schema.names)
    columns = list(dict.fromkeys(("uid", "key", "caption", split.by)))
    table = pa.concat_tables(kept_rows(acquire, job.store, schema, columns))
    table = table.sort_by([("shard", "ascending"), ("key", "ascending")])
    table = table.append_column("side", split_sides(table, **split.model_dump()))
    found: dict[str, tuple[list[ImageRow], list[str]]] = {"train": ([], []), "held_out": ([], [])}
    for row in table.select(["uid", "shard", "key", "caption", "side"]).to_pylist():
        rows, captions = found[row["side"]]
        rows.append(ImageRow(row["uid"], row["shard"], row["key"]))
        captions.append(row["caption"] or "")
    return found


def _check_whole_batch(job: TrainJob) -> None:
    spec, execution = job.model.train, job.execution
    ranks = dist.get_world_size() if dist.is_initialized() else execution.ranks
    share = spec.global_batch_size // ranks
    if execution.micro_batch_size not in {None, share}:
        raise TrainError(
            f"execution.micro_batch_size {execution.micro_batch_size} would compare each pair of {job.name} with fewer"
            f" than its global batch of {spec.global_batch_size}; leave it out, or set it to {share}"
        )


def timed_step(recipe: Recipe, model: ClipModel, batch_size: int, device: torch.device) -> TimedStep:
    """The network and the similarities of random pairs. See `kinds.TrainKind`."""
    config = clip_config(model, recipe.acquire.image.size_px)
    network = initial_clip(config, model.train.seed)
    tokens = torch.randint(1, 1000, (batch_size, config["text_cfg"]["context_length"]), device=device)
    if model.network.image_tower == "vit":
        side = config["vision_cfg"]["image_size"]
        images = torch.randn(batch_size, 3, side, side, device=device)
    else:  # the trunk's features are computed once, before training
        network = Projected(network)
        head = next(each for each in network.visual.modules() if isinstance(each, nn.Linear))
        images = torch.randn(batch_size, head.in_features, device=device)
    network.to(device)

    def forward() -> Tensor:
        seen, read, scale = network(images, tokens)[:3]
        similarities: Tensor = scale * seen @ read.T
        return similarities

    return network, forward
