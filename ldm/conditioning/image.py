"""Images by CLIP's vision tower (Radford et al. 2021), in two forms:

- *embedding*: the projected embedding as a context of one token, as Stable Diffusion's image variations are trained;
- *patches*: the penultimate layer's states of the class token and all patches, as IP-Adapter's finer variant reads them
  (Ye et al. 2023, section 3.2, "plus").

The null condition is zeros in either form: a state that no image has, which image variations are trained with too.
Preprocessing is that of the folder's preprocessor_config.json, done here in torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.conditioning.pretrained import device_of, load_pretrained, read_json, weights_sha256
from ldm.config import is_of
from ldm.errors import ConfigError, InputError

PREPROCESSOR = "preprocessor_config.json"
BICUBIC = 3
"""PIL's number for the one way of resizing that CLIP has."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MOST_PIXELS = 1 << 14
ONLY: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), (True,)),
    **dict.fromkeys(("do_pad", "default_to_square", "use_square_size"), (False, None)),
    "resample": (BICUBIC,),
    "image_processor_type": tuple(f"CLIPImageProcessor{end}" for end in ("", "Fast", "Pil")),
    "feature_extractor_type": ("CLIPFeatureExtractor", "CLIPImageProcessor"),
}
"""Keys of preprocessor_config.json, with the values for which it is what is done here."""
READ = ("size", "crop_size", "image_mean", "image_std", "rescale_factor", "do_convert_rgb", "processor_class")
"""Keys that are read, or say nothing of RGB images."""

ImageForm = Literal["embedding", "patches"]


@dataclass(frozen=True)
class ImagePreprocessing:
    """The way from pixels to what a vision tower is given: resize, crop the centre, normalise."""

    shortest_edge: int | None = 224
    """Pixels that the shorter side is resized to. None: resized to `crop` without keeping proportions."""
    crop: tuple[int, int] = (224, 224)
    """Height and width of the result."""
    mean: Sequence[float] = CLIP_MEAN
    """Mean of pixels in [0, 1], by channel."""
    std: Sequence[float] = CLIP_STD

    def __post_init__(self) -> None:
        """Raises `ConfigError` for sides that are no pixels, and means or deviations that are not three numbers."""
        for name, sides in (("crop_size", self.crop), ("size", (self.shortest_edge or 1,))):
            if not is_of(tuple(sides), tuple[int, ...]) or not all(1 <= side <= MOST_PIXELS for side in sides):
                raise ConfigError(f"{name} = {sides}: must be of whole numbers from 1 to {MOST_PIXELS}")
        if len(self.crop) != 2 or (self.shortest_edge is not None and self.shortest_edge < max(self.crop)):
            sizes = f"size = {self.shortest_edge}, crop_size = {self.crop}"
            raise ConfigError(f"{sizes}: the crop must not be larger than the shorter side")
        for name, values in (("image_mean", self.mean), ("image_std", self.std)):
            numbers = is_of(tuple(values), tuple[float, ...]) and all(math.isfinite(value) for value in values)
            if not numbers or len(values) != 3 or (name == "image_std" and min(values) <= 0):
                raise ConfigError(f"{name} = {list(values)}: must be three numbers, deviations above zero")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImagePreprocessing:
        """The preprocessing of a preprocessor_config.json of CLIP. Raises `ConfigError` for what is not done here."""
        for key, value in values.items():
            if key in ONLY:
                if value not in ONLY[key]:
                    raise ConfigError(f"{key} = {value!r}: only {', '.join(map(repr, ONLY[key]))} is supported")
            elif not (key in READ or key.startswith("_") or value is None):
                raise ConfigError(f"{key} = {value!r} is not a key that is understood here")
        factor = values.get("rescale_factor", 1 / 255)
        if not is_of(factor, float) or abs(factor - 1 / 255) > 1e-9:
            raise ConfigError(f"rescale_factor = {factor!r}: only 1/255 is supported")
        sides = _sides("crop_size", values.get("crop_size", 224))
        size = _sides("size", values.get("size", {"shortest_edge": 224}), edge=True)
        if isinstance(sides, int):
            sides = (sides, sides)
        if not isinstance(size, int) and size != sides:
            raise ConfigError(f"size = {size}: must have shortest_edge, or height and width equal to crop_size")
        channels = {}
        for key, usual in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
            found = values.get(key, usual)
            if not isinstance(found, list | tuple):
                raise ConfigError(f"{key} = {found!r}: must be three numbers")
            channels[key] = tuple(found)
        return cls(size if isinstance(size, int) else None, sides, channels["image_mean"], channels["image_std"])

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


def _sides(key: str, value: Any, *, edge: bool = False) -> int | tuple[int, int]:
    """A size in any of its forms: one number, or height and width. With `edge`, one number is the shorter side's."""
    if is_of(value, int):
        return int(value)
    given = {name: side for name, side in value.items() if side is not None} if isinstance(value, dict) else {}
    if edge and set(given) == {"shortest_edge"} and is_of(given["shortest_edge"], int):
        return int(given["shortest_edge"])
    if set(given) != {"height", "width"} or not all(is_of(side, int) for side in given.values()):
        forms = "a number of pixels, height and width" + (", or shortest_edge alone" if edge else "")
        raise ConfigError(f"{key} = {value!r}: must be {forms}")
    return int(given["height"]), int(given["width"])


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
