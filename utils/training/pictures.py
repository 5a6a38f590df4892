"""What a model makes of images: reconstructions below their originals, and samples, as pictures."""

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.files import write_atomic
from utils.seeds import generator

N = 16  # images in a row; reconstructions, and as many samples, or four times as many up to 32 pixels


@torch.no_grad()
def pictures(model: nn.Module, images: Tensor, seed: int) -> dict[str, Tensor]:
    """Pictures (3, H', W') in [0, 1] by name: `reconstructions` of the first N images (B, C, H, W), `samples`."""
    images = images[:N]
    samples = model.sample(N if images.shape[-1] > 32 else 4 * N, generator=generator(images.device, seed, "samples"))
    pairs = torch.cat([images, model.reconstruct(images)])
    return {"reconstructions": tiled(pairs, len(images)), "samples": tiled(samples, N)}


def tiled(images: Tensor, columns: int) -> Tensor:
    """Rows of so many images (B, C, H, W), with black lines of 2 pixels around each: one picture (3, H', W')."""
    rows = F.pad(images.expand(-1, 3, -1, -1), (2, 0, 2, 0)).unflatten(0, (-1, columns))
    return F.pad(rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2), (0, 2, 0, 2))


def write_pictures(folder: Path, drawn: dict[str, Tensor]) -> None:
    """Writes pictures as PNG files into a run's folder."""
    from PIL import Image

    for name, picture in drawn.items():
        pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        write_atomic(folder / f"{name}.png", buffer.getvalue())
