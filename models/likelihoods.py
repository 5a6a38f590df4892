"""The likelihoods p(x|y): log-probability, mean image and sample, given the decoder's outputs.

Images x are (B, C, H, W) in [0, 1]. Log-probabilities (B,) are in nats per image. Means and samples (B, C, H, W)
may exceed [0, 1]; models/hvae.py clamps them.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .latents import sum_per_image
from .networks import MOL_CHANNELS


class Likelihood(nn.Module):
    """A family of distributions of images, each given by a decoder's outputs (B, `outputs`, H, W)."""

    colour = True  # whether it supports colour images
    is_mass = False  # whether it is a probability mass on 256 levels, which bits per dimension require
    hidden = None  # hidden channels of the decoder's output head, if it has one

    def __init__(self, image_channels: int, sigma: float):
        super().__init__()
        self.outputs = image_channels  # the decoder's output channels

    def forward(self, outputs: Tensor) -> "Pixels":
        return Pixels(self, outputs)

    def floor(self, x: Tensor) -> Tensor | None:
        """The least -log p(x|y) in nats (B,) that any decoder reaches; None where it is not known or unbounded."""
        return None


class Pixels(NamedTuple):
    """The distribution of independent pixels that a likelihood gives for a decoder's outputs."""

    likelihood: Likelihood
    outputs: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability or log-density of images."""
        return sum_per_image(self.likelihood.log_prob(self.outputs, x))

    @property
    def mean(self) -> Tensor:
        """Mean image."""
        return self.likelihood.mean(self.outputs)

    def sample(self, generator: torch.Generator) -> Tensor:
        """The mean image; as usual for VAEs, samples are shown without pixel noise."""
        return self.mean


class Bernoulli(Likelihood):
    """Bernoulli pixels, for grey images only; grey values are treated as probabilities."""

    colour = False

    def log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(logits, x, reduction="none")

    def mean(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)

    def floor(self, x: Tensor) -> Tensor:
        """The entropy of the pixels taken for probabilities, at a mean of x; 0 for binary images only."""
        return sum_per_image(torch.special.entr(x) + torch.special.entr(1 - x))


class ContinuousBernoulli(Likelihood):
    """Pixels with densities proportional to exp(logit x) on [0, 1] (Loaiza-Ganem & Cunningham 2019)."""

    def log_prob(self, logits: Tensor, x: Tensor) -> Tensor:
        """The normaliser is log((exp(a) - 1) / a) for the logit a."""
        a = logits.abs()
        small = a < 0.1  # where the series of log(sinh(a / 2) / (a / 2)) is exact in float32
        safe = torch.where(small, 1.0, a)
        log_norm = safe / 2 + torch.log(-torch.expm1(-safe)) - torch.log(safe)
        log_norm = torch.where(small, a**2 / 24 - a**4 / 2880, log_norm)
        return (x - 0.5) * logits - log_norm

    def mean(self, logits: Tensor) -> Tensor:
        """1 / (1 - exp(-a)) - 1 / a for the logits a."""
        a = logits
        safe = torch.where(a.abs() < 0.1, 1.0, a)
        return torch.where(a.abs() < 0.1, 0.5 + a / 12 - a**3 / 720, -1 / torch.expm1(-safe) - 1 / safe)


class GaussianFixedSigma(Likelihood):
    """Gaussian pixels with a given standard deviation; a density, not a probability mass."""

    def __init__(self, image_channels: int, sigma: float):
        super().__init__(image_channels, sigma)
        self.fixed_log_sigma = math.log(sigma)

    def scale(self, mean: Tensor) -> Tensor:
        """The log of the standard deviation."""
        return torch.full((), self.fixed_log_sigma, dtype=mean.dtype, device=mean.device)

    def log_prob(self, mean: Tensor, x: Tensor) -> Tensor:
        log_sigma = self.scale(mean)
        scaled = (x - mean) * (-log_sigma).exp()
        return -0.5 * scaled**2 - log_sigma - 0.5 * math.log(2 * math.pi)

    def mean(self, mean: Tensor) -> Tensor:
        return mean

    def floor(self, x: Tensor) -> Tensor | None:
        """At a mean of x."""
        return -self(x).log_prob(x)


class GaussianLearnedSigma(GaussianFixedSigma):
    """Gaussian pixels with a learned log sigma, shared by all, softly bounded below by -6 (Rybkin 2020)."""

    def __init__(self, image_channels: int, sigma: float):
        super().__init__(image_channels, sigma)
        self.log_sigma = nn.Parameter(torch.zeros(()))

    def scale(self, mean: Tensor) -> Tensor:
        return -6 + F.softplus(self.log_sigma + 6)

    def floor(self, x: Tensor) -> None:
        """Unknown: it depends on sigma."""


class MixtureOfLogistics(NamedTuple):
    """Mixture of K discretised logistics over 256 levels (PixelCNN++; Salimans 2017).

    Given a component, the mean of each colour is shifted linearly by the preceding colours, which are in [-1, 1].
    """

    log_weights: Tensor  # (B, K, H, W)
    means: Tensor  # (B, C, K, H, W), before the shifts
    log_scales: Tensor  # (B, C, K, H, W)
    coefficients: Tensor | None  # (B, 3, K, H, W): of R for G, of R for B, of G for B; None for one channel

    def _shifted_means(self, colours: Tensor) -> Tensor:
        """Means (B, C, K, H, W), shifted by the preceding colours among (B, C, 1 or K, H, W), in [-1, 1]."""
        if self.coefficients is None:
            return self.means
        r, g, _ = colours.unbind(1)
        c = self.coefficients
        shift = torch.stack([torch.zeros_like(c[:, 0]), c[:, 0] * r, c[:, 1] * r + c[:, 2] * g], 1)
        return self.means + shift

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability of images whose levels are multiples of 1 / 255."""
        colours = (2 * x - 1).unsqueeze(2)  # (B, C, 1, H, W)
        centred = colours - self._shifted_means(colours)
        inv_scale = (-self.log_scales).exp()
        upper = (centred + 1 / 255) * inv_scale
        lower = (centred - 1 / 255) * inv_scale
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)), whose log is accurate for any small mass
        width = 2 / 255 * inv_scale
        inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + (-torch.expm1(-width)).log()
        log_mass = torch.where(
            colours < -1 + 1 / 255,
            F.logsigmoid(upper),
            torch.where(colours > 1 - 1 / 255, F.logsigmoid(-lower), inside),
        )
        return sum_per_image(torch.logsumexp(self.log_weights + log_mass.sum(1), dim=1))

    def _clamped_mean(self, mean: Tensor, log_scale: Tensor) -> Tensor:
        """Mean of a logistic variable X clamped to [-1, 1], as the discretisation does.

        E clamp(X, -1, 1) = 1 - (integral of the CDF over [-1, 1]); the antiderivative of the CDF is a softplus.
        """
        s = log_scale.exp()
        return 1 - s * (F.softplus((1 - mean) / s) - F.softplus((-1 - mean) / s))

    @property
    def mean(self) -> Tensor:
        """Mean image in [0, 1]; the colours that G and B depend on are averaged over a Fibonacci lattice."""
        if self.coefficients is None:
            colours = self._clamped_mean(self.means, self.log_scales)
        else:
            n, stride = 34, 21
            colours = torch.zeros_like(self.means)
            for i in range(n):
                drawn = torch.zeros_like(self.means)
                for c, u in enumerate(((i + 0.5) / n, (i * stride % n + 0.5) / n)):  # quantiles of R, then of G
                    quantile = self._shifted_means(drawn)[:, c] + self.log_scales[:, c].exp() * math.log(u / (1 - u))
                    drawn[:, c] = quantile.clamp(-1, 1)
                colours += self._clamped_mean(self._shifted_means(drawn), self.log_scales) / n
        return ((self.log_weights.exp().unsqueeze(1) * colours).sum(2) + 1) / 2

    def sample(self, generator: torch.Generator) -> Tensor:
        """A sample, quantised to 256 levels in [0, 1]."""
        noise = torch.empty_like(self.log_weights).exponential_(generator=generator)
        k = (self.log_weights - noise.log()).argmax(1)[:, None, None]  # Gumbel-max trick; (B, 1, 1, H, W)
        chosen = [t.gather(2, k.expand(-1, t.shape[1], -1, -1, -1)) for t in (self.means, self.log_scales)]
        coefficients = self.coefficients
        if coefficients is not None:
            coefficients = coefficients.gather(2, k.expand(-1, 3, -1, -1, -1))
        one = MixtureOfLogistics(torch.zeros_like(self.log_weights[:, :1]), *chosen, coefficients)
        u = torch.empty_like(one.means).uniform_(1e-5, 1 - 1e-5, generator=generator)
        logistic = one.log_scales.exp() * (u.log() - torch.log1p(-u))
        colours = torch.zeros_like(one.means)
        for _ in range(1 if coefficients is None else 3):  # R, then G given R, then B given both
            colours = one._shifted_means(colours) + logistic
            colours = ((colours.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        return (colours.squeeze(2) + 1) / 2


class MoL(Likelihood):
    """Outputs: the logits of K components, then for each colour K means, K log-scales and, for RGB, K coefficients."""

    is_mass = True
    hidden = MOL_CHANNELS
    components = 10

    def __init__(self, image_channels: int, sigma: float):
        super().__init__(image_channels, sigma)
        self.colours = image_channels
        self.per_colour = 3 if image_channels == 3 else 2
        self.outputs = self.components * (1 + self.per_colour * image_channels)

    def forward(self, outputs: Tensor) -> MixtureOfLogistics:
        k = self.components
        log_weights = F.log_softmax(outputs[:, :k], dim=1)
        b, _, h, w = outputs.shape
        slots = outputs[:, k:].reshape(b, self.colours, self.per_colour, k, h, w)
        coefficients = torch.tanh(slots[:, :, 2]) if self.colours == 3 else None
        return MixtureOfLogistics(log_weights, slots[:, :, 0], slots[:, :, 1].clamp_min(-7), coefficients)
