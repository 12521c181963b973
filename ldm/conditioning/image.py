"""Images by CLIP's vision tower (Radford et al. 2021), in two forms:

- *embedding*: the projected embedding as a context of one token, as Stable Diffusion's image variations are trained;
- *patches*: the penultimate layer's states of the class token and all patches, as IP-Adapter's finer variant reads them
  (Ye et al. 2023, section 3.2, "plus").

The null condition is zeros in either form: a state that no image has, which image variations are trained with too.
Preprocessing is that of the folder's preprocessor_config.json, done here in torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.conditioning.pretrained import device_of, load_pretrained, read_json, weights_sha256
from ldm.errors import ConfigError, FolderError, InputError

PREPROCESSOR = "preprocessor_config.json"
BICUBIC = 3
"""PIL's number for the one way of resizing that CLIP has."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ImageForm = Literal["embedding", "patches"]


@dataclass(frozen=True)
class ImagePreprocessing:
    """From pixels to what a vision tower is given: resize, crop the centre, normalise."""

    shortest_edge: int | None = 224
    """Pixels that the shorter side is resized to. None: resized to `crop` without keeping proportions."""
    crop: tuple[int, int] = (224, 224)
    """Height and width of the result."""
    mean: Sequence[float] = CLIP_MEAN
    """Of pixels in [0, 1], by channel."""
    std: Sequence[float] = CLIP_STD

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImagePreprocessing:
        """Of a preprocessor_config.json of CLIP. Raises `ConfigError` for what is not done here."""
        only = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True}
        for key, value in (only | {"resample": BICUBIC}).items():
            if values.get(key, value) != value:
                raise ConfigError(f"{key} = {values[key]}: only {value} is supported")
        if abs(values.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
            raise ConfigError(f"rescale_factor = {values['rescale_factor']}: only 1/255 is supported")
        crop = values.get("crop_size", 224)
        sides = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        size = values.get("size", 224)
        edge = size if isinstance(size, int) else size.get("shortest_edge")
        if edge is None and (size.get("height"), size.get("width")) != sides:
            raise ConfigError(f"size = {size}: must have shortest_edge, or height and width equal to crop_size")
        if edge is not None and edge < max(sides):
            raise ConfigError(f"size = {edge}, crop_size = {sides}: the crop must not be larger than the shorter side")
        return cls(edge, sides, tuple(values.get("image_mean", CLIP_MEAN)), tuple(values.get("image_std", CLIP_STD)))

    def __call__(self, images_BHWC: Tensor) -> Tensor:
        """Normalised float32 [B, 3, *crop] of uint8 RGB images [B, H, W, 3]. Raises `InputError` for others."""
        if images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3 or images_BHWC.dtype != torch.uint8:
            raise InputError(
                f"images are {images_BHWC.dtype} {tuple(images_BHWC.shape)}: must be uint8 [batch, height, width, 3]"
            )
        if 0 in images_BHWC.shape:
            raise InputError(f"images are {tuple(images_BHWC.shape)}: give at least one, with at least one pixel")
        height, width = self._resized(*images_BHWC.shape[1:3])
        pixels = images_BHWC.permute(0, 3, 1, 2).float()
        # Rows first, then columns, each rounded to whole numbers of [0, 255]: as PIL resizes, where towers are trained.
        for shape in ((images_BHWC.shape[1], width), (height, width)):
            pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True, align_corners=False)
            pixels = pixels.clamp(0, 255).round()
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        pixels = pixels[:, :, top : top + self.crop[0], left : left + self.crop[1]] / 255
        mean, std = (torch.tensor(each, device=pixels.device).view(1, -1, 1, 1) for each in (self.mean, self.std))
        return (pixels - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.shortest_edge is None:
            return self.crop
        shorter = min(height, width)
        return height * self.shortest_edge // shorter, width * self.shortest_edge // shorter


def load_image_encoder(folder: Path, form: ImageForm = "embedding", preprocessor: Path | None = None) -> ImageEncoder:
    """The vision tower in a folder of transformers' CLIPVisionModelWithProjection, or of a whole CLIP.

    preprocessor_config.json is in `preprocessor`, or the same folder. Raises `FolderError` if files are absent or
    corrupt, weights are pickles or don't fit; `ConfigError` for preprocessing that is not done here.
    """
    path = (preprocessor or folder) / PREPROCESSOR
    try:
        preprocessing = ImagePreprocessing.from_dict(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{path} is not of CLIP's preprocessing: {error}") from error
    network = load_pretrained(folder, "CLIPVisionModelWithProjection")
    return ImageEncoder(network, preprocessing, name=folder.name, form=form)


class ImageEncoder:
    """A frozen vision tower with its preprocessing."""

    def __init__(
        self, network: Any, preprocessing: ImagePreprocessing, *, name: str, form: ImageForm = "embedding"
    ) -> None:
        """`network` is a CLIPVisionModelWithProjection. Raises `ConfigError` for an unknown form, or preprocessing to
        another size than the network's."""
        if form not in get_args(ImageForm):
            raise ConfigError(f"form = {form!r}: must be one of {', '.join(get_args(ImageForm))}")
        side = network.config.image_size
        if preprocessing.crop != (side, side):
            raise ConfigError(f"crop_size = {preprocessing.crop}: this tower reads images of {side} by {side}")
        self.network = network.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.name = name
        self.form = form

    @property
    def width(self) -> int:
        config = self.network.config
        return int(config.projection_dim if self.form == "embedding" else config.hidden_size)

    @property
    def length(self) -> int:
        """1, or the patches and one."""
        if self.form == "embedding":
            return 1
        return int((self.network.config.image_size // self.network.config.patch_size) ** 2) + 1

    @property
    def identity(self) -> str:
        """`name@sha256:…#form` over the weights."""
        return f"{self.name}@sha256:{weights_sha256(self.network.state_dict())}#{self.form}"

    def to(self, device: torch.device | str) -> Self:
        """The same encoder, moved."""
        self.network.to(device)
        return self

    @torch.inference_mode()
    def encode(self, images_BHWC: Tensor) -> Conditioning:
        """The states [B, length, width], float32, of uint8 RGB images [B, H, W, 3]. Raises `InputError` for others."""
        output = self.network(
            self.preprocessing(images_BHWC.to(device_of(self.network))),
            output_hidden_states=self.form == "patches",
            return_dict=True,
        )
        states = output.image_embeds[:, None] if self.form == "embedding" else output.hidden_states[-2]
        with torch.inference_mode(False):
            return Conditioning(states.float().clone())

    def null(self, count: int) -> Conditioning:
        """`count` times zeros, sharing memory."""
        return Conditioning(torch.zeros(1, self.length, self.width, device=device_of(self.network))).expand(count)
