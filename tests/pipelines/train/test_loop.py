"""Training from start to published unit, on one rank and on two over gloo, undisturbed, killed and gone on with."""

import json
import signal
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.artifacts import Unit
from pipelines.dataset.figures import Figure, figures_of, records
from pipelines.recipe import Execution
from pipelines.train.continuation import keep_last_checkpoint
from pipelines.train.loop import Training
from pipelines.train.trainable import Preview


def with_execution(job, **values):
    values = {
        "device": "cpu",
        "cpus": 1,
        "log_every_steps": 1,
        "checkpoint_every_steps": 2,
        "sample_every_steps": 4,
    } | values
    return replace(job, execution=Execution(**values))


def with_training(job, **values):
    spec = job.model.train.model_copy(update=values)
    return replace(job, model=job.model.model_copy(update={"train": spec}))


def at_a_constant_rate(job):
    return with_training(job, optimizer=job.model.train.optimizer.model_copy(update={"schedule": "constant"}))


@pytest.fixture(scope="module")
def calm(calm_base_job, train):
    """Six steps on one rank at a constant rate, undisturbed."""
    outcome = train(at_a_constant_rate(with_execution(calm_base_job)))
    assert outcome.return_codes == [0], outcome.log
    return outcome


def hashes(unit: Unit) -> dict[str, str]:
    return {entry.name: entry.sha256 for entry in unit.files}


