import json
from dataclasses import replace

import pytest
import torch

from ldm.autoencoder import AutoencoderKL
from ldm.interchange import load_network
from ldm.unet import UNet2DCondition
from pipelines.dataset.errors import CacheMismatch
from pipelines.recipe.errors import RecipeError
from pipelines.train.autoencoder import AutoencoderTraining
from pipelines.train.order import Sample
from pipelines.train.text_to_image import TextToImageTraining

CPU = torch.device("cpu")
SAMPLES = [Sample(row, row % 2) for row in (3, 0, 17, 9, 12, 5, 6, 1)]


def autoencoder(job) -> AutoencoderTraining:
    return AutoencoderTraining(job, CPU)


def base(job, previews=False) -> TextToImageTraining:
    return TextToImageTraining(job, CPU, previews=previews)


@pytest.fixture(params=["autoencoder", "base"])
def trainable(request):
    return {"autoencoder": autoencoder, "base": base}[request.param](request.getfixturevalue(f"{request.param}_job"))


def weights_of(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def descend(trainable, steps: int, rate: float) -> list[float]:
    optimizer = torch.optim.Adam(trainable.module.parameters(), rate)
    losses = []
    for _ in range(steps):
        loss, _ = trainable.loss(trainable.module, trainable.batch(SAMPLES))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_batch_of_some_samples_is_a_part_of_the_whole_batch(trainable):
    whole = trainable.batch(SAMPLES)
    part = trainable.batch(SAMPLES[2:5])
    assert all(torch.equal(part[name], whole[name][2:5]) for name in whole)


def test_another_epoch_draws_anew(trainable):
    first, second = trainable.batch([Sample(3, 0)]), trainable.batch([Sample(3, 1)])
    assert not torch.equal(first["noise"], second["noise"])


def test_the_loss_of_a_batch_is_the_mean_of_its_samples(trainable):
    whole, _ = trainable.loss(trainable.module, trainable.batch(SAMPLES))
    each = [trainable.loss(trainable.module, trainable.batch([sample]))[0] for sample in SAMPLES]
    torch.testing.assert_close(whole, torch.stack(each).mean(), rtol=1e-4, atol=1e-6)


def test_it_learns_a_batch_by_heart(trainable):
    losses = descend(trainable, 40, 5e-3)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction": "edm", "timestep_sampling": None},
        {"prediction": "v", "schedule": "cosine", "zero_terminal_snr": True, "loss_weight": "min_snr"},
        {"prediction": "eps", "loss_weight": "debiased", "loss": "pseudo_huber", "offset_noise": 0.1},
        {"prediction": "flow", "flow_shift": 3.0, "loss": "huber", "input_perturbation": 0.1},
    ],
)
def test_every_kind_of_diffusion_is_learned(base_job, settings):
    spec = type(base_job.model.diffusion)(**(base_job.model.diffusion.model_dump() | settings))
    trainable = base(replace(base_job, model=base_job.model.model_copy(update={"diffusion": spec})))
    losses = descend(trainable, 40, 5e-3)
    assert losses[-1] < 0.8 * losses[0]
    extras = {"seen_noise"} if "input_perturbation" in settings else set()
    assert set(trainable.batch(SAMPLES)) == {"latents", "noise", "times", "context"} | extras


def test_initial_weights_are_those_of_the_seed_and_leave_the_random_state_alone(autoencoder_job, base_job):
    for make, job in ((autoencoder, autoencoder_job), (base, base_job)):
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        first = weights_of(make(job).module)
        assert torch.equal(torch.rand(1), expected)
        second = weights_of(make(job).module)
        other = job.model.model_copy(update={"train": job.model.train.model_copy(update={"seed": 1})})
        third = weights_of(make(replace(job, model=other)).module)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(not torch.equal(first[name], third[name]) for name in first)


def test_captions_are_dropped_at_the_recipes_rate_for_the_empty_prompt(base_job):
    trainable = base(base_job)
    samples = [Sample(row, epoch) for row in range(20) for epoch in range(50)]
    context = trainable.batch(samples)["context"].float()
    dropped = (context == 0.5).all(dim=(1, 2))  # the null row of the cache
    assert abs(dropped.float().mean() - 0.25) < 0.05
    kept = trainable._cache.rows([sample.row for sample in samples]).text.float()
    assert torch.equal(context[~dropped], kept[~dropped])


