from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.discriminator import PatchDiscriminator
from ldm.errors import ConfigError, InputError
from ldm.losses import discriminator_loss


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_three_layers_have_the_published_shape() -> None:
    """Isola et al. 2017: C64-C128-C256-C512, then one logit. Of two images, 6 channels, it is their 2.769 M network."""
    with torch.device("meta"):
        network = PatchDiscriminator(in_channels=6)
        assert network(torch.zeros(2, 6, 256, 256)).shape == (2, 1, 30, 30)
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_768_705


def test_a_patch_is_70_pixels() -> None:
    network = PatchDiscriminator(width=4, norm="batch", generator=seeded()).eval()
    pixels = torch.rand(1, 3, 128, 128, generator=seeded(), requires_grad=True)
    (gradient,) = torch.autograd.grad(network(pixels)[0, 0, 7, 7], pixels)
    rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == 70


def test_weights_are_drawn_from_the_given_generator() -> None:
    one, same, other = (PatchDiscriminator(width=8, layers=2, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.main[0].weight, same.main[0].weight)
    assert not torch.equal(one.main[0].weight, other.main[0].weight)
    assert float(one.main[2].weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_with_group_norm_an_image_is_judged_by_itself() -> None:
    pixels = torch.rand(4, 3, 24, 24, generator=seeded())
    network = PatchDiscriminator(width=8, layers=2, norm="group", generator=seeded())
    torch.testing.assert_close(network(pixels)[:1], network(pixels[:1]))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_it_learns_to_tell_noise_from_smooth_images(norm: Any) -> None:
    """Judged as it is trained, each set by its own statistics: running ones are of both, and tell nothing apart.

    Seen over 20 seeds, with the kernels of two kinds of CPU: losses of 0.99 ± 0.02 at first and below 0.01 at last;
    logits of 1.9 ± 0.1 and −1.7 ± 0.2 with batch normalisation, 2.9 ± 0.3 and −2.5 ± 0.3 with that of groups.
    """
    generator = seeded()
    network = PatchDiscriminator(width=8, layers=2, norm=norm, generator=generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.5, 0.9))

    def draw() -> tuple[Tensor, Tensor]:
        smooth = F.interpolate(torch.randn(8, 3, 4, 4, generator=generator), size=(32, 32), mode="bilinear")
        return smooth, torch.randn(8, 3, 32, 32, generator=generator) * 0.5

    losses = []
    for _ in range(30):
        real, fake = draw()
        loss = discriminator_loss(network(real), network(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.8
    assert losses[-1] < 0.3
    with torch.no_grad():
        real, fake = (float(network(images).mean()) for images in draw())
    assert real > 0.5
    assert fake < -0.5


def test_what_does_not_fit_is_refused() -> None:
    network = PatchDiscriminator(width=4, layers=2, generator=seeded())
    with pytest.raises(InputError, match="sides of 12 or more"):
        network(torch.zeros(1, 3, 11, 32))
    with pytest.raises(InputError, match=r"\(1, 1, 32, 32\)"):
        network(torch.zeros(1, 1, 32, 32))
    assert network(torch.zeros(1, 3, 12, 12)).shape == (1, 1, 1, 1)
    with pytest.raises(ConfigError, match="layers = 0"):
        PatchDiscriminator(layers=0)
    with pytest.raises(ConfigError, match="a multiple of 32"):
        PatchDiscriminator(width=40, norm="group")
