"""Models in and out: the folders of diffusers, and original single-file checkpoints."""

from ldm.interchange.folders import load_model, load_network, model_hash, save_model, save_network
from ldm.interchange.schedulers import diffusion_config, scheduler_config

__all__ = [
    "diffusion_config",
    "load_model",
    "load_network",
    "model_hash",
    "save_model",
    "save_network",
    "scheduler_config",
]
