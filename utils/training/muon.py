"""Muon: an optimiser whose steps for the weights of layers are as large in every direction."""

from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial; they bring singular values to 0.7 to 1.2 within 5 steps


class Muon(torch.optim.Adam):
    """Adam for biases and other vectors; orthogonalised momentum for the weights of layers, (M, out, in, ...).

    All singular values of a weight's momentum are brought to about 1, so what a layer has small gradients for is learnt
    as fast as what it has large ones for. The root mean square of a step is 0.2 times the learning rate, as Adam's
    usually is, so a learning rate means the same for both. The M models do not mix. The momentum is kept as `exp_avg`.
    (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the size of the steps: Liu et al.,
    "Muon is scalable for LLM training", 2025.)
    """

    def __init__(self, parameters: Iterable[Tensor], **adam):
        parameters = list(parameters)
        weights, others = [p for p in parameters if p.dim() > 2], [p for p in parameters if p.dim() <= 2]
        super().__init__([{"params": weights}, {"params": others}], **adam)
        shapes = {}
        for p in weights:
            shapes.setdefault(p.flatten(2).shape, []).append(p)
        self.alike = list(shapes.values())  # matrices of one shape are orthogonalised at once

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step of all parameters."""
        weights, others = self.param_groups
        for alike in self.alike:
            momenta = [self.state[p]["exp_avg"] for p in alike]
            for p, momentum in zip(alike, momenta, strict=True):
                momentum.lerp_(p.grad, 1 - MOMENTUM)
                self.state[p]["step"] += 1
            nesterov = [p.grad.lerp(m, MOMENTUM).flatten(2) for p, m in zip(alike, momenta, strict=True)]
            steps = orthogonalised(torch.cat(nesterov)) * (0.2 * max(nesterov[0].shape[1:]) ** 0.5 * weights["lr"])
            for p, change in zip(alike, steps.split(len(alike[0])), strict=True):
                p.sub_(change.view_as(p))
        try:
            self.param_groups = [others]
            super().step(closure)
        finally:
            self.param_groups = [weights, others]


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices (..., out, in) with their singular values replaced by values near 1 (Newton-Schulz iterations)."""
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        squares = x @ x.mT
        x = a * x + (b * squares + c * squares @ squares) @ x
    return x.mT if tall else x
