"""The weights of the two rates of every cell in training: fixed, or steered until the rates are those asked for."""

import math

import torch
from torch import Tensor

from models.stack import TERMS
from utils.config import Config

RATES = slice(TERMS.index("kl_y"), TERMS.index("kl_z") + 1)
AVERAGED = 20  # steps over which a rate is averaged
GAIN = 30.0  # of log beta, over a whole training in which a rate is e times the one asked for
FROZEN = 0.9  # share of the training after which the betas stay
LEAST = 1e-3  # nats; smaller rates are not told apart


class Betas:
    """beta_y and beta_z (M,) of the cells; where a Config asks for a rate, that layer's beta follows it.

    Dual ascent in log beta on R = target (GECO; Rezende & Viola, 2018): a rate above its target raises the beta. It
    begins when the warm-up has ended, and stays on the device.
    """

    def __init__(self, configs: list[Config], device: torch.device):
        values = [(1.0, 1.0) if c.is_conditioned else (c.beta_y, c.beta_z) for c in configs]
        targets = [[math.nan if t is None else t for t in (c.target_rate_y, c.target_rate_z)] for c in configs]
        self.values, self.targets = torch.tensor(values).to(device), torch.tensor(targets).log().to(device)
        self.log_rates = torch.full_like(self.values, math.nan)
        self.steered = any(c.has_target for c in configs)
        self.start = configs[0].warmup_epochs / configs[0].num_epochs

    @property
    def y(self) -> Tensor:
        return self.values[:, 0]

    @property
    def z(self) -> Tensor:
        return self.values[:, 1]

    def steer(self, sums: Tensor, n: int, progress: float, steps: int) -> None:
        """Adapts the betas after a step, given its sums (M, 4) over n images; one of `steps` of the training."""
        if not self.steered or not self.start <= progress < FROZEN:
            return
        log_rates = (sums[:, RATES] / n).clamp_min(LEAST).log()
        averaged = self.log_rates + (log_rates - self.log_rates) / AVERAGED
        self.log_rates = torch.where(self.log_rates.isnan(), log_rates, averaged)
        error = (self.log_rates - self.targets).clamp(-1, 1).nan_to_num(0.0)
        self.values *= (GAIN / steps * error).exp()

    def state(self, m: int) -> dict[str, Tensor]:
        """What a cell's resume state keeps of it."""
        return {"betas": self.values[m].cpu().clone(), "log_rates": self.log_rates[m].cpu().clone()}

    def load(self, m: int, state: dict) -> None:
        """Sets a cell from its resume state; those of before there were targets hold nothing of it."""
        if "betas" in state:
            self.values[m], self.log_rates[m] = state["betas"], state["log_rates"]


def rate_weights(config: Config, epoch: int) -> tuple[float, float]:
    """Warm-up factors of beta_y and beta_z: they rise linearly from 0 in epoch 0 to 1 in epoch `warmup_epochs`."""
    # a conditioned model's beta_y counts from the start: while y is costly and z is free, z comes into use
    weight = min(1.0, epoch / config.warmup_epochs) if config.warmup_epochs else 1.0
    return (1.0 if config.is_conditioned else weight), weight
