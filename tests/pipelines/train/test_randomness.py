import time

import pytest
import torch

from pipelines.dataset.samples import sample_id
from pipelines.train.randomness import Purpose, Randomness

SAMPLES = [(sample_id(f"uid-{i}"), i % 3) for i in range(32)]


def test_draws_do_not_depend_on_the_batch_or_on_what_was_drawn_before():
    whole = Randomness(5).normal(Purpose.DIFFUSION_NOISE, SAMPLES, (4, 3))
    random = Randomness(5)
    random.uniform(Purpose.TIMESTEP, SAMPLES)
    parts = [random.normal(Purpose.DIFFUSION_NOISE, [sample], (4, 3)) for sample in reversed(SAMPLES)]
    assert torch.equal(torch.cat(parts[::-1]), whole)


@pytest.mark.parametrize(
    ("seed", "purpose", "sample"),
    [
        (6, Purpose.DIFFUSION_NOISE, SAMPLES[0]),
        (5, Purpose.POSTERIOR_NOISE, SAMPLES[0]),
        (5, Purpose.DIFFUSION_NOISE, (SAMPLES[0][0], SAMPLES[0][1] + 1)),
        (5, Purpose.DIFFUSION_NOISE, (SAMPLES[1][0], SAMPLES[0][1])),
    ],
)
def test_seed_purpose_epoch_and_sample_each_change_the_draw(seed, purpose, sample):
    reference = Randomness(5).normal(Purpose.DIFFUSION_NOISE, [SAMPLES[0]], (4096,))
    other = Randomness(seed).normal(purpose, [sample], (4096,))
    correlation = torch.corrcoef(torch.cat([reference, other]))[0, 1]
    assert abs(correlation) < 5 / 4096**0.5


def test_distributions():
    samples = [(sample_id(str(i)), 0) for i in range(4000)]
    noise = Randomness(0).normal(Purpose.DIFFUSION_NOISE, samples[:500], (64,))
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.02
    uniform = Randomness(0).uniform(Purpose.TIMESTEP, samples)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    fractions = (uniform[:, None] < torch.linspace(0.1, 0.9, 9)).float().mean(0)
    assert torch.allclose(fractions, torch.linspace(0.1, 0.9, 9), atol=0.03)


def test_the_draws_are_a_contract_that_does_not_change():
    noise = Randomness(5).normal(Purpose.DIFFUSION_NOISE, SAMPLES[:1], (3,))
    torch.testing.assert_close(noise, torch.tensor([GOLDEN_NOISE]), rtol=0, atol=1e-6)
    uniform = Randomness(5).uniform(Purpose.CAPTION_DROPOUT, SAMPLES[:3])
    torch.testing.assert_close(uniform, torch.tensor(GOLDEN_UNIFORM), rtol=0, atol=1e-6)


def test_a_batch_of_noise_takes_well_under_a_millisecond_a_sample():
    random = Randomness(0)
    random.normal(Purpose.DIFFUSION_NOISE, SAMPLES, (4, 16, 16))
    durations_s = []
    for _ in range(5):
        started_s = time.perf_counter()
        random.normal(Purpose.DIFFUSION_NOISE, SAMPLES, (4, 16, 16))
        durations_s.append(time.perf_counter() - started_s)
    assert min(durations_s) / len(SAMPLES) < 0.5e-3


GOLDEN_NOISE = [-0.3957617, 0.7532783, 1.6052127]
GOLDEN_UNIFORM = [0.2119257, 0.001066, 0.3102499]
