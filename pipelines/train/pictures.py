"""Pictures as PNG bytes, for reports."""

from __future__ import annotations

import io

from torch import Tensor


def png_bytes(image: Tensor) -> bytes:
    """The PNG file of a uint8 image [H, W, 3]."""
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(image.cpu().numpy()).save(sink, format="PNG")
    return sink.getvalue()
