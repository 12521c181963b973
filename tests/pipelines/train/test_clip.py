"""Training a CLIP: which pairs, what loss over several ranks, what is measured, what is written."""

import json
from dataclasses import replace

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from ldm.clip import load_clip, tokenizer_of
from pipelines.artifacts import fetch_folder
from pipelines.dataset.errors import UnusableData
from pipelines.dataset.figures import figures_of, metrics_of
from pipelines.recipe import ClipModel, Execution, Split
from pipelines.recipe.errors import RecipeError, UnknownColumn
from pipelines.recipe.networks import clip_config
from pipelines.train.clip import MAX_SHIFT_PX, ClipTraining, retrieval, shifted
from pipelines.train.errors import TrainError
from pipelines.train.job import TrainJob
from pipelines.train.order import Sample

CPU = torch.device("cpu")
SAMPLES = [Sample(row, row % 2) for row in (3, 0, 9, 5, 6, 1)]
NETWORK = {
    "embed_dim": 16,
    "image_width": 32,
    "image_layers": 1,
    "text_width": 32,
    "text_layers": 1,
    "head_width": 16,
    "context_length": 12,
}


def clip_model(**changes) -> ClipModel:
    known = {"kind": "clip", "network": NETWORK, "train": {"steps": 3, "global_batch_size": 8}}
    return ClipModel.model_validate(known | {"split": {"held_out": 0.25}} | changes, strict=False)


@pytest.fixture
def job(published, store) -> TrainJob:
    inputs = {"acquire": published.acquire()}
    return TrainJob("judge", clip_model(), inputs, store, Execution(device="cpu"), "unit0", "line")


