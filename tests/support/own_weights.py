"""Weights of chance for the extractors that take them by path, in the form that each is published in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

KINDS = ("inception", "clip", "clip_of_transformers", "dinov2")
CLIP: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
}


def own_extractor(kind: str, folder: Path) -> str:
    """The name by which a recipe asks for one whose weights are written into `folder`."""
    torch.manual_seed(0)
    if kind == "inception":
        return f"inception:{_inception(folder / 'inception.pth')}"
    if kind == "clip":
        from ldm.clip import build_clip, save_clip

        save_clip(build_clip(CLIP).state_dict(), CLIP, folder / kind)
    elif kind == "clip_of_transformers":
        from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPVisionConfig(**shape, image_size=16, patch_size=8, projection_dim=8)
        CLIPVisionModelWithProjection(config).save_pretrained(folder / kind)
        size = {"height": 16, "width": 16}
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder / kind)
    else:
        from transformers import Dinov2Config, Dinov2Model

        config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28)
        Dinov2Model(config).save_pretrained(folder / kind)
    return f"{kind.partition('_')[0]}:{folder / kind}"


def _inception(path: Path) -> Path:
    """Torch-fidelity's network, small numbers: its features are neither all 0 nor large."""
    module: Any = __import__("torch_fidelity.feature_extractor_inceptionv3", fromlist=["FeatureExtractorInceptionV3"])

    class Bare(module.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> None:
            """Its own weights stay."""

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.device("meta"):
        shapes = Bare("bare", ["2048"], feature_extractor_weights_path=empty).state_dict()
    state = {}
    for name, meta in shapes.items():
        noise = torch.randn(meta.shape) if meta.is_floating_point() else torch.zeros(meta.shape)
        if name.endswith("conv.weight"):
            noise *= (2 / meta[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            noise = 1 + 0.1 * noise
        else:
            noise *= 0.1
        state[name] = noise.to(meta.dtype)
    torch.save(state, path)
    return path
