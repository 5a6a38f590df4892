"""Optimisers of stacked parameters, and their learning rate."""

import math

import torch
from torch import Tensor

from models.conditioned import OWN
from utils.config import Config

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam; Muon leaves the second of layers' weights at 0
FASTER = 3.5  # times --learning_rate, once a conditioned model's z is in use; at twice of it, ordinary ones lost z
MOMENTUM = 0.95  # of Muon
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


def build_optimizer(config: Config, parameters: dict[str, Tensor], capturable: bool) -> torch.optim.Adam:
    """Adam, or Muon for the weights of layers and Adam for the rest, on stacked parameters (M, ...) by name.

    Its state exists from the start, so that all later changes are in place, where a captured graph sees them.
    """
    device = next(iter(parameters.values())).device
    lr = torch.tensor(config.learning_rate, device=device) if capturable else config.learning_rate
    how = {"lr": lr, "fused": True, "capturable": capturable}
    if config.optimizer == "muon":
        weights = [name for name, p in parameters.items() if p.dim() > 2 and not name.startswith(OWN)]
        others = [p for name, p in parameters.items() if name not in weights]
        optimizer = Muon([parameters[name] for name in weights], others, **how)
    else:
        optimizer = torch.optim.Adam(parameters.values(), **how)
    for p in parameters.values():
        moments = {key: torch.zeros_like(p) for key in MOMENTS}
        step = torch.zeros((), device=device if device.type == "cuda" else "cpu")
        optimizer.state[p] = {"step": step, **moments}
    return optimizer


def lr_factor(config: Config, progress: float, spread: float = 0.0) -> float:
    """What the learning rate is multiplied by, after that share of the training.

    `spread` is that of a conditioned model's betas; until they spread, it is trained as an ordinary one.
    """
    start = {"constant": 1.0, "cosine": 0.0, "tail": 0.7}[config.lr_schedule]
    peak = FASTER if spread > 0 else 1.0
    if progress < start or start == 1:
        return peak
    return peak / 2 * (1 + math.cos(math.pi * (progress - start) / (1 - start)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate; a captured graph sees it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
