"""Muon: an optimiser whose steps for the weights of layers are as large in every direction."""

import torch
from torch import Tensor

MOMENTUM = 0.95
CLIP = 100.0  # times the norm of the momentum, which is a tenth of a usual gradient's
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial; they bring singular values to 0.7 to 1.2 within 5 steps


class Muon(torch.optim.Adam):
    """Adam; but orthogonalised momentum for the `weights` of layers, (M, out, in, ...).

    All singular values of a weight's momentum are brought to about 1, so what a layer has small gradients for is learnt
    as fast as what it has large ones for. The root mean square of a step is 0.2 times the learning rate, as Adam's
    usually is, so a learning rate means the same for both. Gradients are clipped at a large multiple of the momentum's
    norm: else a single batch with a huge one would decide hundreds of steps. The M models do not mix. While it is not
    `on`, all steps are Adam's. Both keep their momentum as `exp_avg`. (Jordan et al., "Muon: An optimizer for hidden
    layers in neural networks", 2024; the size of the steps: Liu et al., "Muon is scalable for LLM training", 2025.)
    """

    def __init__(self, weights: list[Tensor], others: list[Tensor], **adam):
        super().__init__([{"params": weights}, {"params": others}], **adam)
        self.on, shapes = True, {}
        for p in weights:
            shapes.setdefault(p.flatten(2).shape, []).append(p)
        self.alike = list(shapes.values())  # matrices of one shape are orthogonalised at once

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step of all parameters."""
        if not self.on:
            super().step(closure)
            return
        weights, others = self.param_groups
        for alike in self.alike:
            nesterov = [self._nesterov(p, **self.state[p]) for p in alike]
            steps = orthogonalised(torch.cat(nesterov)) * (0.2 * max(nesterov[0].shape[1:]) ** 0.5 * weights["lr"])
            for p, change in zip(alike, steps.split(len(alike[0])), strict=True):
                p.sub_(change.view_as(p))
        try:
            self.param_groups = [others]
            super().step(closure)
        finally:
            self.param_groups = [weights, others]

    @staticmethod
    def _nesterov(p: Tensor, step: Tensor, exp_avg: Tensor, **_) -> Tensor:
        """Counts the step, and adds its gradient to the momentum; the momentum one step ahead, (M, out, rest)."""
        norm, usual = (t.flatten(1).norm(dim=1) for t in (p.grad, exp_avg))
        share = torch.where(usual > 0, (CLIP * usual / norm).clamp_max(1), 1.0)  # all of the first gradient
        gradient = p.grad * share.view(-1, *[1] * (p.dim() - 1))
        exp_avg.lerp_(gradient, 1 - MOMENTUM)
        step += 1
        return gradient.lerp(exp_avg, MOMENTUM).flatten(2)


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
