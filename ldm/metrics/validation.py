"""The validation loss at fixed times: a figure of training that doesn't jump with the times that were drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion import Diffusion
from ldm.errors import InputError


@torch.no_grad()
def losses_at_times(
    predict: Callable[[Tensor, Tensor], Tensor],
    diffusion: Diffusion,
    latents_BCHW: Tensor,
    noise_BCHW: Tensor,
    times: Sequence[float],
) -> Tensor:
    """Mean squared error of the prediction for each image and time, float64 [B, T] on the CPU; no loss weights, so that
    networks trained with others compare.

    `predict` is called once a time, with noised latents as the network sees them and its times [B]
    (`Diffusion.model_time`); it knows the batch's conditions. Give each image its own noise each time,
    `ldm.sampling.seeded_noise` of its number say, and add the result to a `RunningMean` of width T: neither batches nor
    workers change the figure. The mean over times is that of `losses.mean(dim=1)`, whose standard error takes account
    of one image's losses being alike.

    Raises `InputError` for noise or a prediction of another shape, no times or times outside the process: whole numbers
    from 0 to 999, from 0 to 1 for a flow, or noise σ above 0 for EDM.
    """
    if noise_BCHW.shape != latents_BCHW.shape:
        raise InputError(f"noise is {tuple(noise_BCHW.shape)}, latents {tuple(latents_BCHW.shape)}: must be equal")
    _check_times(times, diffusion)
    columns = []
    for time in times:
        kind = torch.int64 if diffusion.config.is_discrete else torch.float32
        times_B = torch.full((len(latents_BCHW),), time, dtype=kind, device=latents_BCHW.device)
        sigma_B = diffusion.alpha_sigma(times_B)[1]
        target = diffusion.target(latents_BCHW, noise_BCHW, times_B)
        seen = diffusion.scale_input(diffusion.noised(latents_BCHW, noise_BCHW, times_B), sigma_B)
        output = predict(seen, diffusion.model_time(times_B))
        if output.shape != target.shape:
            raise InputError(f"prediction is {tuple(output.shape)}, latents {tuple(target.shape)}: must be equal")
        columns.append((output.double() - target.double()).square().flatten(1).mean(dim=1))
    return torch.stack(columns, dim=1).cpu()


def _check_times(times: Sequence[float], diffusion: Diffusion) -> None:
    if diffusion.config.is_edm:
        fits, rule = all(time > 0 for time in times), "noise σ above 0"
    elif diffusion.config.is_flow:
        fits, rule = all(0 <= time <= 1 for time in times), "numbers from 0 to 1"
    else:
        last = len(diffusion.alphas_cumprod) - 1
        fits = all(0 <= time <= last and time == int(time) for time in times)
        rule = f"whole numbers from 0 to {last}"
    if not times or not fits:
        raise InputError(f"times {list(times)}: must be {rule}, one at least")
