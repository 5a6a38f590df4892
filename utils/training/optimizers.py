"""Optimisers of stacked parameters, and their learning rate."""

import math

import torch
from torch import Tensor

from models.conditioned import OWN, SHARING
from utils.config import Config

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam; Muon leaves the second of layers' weights at 0
REFINING = "cosine"  # the schedule of cells that are refined
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
        shapes = {}
        for p in weights:
            shapes.setdefault(p.flatten(2).shape, []).append(p)
        self.on, self.alike = True, list(shapes.values())
        sizes = [0.2 * max(shape[1:]) ** 0.5 for shape in shapes]  # of steps, at a learning rate of 1
        self.sizes = torch.tensor(sizes, dtype=torch.float64, device=weights[0].device)
        super().__init__([{"params": [p for alike in self.alike for p in alike]}, {"params": others}], **adam)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step of all parameters."""
        if not self.on:
            super().step(closure)
            return
        weights, others = self.param_groups
        blocks = [torch.cat([p.grad.flatten(2) for p in alike]) for alike in self.alike]
        self._look_ahead(weights["params"], blocks)
        directions = orthogonalised(blocks, at_once=blocks[0].is_cuda)
        for block, x, size in zip(blocks, directions, self.sizes * weights["lr"], strict=True):
            torch.mul(x, size, out=block)
        torch._foreach_sub_(weights["params"], views(blocks, weights["params"]))
        try:
            self.param_groups = [others]
            super().step(closure)
        finally:
            self.param_groups = [weights, others]

    def _look_ahead(self, weights: list[Tensor], blocks: list[Tensor]) -> None:
        """Counts the step, and adds gradients (K, out, rest) to the momenta; in their place, these one step ahead."""
        steps, momenta = ([self.state[p][key] for p in weights] for key in ("step", MOMENTS[0]))
        norm, usual = norms([*blocks, *momenta]).chunk(2)
        share = (CLIP * usual / norm).clamp_max(1).masked_fill(usual == 0, 1)  # all of the first gradient
        for block, of_block in zip(blocks, share.split([*map(len, blocks)]), strict=True):
            block.mul_(of_block.view(-1, 1, 1))
        gradients = views(blocks, momenta)
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(gradients, momenta, MOMENTUM)


def norms(tensors: list[Tensor]) -> Tensor:
    """Of each model's part of tensors (M, ...), one tensor after another."""
    return torch.stack(torch._foreach_norm([part for t in tensors for part in t.unbind()]))


def views(blocks: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The parts of blocks that tensors (M, ...), in this order, were concatenated to, in their shapes."""
    parts = (part for block in blocks for part in block.split(len(tensors[0])))
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def orthogonalised(blocks: list[Tensor], at_once: bool = False) -> list[Tensor]:
    """Matrices (K, out, in) with their singular values replaced by values near 1 (Newton-Schulz iterations).

    `at_once` takes few launches, as a GPU wants it, and changes last digits: matrices with the same shorter side are
    iterated together, padded with zeros, which stay zeros.
    """
    result, together = list(blocks), {}
    for i, block in enumerate(blocks):
        wide = block.mT if block.shape[1] > block.shape[2] else block
        together.setdefault(wide.shape[1] if at_once else i, []).append((i, wide))
    sizes = norms(blocks).clamp_min(1e-7).split([*map(len, blocks)])
    for group in together.values():
        counts, lengths = [len(wide) for _, wide in group], {wide.shape[2] for _, wide in group}
        x = blocks[0].new_empty(sum(counts), group[0][1].shape[1], max(lengths))
        if len(lengths) > 1:
            x.zero_()
        for (i, wide), part in zip(group, x.split(counts), strict=True):
            torch.div(wide, sizes[i].view(-1, 1, 1), out=part[..., : wide.shape[2]])
        for (i, wide), part in zip(group, iterated(x, at_once).split(counts), strict=True):
            part = part[..., : wide.shape[2]]
            result[i] = part if wide is blocks[i] else part.mT
    return result


def iterated(x: Tensor, fused: bool) -> Tensor:
    """Newton-Schulz iterations of matrices (K, out, in) of norm 1, out <= in; `fused` in three products each."""
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        squares = x @ x.mT
        if fused:
            x = torch.baddbmm(x, torch.baddbmm(squares, squares, squares, beta=b, alpha=c), x, beta=a)
        else:
            x = a * x + (b * squares + c * squares @ squares) @ x
    return x


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

    `spread` is that of a conditioned model's betas; until they spread, it is trained as an ordinary one by Adam.
    """
    schedule = REFINING if config.refine_epochs else config.lr_schedule
    start = {"constant": 1.0, "cosine": 0.0, "tail": 0.7}[schedule]
    peak = 1.0
    if config.multi_rate:
        before, after = SHARING[config.sharing].learning_rates
        peak = after if spread > 0 or config.refine_epochs else before
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
