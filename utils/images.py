"""Pictures made of many images."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def tiled(images: Tensor, columns: int, value: float = 0.0, line: int = 2) -> Tensor:
    """Images (B, C, H, W) in rows of so many, with lines of so many pixels around each: one picture (3, H', W').

    Lines, and what the last row lacks, are of that value.
    """
    framed = F.pad(images.expand(-1, 3, -1, -1), (line, 0, line, 0), value=value)
    framed = F.pad(framed, (0, 0, 0, 0, 0, 0, 0, -len(images) % columns), value=value)
    rows = framed.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)  # 3, rows, height, columns, width
    return F.pad(rows.flatten(3, 4).flatten(1, 2), (0, line, 0, line), value=value)


def to_pil(picture: Tensor) -> "Image":
    """A picture (3, H, W) in [0, 1] as an image of Pillow, which notebooks show."""
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.cpu().numpy())
