"""The optimiser of a training and its learning rate."""

import math

import torch
from torch import Tensor

from models.conditioned import OWN
from utils.config import Config
from utils.training.muon import Muon

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam; Muon leaves the second of layers' weights at 0
FASTER = 3.5  # times --learning_rate, once a conditioned model's z is in use; at twice of it, ordinary ones lost z


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
