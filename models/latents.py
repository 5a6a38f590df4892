"""The distribution families of the latents: sampling, densities, and rates (KL divergences in nats per image)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def sum_per_image(t: Tensor) -> Tensor:
    """Sum over all dimensions but the first: (B, ...) -> (B,)."""
    return t.flatten(1).sum(1)


class Gaussian(NamedTuple):
    """A diagonal Gaussian N(mean, std^2); both of one shape (B, ...), or scalars for N(0, 1)."""

    mean: Tensor | float
    std: Tensor | float

    n_heads = 2  # outputs of the network that parametrises it
    convolutional = True  # whether it supports a convolutional z

    @classmethod
    def from_outputs(cls, mean: Tensor, pre_std: Tensor) -> "Gaussian":
        """From a network's two outputs (B, ...); softplus maps the second to the standard deviation."""
        return cls(mean, F.softplus(pre_std).clamp_min(1e-6))  # an underflow to 0 would make the KL infinite

    @classmethod
    def from_variance(cls, mean: Tensor, pre_variance: Tensor) -> "Gaussian":
        """From a network's two outputs (B, ...); softplus maps the second to the variance."""
        return cls(mean, F.softplus(pre_variance).clamp_min(1e-12).sqrt())

    @staticmethod
    def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """The noise for `sample`: standard normal."""
        return torch.randn(shape, generator=generator, device=generator.device)

    @staticmethod
    def from_prior(noise: Tensor) -> Tensor:
        """A sample of the prior N(0, I), from the same kind of noise."""
        return noise

    @staticmethod
    def temperature(epoch: int) -> None:
        """None, since a Gaussian is not relaxed."""

    @classmethod
    def prior_log_prob(cls, z: Tensor) -> Tensor:
        """Log-density of N(0, I) in nats, (B,)."""
        return cls(0.0, 1.0).log_prob(z)

    def sample(self, noise: Tensor, temperature: Tensor | None = None) -> Tensor:
        """Reparametrised sample of shape (B, ...); the temperature is for relaxed families only."""
        return self.mean + self.std * noise

    @property
    def mode(self) -> Tensor:
        """The mode, (B, ...)."""
        return self.mean

    def rate(self) -> Tensor:
        """KL[self || N(0, I)] in nats, (B,)."""
        return self.kl(Gaussian(0.0, 1.0))

    def kl(self, prior: "Gaussian") -> Tensor:
        """KL[self || prior] in nats, (B,)."""
        return sum_per_image(self.kl_of_units(prior))

    def kl_of_units(self, prior: "Gaussian") -> Tensor:
        """KL[self || prior] of each dimension in nats, (B, ...)."""
        ratio = self.std / prior.std
        shift = (self.mean - prior.mean) / prior.std
        return 0.5 * (ratio**2 + shift**2 - 1) - ratio.log()

    def rate_of_units(self) -> Tensor:
        """KL[self || N(0, I)] of each dimension in nats, (B, ...)."""
        return self.kl_of_units(Gaussian(0.0, 1.0))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, (B,)."""
        std = torch.as_tensor(self.std, dtype=value.dtype, device=value.device)
        return sum_per_image(-0.5 * ((value - self.mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi))


def precision_weighted(a: Gaussian, b: Gaussian) -> Gaussian:
    """The normalised product of two Gaussians, whose precisions add (ladder VAE; Sonderby 2016, eq. 13)."""
    var_a, var_b = a.std**2, b.std**2
    total = var_a + var_b
    return Gaussian((a.mean * var_b + b.mean * var_a) / total, (var_a * var_b / total).sqrt())


class RelaxedOneHot(NamedTuple):
    """One of Z categories, relaxed for training (Gumbel-softmax; Jang 2017); logits (B, Z)."""

    logits: Tensor

    n_heads = 1
    convolutional = False
    final_temperature = 0.4

    @classmethod
    def from_outputs(cls, logits: Tensor) -> "RelaxedOneHot":
        """From a network's output, the logits (B, Z)."""
        return cls(logits)

    @staticmethod
    def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """The noise for `sample`: standard Gumbel."""
        return -torch.empty(shape, device=generator.device).exponential_(generator=generator).log()

    @staticmethod
    def from_prior(noise: Tensor) -> Tensor:
        """A sample of the uniform prior, from the same kind of noise."""
        return one_hot_argmax(noise)

    @classmethod
    def prior_log_prob(cls, z: Tensor) -> Tensor:
        """Log-probability under the uniform distribution in nats, (B,)."""
        return torch.full_like(z[:, 0], -math.log(z.shape[1]))

    @classmethod
    def temperature(cls, epoch: int) -> float:
        """1 in the first epoch (epoch 0), then max(exp(-0.007 epoch), 0.4)."""
        return max(math.exp(-0.007 * epoch), cls.final_temperature)

    def sample(self, noise: Tensor, temperature: Tensor | None = None) -> Tensor:
        """A sample (B, Z): relaxed at the given temperature; without one, hard with straight-through gradients."""
        if temperature is not None:
            return F.softmax((self.logits + noise) / temperature, dim=-1)
        soft = F.softmax((self.logits + noise) / self.final_temperature, dim=-1)
        return one_hot_argmax(soft) + (soft - soft.detach())

    @property
    def mode(self) -> Tensor:
        """The most probable category, one-hot (B, Z)."""
        return one_hot_argmax(self.logits)

    @property
    def mean(self) -> Tensor:
        """The probabilities of the categories, (B, Z)."""
        return F.softmax(self.logits, dim=-1)

    def rate(self) -> Tensor:
        """KL[q || uniform] = sum of q log(q Z) over the categories, in nats, (B,)."""
        log_q = F.log_softmax(self.logits, dim=-1)
        return (log_q.exp() * (log_q + math.log(self.logits.shape[-1]))).sum(-1)

    def rate_of_units(self) -> Tensor:
        """KL[q || uniform] of its one unit, the category, in nats, (B, 1)."""
        return self.rate()[:, None]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of one-hot values in nats, (B,)."""
        return (value * F.log_softmax(self.logits, dim=-1).to(value)).sum(-1)


def one_hot_argmax(t: Tensor) -> Tensor:
    """One-hot of the largest entry along the last dimension (written to run under vmap)."""
    return (torch.arange(t.shape[-1], device=t.device) == t.argmax(-1, keepdim=True)).to(t.dtype)