@pytest.fixture
def alone(tmp_path):
    """This process as the only rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ledger_rows(job: TrainJob) -> list[dict]:
    units = job.inputs["acquire"].units
    return [row for unit in units for row in pq.read_table(job.store.open(unit.only(".parquet"))).to_pylist()]


def test_it_learns_from_the_kept_pairs_that_select_does_not_hold_out(job, published):
    select = published.select(job.inputs["acquire"])  # the same split, and no rule that drops anything
    table = pq.read_table(job.store.open(select.units[0].path("selection.parquet"))).to_pylist()
    train = sorted((row["shard"], row["key"]) for row in table if row["split"] == "train")
    captions = {row["key"]: row["caption"] for row in ledger_rows(job)}

    trainable = ClipTraining(job, CPU)
    assert trainable.num_samples == len(train) < len(table)
    batch = trainable.batch([Sample(row, 0) for row in range(len(train))])
    tokenizer = tokenizer_of(clip_config(job.model, 16))
    assert torch.equal(batch["tokens"], tokenizer([captions[key] for _, key in train]))


def test_a_sample_is_the_same_in_any_batch_and_shifted_anew_in_each_epoch(job):
    trainable = ClipTraining(job, CPU)
    whole, part = trainable.batch(SAMPLES), trainable.batch(SAMPLES[2:5])
    assert all(torch.equal(part[name], whole[name][2:5]) for name in whole)
    epochs = [trainable.batch([Sample(3, epoch)])["images"] for epoch in range(4)]
    assert any(not torch.equal(epochs[0], other) for other in epochs[1:])


def test_shifts_repeat_the_edge_and_reach_as_far_each_way():
    image = torch.arange(12 * 12 * 3, dtype=torch.uint8).view(1, 12, 12, 3)
    middle = torch.tensor([0.5])
    assert torch.equal(shifted(image, middle, middle), image)
    left = shifted(image, torch.tensor([0.0]), middle)
    assert torch.equal(left[:, :, MAX_SHIFT_PX:], image[:, :, :-MAX_SHIFT_PX])
    assert torch.equal(left[:, :, :MAX_SHIFT_PX], image[:, :, :1].expand(-1, -1, MAX_SHIFT_PX, -1))
    up = shifted(image, middle, torch.tensor([0.999]))
    assert torch.equal(up[:, :-MAX_SHIFT_PX], image[:, MAX_SHIFT_PX:])


def test_the_initial_weights_are_a_function_of_the_seed(job):
    before = torch.random.get_rng_state()
    first, again = (ClipTraining(job, CPU).module.state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    train = job.model.train.model_copy(update={"seed": 1})
    other = ClipTraining(replace(job, model=job.model.model_copy(update={"train": train})), CPU).module.state_dict()
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])


def test_two_ranks_have_the_gradients_of_the_whole_batch(job, train):
    """The mean over ranks, which is what the engine takes, of loss and gradients."""
    alone, both = (train(job, ranks=ranks, do="gradients") for ranks in (1, 2))
    assert alone.return_codes + both.return_codes == [0, 0, 0], alone.log + both.log
    (whole,) = map(torch.load, alone.found)
    ranks = [*map(torch.load, both.found)]
    assert ranks[0]["loss"] != ranks[1]["loss"]
    torch.testing.assert_close(torch.stack([rank["loss"] for rank in ranks]).mean(), whole["loss"])
    assert set(whole["gradients"]) == {name for name, _ in ClipTraining(job, CPU).module.named_parameters()}
    for name, gradient in whole["gradients"].items():
        mean = torch.stack([rank["gradients"][name] for rank in ranks]).mean(dim=0)
        torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-6)


def test_it_learns_which_caption_is_whose_and_writes_what_open_clip_loads(job, alone, tmp_path):
    trainable = ClipTraining(job, CPU)
    weights = {name: value.detach().clone() for name, value in trainable.module.state_dict().items()}
    before = metrics_of(trainable.preview(weights).figures)
    optimizer = torch.optim.AdamW(trainable.module.parameters(), 2e-3)
    samples = [Sample(row, 0) for row in range(trainable.num_samples)]
    for _ in range(60):
        loss, parts = trainable.loss(trainable.module, trainable.batch(samples))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 1 <= parts["logit_scale"] < 100

    weights = {name: value.detach().clone() for name, value in trainable.module.named_parameters()}
    (tmp_path / "out").mkdir()
    trainable.write(weights, tmp_path / "out")
    after = metrics_of(trainable.measure(weights).figures)
    sides = ("image_to_text_top1", "image_to_text_top5", "text_to_image_top1", "text_to_image_top5", "similarity")
    assert set(after) == {f"{name}/{side}" for side in ("seen", "held_out") for name in sides}
    assert before["image_to_text_top1/seen"] < 0.4
    assert after["image_to_text_top1/seen"] > 0.8
    assert after["text_to_image_top1/seen"] > 0.8
    assert after["similarity/seen"] > before["similarity/seen"]

    folder = tmp_path / "out" / "clip"
    stock, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert all(torch.equal(stock.state_dict()[name], value) for name, value in weights.items())
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    with torch.no_grad():
        expected = stock.eval().encode_image(preprocess(Image.fromarray(image))[None], normalize=True)
    torch.testing.assert_close(load_clip(folder).images(torch.from_numpy(image)[None]), expected)


class Embedded:
    """Stands for images and for the model that embeds them: rows that were given."""

    def __init__(self, images: torch.Tensor, texts: torch.Tensor) -> None:
        self._images, self._texts = images, texts

    def __len__(self) -> int:
        return len(self._images)

    def rows(self, rows) -> torch.Tensor:
        return torch.tensor(rows)

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        return self._images[rows]

    def texts(self, captions) -> torch.Tensor:
        return self._texts[[int(caption) for caption in captions]]


def measured(images: torch.Tensor, texts: torch.Tensor) -> dict[str, float]:
    both = Embedded(images, texts)
    found = retrieval(both, both, [str(number) for number in range(len(images))], "seen")
    assert {(figure.subject, figure.count) for figure in found} == {("seen", len(images))}
    return {figure.name: figure.value for figure in found}


def test_retrieval_counts_those_that_find_their_own():
    identity = torch.eye(10)
    assert all(value == 1 for value in measured(identity, identity).values())
    found = measured(identity, identity.roll(1, dims=0))
    assert all(value == 0 for name, value in found.items() if "top1" in name or "similarity" in name)
    ranked = measured(identity, identity + 2 * identity.roll(1, dims=0))  # one other is nearer
    assert [ranked[f"image_to_text_top{k}"] for k in (1, 5)] == [0, 1]


def test_a_model_that_says_the_same_of_all_pairs_finds_none():
    same = torch.ones(40, 1)
    assert all(value == 0 for name, value in measured(same, same).items() if "top" in name)


def test_equal_captions_are_no_mistake():
    images = torch.eye(10)
    texts = images.clone()
    texts[1] = texts[0] = (images[0] + images[1]) / 2**0.5
    assert measured(images, texts)["image_to_text_top1"] == 1


def test_what_does_not_fit_is_refused(job):
    def refused(error: type[Exception], message: str, **changes) -> None:
        with pytest.raises(error, match=message):
            ClipTraining(replace(job, **changes), CPU)

    def network(**changes) -> ClipModel:
        return clip_model(network=NETWORK | changes)

    few = Execution(device="cpu", micro_batch_size=4)
    refused(
        TrainError, "micro_batch_size 4 would compare .* global batch of 8; leave it out, or set it to 8", execution=few
    )
    refused(RecipeError, "head_width: 16 must divide text_width 40", model=network(text_width=40))
    refused(RecipeError, "patch_size: 5 must divide the images", model=network(patch_size=5))
    refused(UnknownColumn, r"models\.judge\.split\.by names column 'name'", model=clip_model(split={"by": "name"}))
    refused(UnusableData, "no pairs to train judge on", model=clip_model(split=Split(held_out=1.0)))
    ClipTraining(replace(job, execution=Execution(ranks=2, micro_batch_size=4)), CPU)


def test_every_parameter_has_a_dimension(job):
    """DeepSpeed can't broadcast others, and open_clip's scale is one unless it is told."""
    assert all(parameter.ndim for parameter in ClipTraining(job, CPU).module.parameters())


def test_two_ranks_train_and_publish_it(job, train):
    outcome = train(job, ranks=2)
    assert outcome.return_codes == [0, 0], outcome.log
    unit = outcome.unit
    assert unit.info["steps"] == 3
    facts = json.loads(job.store.read_bytes(unit.path("training.json")))
    assert unit.info["figures"] == facts["figures"]
    assert any(figure.label == "similarity/seen" for figure in figures_of(unit))
    assert load_clip(fetch_folder(job.store, unit, "clip")).image_size == 16
