"""What a model makes of images: reconstructions below their originals, and samples, as pictures."""

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.files import write_atomic
from utils.seeds import generator

N = 16  # images in a row; reconstructions, and as many samples, or four times as many up to 32 pixels


@torch.no_grad()
def pictures(model: nn.Module, images: Tensor, seed: int) -> dict[str, Tensor]:
    """Pictures (3, H', W') in [0, 1] by name: `reconstructions` of the first N images (B, C, H, W), `samples`."""
    from torchvision.utils import make_grid

    images = images[:N]
    samples = model.sample(N if images.shape[-1] > 32 else 4 * N, generator=generator(images.device, seed, "samples"))
    pairs = torch.cat([images, model.reconstruct(images)])
    return {"reconstructions": make_grid(pairs, nrow=N), "samples": make_grid(samples, nrow=N)}


def write_pictures(folder: Path, drawn: dict[str, Tensor]) -> None:
    """Writes pictures as PNG files into a run's folder."""
    from torchvision.transforms.functional import to_pil_image

    for name, picture in drawn.items():
        buffer = io.BytesIO()
        to_pil_image(picture.clamp(0, 1).cpu()).save(buffer, "PNG")
        write_atomic(folder / f"{name}.png", buffer.getvalue())
