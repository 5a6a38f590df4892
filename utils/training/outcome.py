"""What is told of a trained model: the figures of training.json, reconstructions and samples as pictures."""

import io
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets.loading import Data
from models.stack import TERMS
from utils.files import write_atomic
from utils.images import tiled, to_pil
from utils.seeds import generator

N = 16  # images in a row; reconstructions, and as many samples, or four times as many up to 32 pixels


def figures(model: nn.Module, data: Data, batch_size: int, **means: Tensor) -> dict[str, dict]:
    """What training.json says of a model, by split: means (4,) of its terms, and its PSNR on the test images."""
    result = {split: dict(zip(TERMS, of.tolist(), strict=True)) for split, of in means.items()}
    psnr = model.psnr(data.test.batches(batch_size))
    result["test"]["psnr"] = psnr if math.isfinite(psnr) else None
    return result


@torch.no_grad()
def pictures(model: nn.Module, images: Tensor, seed: int) -> dict[str, Tensor]:
    """Pictures (3, H', W') in [0, 1] by name: `reconstructions` of the first N images (B, C, H, W), `samples`."""
    images = images[:N]
    samples = model.sample(N if images.shape[-1] > 32 else 4 * N, generator=generator(images.device, seed, "samples"))
    pairs = torch.cat([images, model.reconstruct(images)])
    return {"reconstructions": tiled(pairs, len(images)), "samples": tiled(samples, N)}


def write_pictures(folder: Path, drawn: dict[str, Tensor]) -> None:
    """Writes pictures as PNG files into a run's folder."""
    for name, picture in drawn.items():
        buffer = io.BytesIO()
        to_pil(picture).save(buffer, "PNG")
        write_atomic(folder / f"{name}.png", buffer.getvalue())
