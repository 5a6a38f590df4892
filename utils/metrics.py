"""Measures of images, samples and representations."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def psnr(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Peak signal-to-noise ratio in dB of the reconstructions of all images together: 10 log10(1 / MSE)."""
    squares, n = 0.0, 0
    for x, _ in batches:
        squares += ((model.reconstruct(x) - x) ** 2).sum(dtype=torch.float64)
        n += x.numel()
    return -10 * math.log10(squares / n) if squares > 0 else math.inf