def test_an_autoencoder_from_start_to_unit(store, autoencoder_job, train):
    outcome = train(with_execution(autoencoder_job))
    assert outcome.return_codes == [0], outcome.log
    names = ["preview.png", "training.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert sorted(hashes(outcome.unit)) == names
    assert outcome.unit.counts.total == outcome.unit.counts.kept == 20
    facts = json.loads(store.read_bytes(outcome.unit.path("training.json")))
    assert (facts["steps"], facts["images"]) == (6, 48)
    labels = ["psnr/held_out", "latents_std/train", "frechet_distance/held_out/efficientnet_lite0_128px"]
    figures = figures_of(outcome.unit)
    assert [figure.label for figure in figures] == labels
    assert all(figure.value > 0 for figure in figures)
    assert facts["figures"] == records(figures[:2])  # the third hangs on `execution`
    assert sorted(outcome.metrics("loss")) == [1, 2, 3, 4, 5, 6]
    assert sorted(outcome.metrics("psnr/held_out")) == [4, 6]
    figures = [event.arguments[0] for event in outcome.events if event.method == "figure"]
    assert figures == ["reconstructions/step_000004.png", "reconstructions/final.png"]
    assert outcome.progress("steps")[-1] == (6, 6)
    assert outcome.progress("ranks") == [(1, 1)]
    kept = [event.arguments[0].checkpoints for event in outcome.events if event.method == "checkpoints"]
    assert [[(one.step, one.images) for one in told] for told in kept] == [
        [(2, 16)],
        [(2, 16), (4, 32)],
        [(4, 32), (6, 48)],
    ]
    assert store.sizes(kept[-1][-1].location.removeprefix(f"{store.root}/"))
    assert "continued_from" not in outcome.unit.info


def test_killed_it_goes_on_from_its_last_sound_checkpoint_and_ends_in_the_same_weights_bit_for_bit(
    base_job, train, calm
):
    job = at_a_constant_rate(with_execution(base_job))
    killed = train(job, kill_at=6)
    assert killed.return_codes == [-signal.SIGKILL]
    assert killed.unit is None
    steps = job.store.listdir(job.checkpoints)
    assert [int(step) for step in steps] == [2, 4]
    damaged = f"{job.checkpoints}/{steps[-1]}/rank_00000.safetensors"
    job.store.publish_bytes(damaged, b"\0" + job.store.read_bytes(damaged)[1:])
    resumed = train(job)
    assert resumed.return_codes == [0], resumed.log
    assert "goes on from the checkpoint of step 2" in resumed.notes[0]
    assert sorted(resumed.metrics("loss")) == [3, 4, 5, 6]
    assert hashes(resumed.unit) == hashes(calm.unit)
    assert resumed.metrics("loss")[6] == calm.metrics("loss")[6]
    assert resumed.progress("steps")[-1] == (6, 6)


def test_two_ranks_killed_and_resumed_end_in_the_same_weights_bit_for_bit(base_job, train, calm):
    job = at_a_constant_rate(with_execution(base_job, zero_stage=2, micro_batch_size=2))
    undisturbed = train(replace(job, unit_key="calm"), ranks=2)
    assert undisturbed.return_codes == [0, 0], undisturbed.log
    killed = train(job, ranks=2, kill_at=6)  # the second micro-batch of step 3
    assert killed.return_codes[1] == -signal.SIGKILL
    assert killed.return_codes[0] != 0
    resumed = train(job, ranks=2)
    assert resumed.return_codes == [0, 0], resumed.log
    assert sorted(resumed.metrics("loss")) == [3, 4, 5, 6]
    assert hashes(resumed.unit) == hashes(undisturbed.unit)
    # The number of ranks and micro-batches changes rounding only.
    assert undisturbed.metrics("loss") == pytest.approx(calm.metrics("loss"), rel=1e-4)
    assert undisturbed.metrics("grad_norm") == pytest.approx(calm.metrics("grad_norm"), rel=1e-4)


def test_a_longer_training_goes_on_from_a_finished_one_and_ends_in_the_same_weights_bit_for_bit(base_job, train, calm):
    job = at_a_constant_rate(with_execution(base_job))
    short = with_training(replace(job, unit_key="short"), steps=3)
    assert train(short).return_codes == [0]
    keep_last_checkpoint(short)
    assert [int(step) for step in job.store.listdir(short.checkpoints)] == [3]

    killed = train(job, kill_at=2)  # step 5: its own checkpoint is that of step 4
    assert killed.return_codes == [-signal.SIGKILL]
    longer = train(job)
    assert longer.return_codes == [0], longer.log
    assert "goes on from the checkpoint of step 4" in longer.notes[0]
    assert sorted(longer.metrics("loss")) == [5, 6]
    assert longer.unit.info["continued_from"] == 3
    assert hashes(longer.unit) == hashes(calm.unit)
    assert job.store.listdir(short.checkpoints) == ["000000003"]  # another one may go on from it too


def test_the_learning_rate_of_a_continued_training_is_that_of_the_longer_course(base_job, train):
    job = with_execution(base_job)
    short = with_training(replace(job, unit_key="short"), steps=3)
    ended = train(short)
    keep_last_checkpoint(short)
    longer = train(job)
    assert longer.return_codes == [0], longer.log
    rates = longer.metrics("learning_rate")
    assert sorted(rates) == [4, 5, 6]
    before = ended.metrics("learning_rate")[3]
    assert rates[4] > before
    assert longer.notes == [
        "train.base goes on from step 3 of a finished training; the cosine course is now over 6 steps: the learning"
        f" rate goes on at {rates[4]:.3g} (it had ended at {before:.3g})"
    ]
    assert longer.unit.info["continued_from"] == 3
    shorter = train(with_training(replace(job, unit_key="shorter"), steps=2))
    assert sorted(shorter.metrics("loss")) == [1, 2]
    assert "continued_from" not in shorter.unit.info


def test_time_ends_training_and_brings_the_learning_rate_to_its_end(autoencoder_job, train):
    job = with_training(with_execution(autoencoder_job), steps=100_000, max_minutes=0.05)
    outcome = train(job, ranks=2)
    assert outcome.return_codes == [0, 0], outcome.log
    assert 3 <= outcome.unit.info["seconds"] < 30
    assert 2 < outcome.unit.info["steps"] < 100_000
    rates = list(outcome.metrics("learning_rate").values())
    assert rates[-1] < 0.2 * max(rates)
    told = outcome.progress("seconds")
    assert told[-1] == (3, 3)
    assert told == sorted(told)


def test_a_failed_preview_ends_no_training(store, base_model, tmp_path, train, make_base_job):
    def break_decoder(network) -> None:
        torch.nn.init.constant_(network.decoder.conv_out.bias, float("nan"))

    from_broken = make_base_job(store, base_model, tmp_path, break_decoder)
    outcome = train(with_execution(from_broken))
    assert outcome.return_codes == [0], outcome.log
    assert [note.split(": ")[1] for note in outcome.notes] == [
        "no preview at step 4",
        "no preview of the finished model",
    ]
    assert all("not numbers" in note for note in outcome.notes)
    assert "preview.png" not in hashes(outcome.unit)
    assert "unet/diffusion_pytorch_model.safetensors" in hashes(outcome.unit)


def test_figures_that_can_not_be_told_apart_end_no_training() -> None:
    notes: list[str] = []
    training: Any = SimpleNamespace(job=SimpleNamespace(node="train.base"), report=SimpleNamespace(note=notes.append))
    twice = Preview(figures=[Figure("psnr", "seen", 20.0)], beside=[Figure("psnr", "seen", 21.0)])
    assert Training._looked(training, lambda _: twice, {}, "at step 4") == Preview()
    (note,) = notes
    assert "no preview at step 4" in note
    assert "several figures are 'psnr/seen'" in note


def test_what_can_not_be_trained_here_is_refused(base_job, train):
    outcome = train(with_execution(base_job, micro_batch_size=3))
    assert outcome.return_codes == [1]
    assert "1 ranks x micro_batch_size 3 must divide global_batch_size (8)" in outcome.log
    if not torch.cuda.is_available():
        outcome = train(with_execution(base_job, device="cuda"))
        assert outcome.return_codes == [1]
        assert "cuda" in outcome.log.splitlines()[-1]


def test_a_file_of_an_input_that_is_missing_is_named(base_job, train):
    (unit, *_) = base_job.inputs["encode.base"].units
    base_job.store.delete(unit.path("cache.arrow"))
    outcome = train(with_execution(base_job))
    assert outcome.return_codes == [1]
    last = outcome.log.splitlines()[-1]
    assert "InputMissing: rank 0 on" in last
    assert f"misses a file of encode.base: {base_job.store.location(unit.path('cache.arrow'))}" in last


def test_the_course_of_the_loss_is_what_it_was(calm):
    """A change of these figures is a change of what is trained: say so in the changelog, or mend it."""
    assert list(calm.metrics("loss").values()) == pytest.approx(GOLDEN_LOSSES, rel=1e-3)


GOLDEN_LOSSES = [1.047464, 1.026889, 1.047367, 0.995560, 1.136378, 1.028473]
