"""Trained models out of published units."""

from __future__ import annotations

from infra.storage import Store
from ldm.autoencoder import AutoencoderKL
from ldm.conditioning import TextEncoder
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.generate import LatentDiffusion
from ldm.interchange import load_network
from ldm.unet import UNet2DCondition
from pipelines.artifacts import Unit, fetch_folder


def load_trained(
    store: Store, unet: Unit, autoencoder: Unit, text_encoder: TextEncoder, diffusion: DiffusionConfig
) -> LatentDiffusion:
    """The model of two units of `train` with the text encoder and the process that the recipe names, on the CPU.

    Raises `ldm.errors.LdmError` if a part can't be loaded.
    """
    return LatentDiffusion(
        unet=load_network(UNet2DCondition, fetch_folder(store, unet, "unet")).eval().requires_grad_(False),
        autoencoder=load_network(AutoencoderKL, fetch_folder(store, autoencoder, "vae")).eval().requires_grad_(False),
        text_encoder=text_encoder,
        diffusion=Diffusion(diffusion),
    )
