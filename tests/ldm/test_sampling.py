from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.errors import ConfigError, GenerationError, InputError
from ldm.guidance import Guidance
from ldm.samplers import SAMPLERS, Level
from ldm.sampling import draw_of, sample_latents, seeded_noise, seeded_start
from ldm.unet import UNet2DCondition, UNetConfig

SHAPE = (4, 6, 6)
SEEDS = [11, 22, 33]


class Toy(nn.Module):
    """A small random network that is not linear, and mixes pixels, time and condition."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.condition = nn.Linear(3, 4)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        given = self.condition(context.mean(dim=1)) + time[:, None] / 1000
        return torch.tanh(self.conv(x) + given[:, :, None, None])


@pytest.fixture
def conditions() -> tuple[Conditioning, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    return Conditioning(torch.randn(3, 2, 3, generator=generator)), Conditioning(torch.zeros(3, 2, 3))


def sampled(conditions: tuple[Conditioning, Conditioning], rows: Any = slice(None), **settings: Any) -> Tensor:
    given: dict[str, Any] = {"guidance": 3.0, "sampler": "dpmpp_2m", "steps": 6}
    given |= settings
    noise = given.pop("noise", seeded_noise(SEEDS, SHAPE))
    diffusion = Diffusion(given.pop("config", DiffusionConfig("v")))
    unet = given.pop("unet", None) or Toy()
    return sample_latents(unet, diffusion, conditions[0][rows], conditions[1][rows], noise[rows], **given)


PAIRS = [
    (sampler, prediction)
    for sampler in SAMPLERS
    for prediction in ("v", "flow", "edm")
    if (prediction == "flow" or not sampler.startswith("flow_")) and (sampler, prediction) != ("plms", "flow")
]


@pytest.mark.parametrize(("sampler", "prediction"), PAIRS)
def test_an_image_does_not_depend_on_its_batch(
    conditions: tuple[Conditioning, Conditioning], sampler: str, prediction: Any
) -> None:
    settings: dict[str, Any] = {"sampler": sampler, "config": DiffusionConfig(prediction)}
    settings |= {"guidance": Guidance(3.0, rescale=0.7), "threshold": (0.9, 1.5)}
    whole = sampled(conditions, **settings)
    for row in range(3):
        alone = sampled(conditions, slice(row, row + 1), **settings)
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-4, atol=1e-5)
    assert float((whole[0] - whole[1]).abs().max()) > 1e-2


def test_generators_decide_what_is_drawn(conditions: tuple[Conditioning, Conditioning]) -> None:
    def run(seeds: list[int] | None) -> Tensor:
        generators = None if seeds is None else seeded_start(seeds, SHAPE)[1]
        return sampled(conditions, sampler="euler_ancestral", generators=generators)

    assert torch.equal(run(SEEDS), run(SEEDS))
    other = run([11, 22, 44])
    assert torch.equal(other[:2], run(SEEDS)[:2])
    assert not torch.equal(other[2], run(SEEDS)[2])
    assert torch.equal(run(None), run(None))
    before = torch.random.get_rng_state()
    run(None)
    assert torch.equal(before, torch.random.get_rng_state())


def test_noise_and_what_is_drawn_later_are_one_stream() -> None:
    noise, generators = seeded_start([3], SHAPE)
    assert torch.equal(noise, seeded_noise([3], SHAPE))
    stream = torch.Generator().manual_seed(3)
    expected = [torch.randn(SHAPE, generator=stream) for _ in range(2)]
    assert torch.equal(noise[0], expected[0])
    assert torch.equal(draw_of(generators, noise)()[0], expected[1])


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_progress_counts_all_calls(conditions: tuple[Conditioning, Conditioning], sampler: str) -> None:
    calls: list[tuple[int, int]] = []
    config = DiffusionConfig("flow" if sampler.startswith("flow_") else "v")
    sampled(conditions, sampler=sampler, config=config, progress=lambda *counts: calls.append(counts))
    assert calls == [(done, len(calls)) for done in range(1, len(calls) + 1)]
    assert len(calls) == {"heun": 11, "flow_heun": 11, "plms": 7}.get(sampler, 6)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "heun"])
def test_less_strength_stays_nearer_to_the_image(conditions: tuple[Conditioning, Conditioning], sampler: str) -> None:
    image = torch.linspace(-1, 1, 3 * 4 * 36).view(3, *SHAPE)
    distances = []
    for strength in (0.1, 0.4, 1.0):
        made = sampled(conditions, sampler=sampler, steps=20, x0_BCHW=image, strength=strength)
        distances.append(float((made - image).square().mean()))
    assert distances == sorted(distances)
    assert distances[0] < distances[2] / 2


@pytest.mark.parametrize("prediction", ["v", "flow", "edm"])
def test_a_second_network_goes_on_where_the_first_ended(
    conditions: tuple[Conditioning, Conditioning], prediction: Any
) -> None:
    settings: dict[str, Any] = {"sampler": "euler", "steps": 10, "config": DiffusionConfig(prediction)}
    whole = sampled(conditions, **settings)
    halfway = sampled(conditions, end=0.6, **settings)
    assert not torch.allclose(halfway, whole, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(sampled(conditions, noise=halfway, begin=0.6, **settings), whole)


def test_after_blends_what_is_known(conditions: tuple[Conditioning, Conditioning]) -> None:
    """Inpainting: half of the image is the given one's, noised as far as x is; at the end it is the image's."""
    image, noise = torch.full((3, *SHAPE), 0.7), seeded_noise(SEEDS, SHAPE)
    mask = torch.zeros(1, 1, *SHAPE[1:])
    mask[..., :3] = 1

    def after(x: Tensor, level: Level) -> Tensor:
        return mask * (level.alpha * image + level.sigma * noise) + (1 - mask) * x

    for sampler in ("ddim", "unipc", "heun"):
        made = sampled(conditions, sampler=sampler, spacing="trailing", after=after)
        torch.testing.assert_close(made[..., :3], image[..., :3])
        assert float((made[..., 3:] - 0.7).abs().mean()) > 0.05


def test_extra_channels_go_with_the_latents(conditions: tuple[Conditioning, Conditioning]) -> None:
    unet = Toy(channels=5)
    extra = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    first = sampled(conditions, unet=unet, extra_channels_BCHW=extra)
    assert first.shape == (3, *SHAPE)
    assert not torch.allclose(first, sampled(conditions, unet=unet, extra_channels_BCHW=2 * extra))
    each = sampled(conditions, unet=unet, extra_channels_BCHW=[extra, extra])
    torch.testing.assert_close(each, first)


def test_edm_sees_scaled_latents_and_its_own_times(conditions: tuple[Conditioning, Conditioning]) -> None:
    seen: list[tuple[float, float]] = []

    class Spy(Toy):
        def forward(self, x: Tensor, time: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
            seen.append((float(x.std()), float(time[0])))
            return super().forward(x, time, context, mask)

    sampled(conditions, unet=Spy(), sampler="heun", config=DiffusionConfig("edm"), guidance=1.0)
    assert seen[0][0] == pytest.approx(1, abs=0.1)
    assert seen[0][1] == pytest.approx(1.0955, abs=1e-3)  # ln(80)/4
    assert seen[-1][1] == pytest.approx(-1.5537, abs=1e-3)  # ln(0.002)/4


def test_the_guidance_interval_goes_by_noise(conditions: tuple[Conditioning, Conditioning]) -> None:
    sizes: list[int] = []

    class Spy(Toy):
        def forward(self, x: Tensor, time: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
            sizes.append(len(x))
            return super().forward(x, time, context, mask)

    sampled(
        conditions,
        unet=Spy(),
        sampler="euler",
        steps=10,
        spacing="trailing",
        config=DiffusionConfig("flow"),
        guidance=Guidance(3.0, interval=(0.35, 0.75)),
    )
    assert sizes == [3, 3, 3, 6, 6, 6, 6, 3, 3, 3]  # t = 1, 0.9, ..., 0.1


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sampler": "lms"}, ConfigError, "'lms' is unknown"),
        ({"spacing": "even"}, ConfigError, "spacing = 'even'"),
        ({"steps": 0}, ConfigError, "steps = 0"),
        ({"eta": 0.5}, ConfigError, "leave it out"),
        ({"sampler": "ddim", "eta": 2.0}, ConfigError, "eta = 2.0"),
        ({"guidance": -1.0}, ConfigError, "guidance_scale = -1.0"),
        ({"strength": 0.5}, ConfigError, "without x0"),
        ({"x0_BCHW": torch.zeros(3, *SHAPE), "strength": 0.0}, ConfigError, "strength = 0.0"),
        ({"x0_BCHW": torch.zeros(3, *SHAPE), "begin": 0.5}, ConfigError, "leave x0 out"),
        ({"x0_BCHW": torch.zeros(2, *SHAPE)}, InputError, "must be equal"),
        ({"x0_BCHW": torch.full((3, *SHAPE), torch.nan)}, InputError, "x0 has values that are not numbers"),
        ({"noise": torch.full((3, *SHAPE), torch.inf)}, InputError, "noise has values that are not numbers"),
        ({"begin": 0.8, "end": 0.2}, ConfigError, "begin = 0.8, end = 0.2"),
        ({"end": 0.99}, ConfigError, "split at 0.99"),
        ({"generators": [torch.Generator()]}, InputError, "1 generators and 3 images"),
        ({"threshold": (1.5, 1.0)}, ConfigError, "threshold"),
    ],
)
def test_bad_input_is_one_clear_error(
    conditions: tuple[Conditioning, Conditioning], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sampled(conditions, **settings)


def test_networks_that_give_no_numbers_are_an_error(conditions: tuple[Conditioning, Conditioning]) -> None:
    unet = Toy()
    with torch.no_grad():
        unet.conv.weight.fill_(torch.nan)
    with pytest.raises(GenerationError, match="not numbers"):
        sampled(conditions, unet=unet)


def test_a_network_in_half_precision_leaves_latents_in_float32() -> None:
    """bfloat16 has 8 bits of mantissa: sampling keeps its own precision between calls of the network."""
    torch.manual_seed(0)
    network = UNet2DCondition(
        UNetConfig(
            sample_size=4,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=8,
            norm_num_groups=8,
        )
    ).for_inference()
    diffusion = Diffusion(DiffusionConfig(prediction="flow"))
    conditioning, noise = Conditioning(torch.randn(2, 3, 8)), seeded_noise([1, 2], (4, 4, 4))
    common = {"guidance": 2.0, "sampler": "dpmpp_2m", "steps": 4}
    whole = sample_latents(network, diffusion, conditioning, conditioning, noise, **common)
    half = sample_latents(network.bfloat16(), diffusion, conditioning, conditioning, noise, **common)
    assert half.dtype == whole.dtype == torch.float32
    assert 0 < float((half - whole).abs().max()) < 0.05 * float(whole.abs().max())