def test_stratified_times_cover_the_process_in_every_global_batch(base_job):
    size = base_job.model.train.global_batch_size
    diffusion = base_job.model.diffusion.model_copy(
        update={"stratified_timesteps": True, "timestep_sampling": "uniform"}
    )
    trainable = base(replace(base_job, model=base_job.model.model_copy(update={"diffusion": diffusion})))
    samples = [Sample(row, 0, stratum) for row, stratum in enumerate(reversed(range(size)))]
    times = trainable.batch(samples)["times"]
    assert torch.equal((times * size).floor().long(), torch.arange(size).flip(0))
    assert torch.equal(trainable.batch(samples[1:3])["times"], times[1:3])


def test_latents_are_drawn_from_the_posterior_and_scaled_once(base_job):
    trainable = base(base_job)
    samples = [Sample(4, epoch) for epoch in range(2000)]
    latents = trainable.batch(samples)["latents"]
    mean, log_variance = trainable._cache.rows([4]).moments[0].float().chunk(2)
    scale = trainable._autoencoder.config.scaling_factor
    torch.testing.assert_close(latents.mean(0), mean * scale, rtol=0, atol=0.02)
    torch.testing.assert_close(latents.std(0), (0.5 * log_variance).exp() * scale, rtol=0.15, atol=0.003)


def test_the_autoencoder_folder_holds_the_weights_and_a_scale_that_makes_latents_of_unit_variance(
    autoencoder_job, tmp_path
):
    trainable = autoencoder(autoencoder_job)
    descend(trainable, 10, 5e-3)
    trainable.write(weights_of(trainable.module), tmp_path)
    preview = trainable.measure(weights_of(trainable.module))
    network = load_network(AutoencoderKL, tmp_path / "vae")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in weights_of(trainable.module).items())
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["sample_size"] == 16
    latents = []
    for epoch in range(20):
        batch = trainable.batch([Sample(row, epoch) for row in range(len(trainable._train))])
        pixels = batch["images"].permute(0, 3, 1, 2) / 127.5 - 1
        mean, log_variance = network.encode(pixels).detach().chunk(2, dim=1)
        latents.append(mean + (0.5 * log_variance).exp() * batch["noise"])
    assert float(torch.stack(latents).std()) * network.config.scaling_factor == pytest.approx(1, abs=0.02)
    assert preview.pictures["reconstructions"].startswith(b"\x89PNG")


def test_psnr_is_of_the_held_out_images(autoencoder_job):
    trainable = autoencoder(autoencoder_job)
    (found,) = trainable.preview(weights_of(trainable.module)).figures
    pixels = trainable._held_out.rows(range(4)).permute(0, 3, 1, 2) / 127.5 - 1
    reconstruction = trainable.module(pixels)[0].detach().clamp(-1, 1)
    errors = ((reconstruction - pixels) / 2).square().mean(dim=(1, 2, 3))
    decibels = -10 * errors.log10()
    assert (found.label, found.count) == ("psnr/held_out", 4)
    assert found.value == pytest.approx(float(decibels.mean()), rel=1e-3)
    assert found.error == pytest.approx(float(decibels.std()) / 2, rel=1e-2, abs=1e-4)  # of four images


def test_images_that_the_network_can_not_take_are_refused(store, pictures, autoencoder_job):
    acquire, select = pictures(size_px=18)
    job = replace(autoencoder_job, inputs={"acquire": acquire, "select": select})
    with pytest.raises(RecipeError, match="18 px, but a network of 3 resolutions needs multiples of 4"):
        autoencoder(job)


def test_the_unet_folder_holds_the_weights_and_samples_come_from_the_recipes_prompts(base_job, tmp_path):
    trainable = base(base_job, previews=True)
    weights = weights_of(trainable.module)
    trainable.write(weights, tmp_path)
    preview = trainable.measure(weights)
    network = load_network(UNet2DCondition, tmp_path / "unet")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in weights.items())
    assert preview.pictures["samples"] == trainable.preview(weights).pictures["samples"]


def test_a_cache_of_another_first_stage_is_refused(base_job, latents):
    inputs = {**base_job.inputs, "encode.base": latents(autoencoder_sha256="other")}
    with pytest.raises(CacheMismatch, match="autoencoder_sha256 'other'"):
        base(replace(base_job, inputs=inputs))


def test_a_cache_of_another_text_encoder_is_refused(base_job, latents):
    (weights,) = (e for e in base_job.inputs["train.autoencoder"].units[0].files if e.name.endswith(".safetensors"))
    inputs = {**base_job.inputs, "encode.base": latents(autoencoder_sha256=weights.sha256, text_shape=(6, 12))}
    with pytest.raises(CacheMismatch, match="text_encoder 'minilm@1'"):
        base(replace(base_job, inputs=inputs), previews=True)
