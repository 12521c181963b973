"""Models in and out: the folders of diffusers, and original single-file checkpoints."""

from ldm.interchange.folders import load_model, model_hash, pipeline_of, save_model
from ldm.interchange.lora import merge_lora
from ldm.interchange.networks import load_network, save_network
from ldm.interchange.schedulers import Sampling, diffusion_config, read_scheduler, scheduler_config
from ldm.interchange.single_file import LAYOUTS, Layout, layout_of, load_single_file, save_single_file

__all__ = [
    "LAYOUTS",
    "Layout",
    "Sampling",
    "diffusion_config",
    "layout_of",
    "load_model",
    "load_network",
    "load_single_file",
    "merge_lora",
    "model_hash",
    "pipeline_of",
    "read_scheduler",
    "save_model",
    "save_network",
    "save_single_file",
    "scheduler_config",
]
