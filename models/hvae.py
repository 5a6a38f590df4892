"""The two-layer hierarchical VAE with top-down inference (Xiao & Bamler, ICLR 2023), and its objective.

Two latents: `z`, the top one (the paper's z_2), and `y`, the bottom one (the paper's z_1); x is an image.

    generative model  p(z) p(y|z) p(x|y)          inference  q(z|x) q(y|z,x)

Both factorise in the same order, so the rate splits into one term per layer (all in nats per image):

    R(z) = KL[q(z|x) || p(z)]    R(y|z) = E_q(z|x) KL[q(y|z,x) || p(y|z)]    D = -E_q log p(x|y)
    loss = D + beta_y R(y|z) + beta_z R(z)
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.errors import UserError

from .latents import Gaussian
from .networks import networks_of
from .tables import LATENTS, LIKELIHOODS


class Terms(NamedTuple):
    """Log-likelihood and both rates of each image, in nats; (B,), or (M, B) for M models."""

    ll: Tensor
    kl_y: Tensor
    kl_z: Tensor

    def loss(self, beta_y: Tensor | float = 1.0, beta_z: Tensor | float = 1.0) -> Tensor:
        """The loss of each image (paper, eq. 8) in nats, shaped as the terms; the negative ELBO at betas of 1."""
        return -self.ll + beta_y * self.kl_y + beta_z * self.kl_z


class Noise(NamedTuple):
    """The random numbers of a forward pass; drawn outside the model, so that all cells of a grid see the same."""

    z: Tensor
    y: Tensor
    temperature: Tensor | None = None  # of a relaxed z; None gives hard samples
    log_betas: Tensor | None = None  # of a conditioned model: log10 of (beta_y, beta_z) of each image, (B, 2)

    def of(self, images: slice) -> "Noise":
        """The noise of some of the images."""
        log_betas = None if self.log_betas is None else self.log_betas[images]
        return Noise(self.z[images], self.y[images], self.temperature, log_betas)


class HVAE(nn.Module):
    """A two-layer VAE with a vector or a convolutional z; `q_z`, `q_y`, `p_y` and `p_x` return distributions."""

    def __init__(self, config):
        super().__init__()
        self.family = LATENTS[config.qz_family]
        self.gaussian, self.z_from_outputs = Gaussian.from_outputs, self.family.from_outputs
        nets = networks_of(config)
        self.z_shape, self.y_shape = nets.z_shape, nets.y_shape
        likelihood = LIKELIHOODS[config.px_y_family_ll](config.image_shape[0], config.sigma)
        self.build_inference(nets, config)
        self.decoder = nets.decoder(likelihood.outputs, self.decoder_hidden(likelihood, config))
        self.likelihood = likelihood

    @staticmethod
    def default_warmup(num_epochs: int) -> int:
        """Epochs of warm-up if --warmup_epochs is not given."""
        return 0

    @staticmethod
    def check(config) -> None:
        """Raises UserError for settings that this model does not support."""
        if config.use_conv_z and not LATENTS[config.qz_family].convolutional:
            raise UserError(f"--qz_family: {config.qz_family} needs a vector z, so neither --use_conv_z nor 256 pixels")

    def build_inference(self, nets, config) -> None:
        """Builds the networks of q(z|x), q(y|z,x) and p(y|z)."""
        self.trunk = nets.trunk()
        self.z_head = nets.z_head(self.family.n_heads)
        self.x_branch = nets.x_branch()
        self.z_branch = nets.z_branch()
        self.y_head = nets.y_joint()
        self.y_prior = nets.y_prior()

    def decoder_hidden(self, likelihood: nn.Module, config) -> int | None:
        """Hidden channels of the decoder's output head; None for a decoder without one."""
        return likelihood.hidden

    def features(self, x: Tensor) -> Tensor:
        """The features h of images x (B, C, H, W) that q(z|x) and q(y|z,x) share; here the images themselves."""
        return x

    def q_z_given(self, h: Tensor):
        """q(z|x) from the features h of x."""
        return self.z_from_outputs(*self.z_head(self.trunk(h)))

    def q_y_given(self, z: Tensor, h: Tensor, p_y: Gaussian) -> Gaussian:
        """q(y|z,x) from z, the features h of x, and p(y|z)."""
        return self.gaussian(*self.y_head(torch.cat([self.z_branch(z), self.x_branch(h)], dim=1)))

    def q_z(self, x: Tensor):
        """q(z|x): a Gaussian (B, *z_shape), or a RelaxedOneHot (B, Z)."""
        return self.q_z_given(self.features(x))

    def q_y(self, z: Tensor, x: Tensor) -> Gaussian:
        """q(y|z,x): a Gaussian (B, *y_shape)."""
        return self.q_y_given(z, self.features(x), self.p_y(z))

    def p_y(self, z: Tensor) -> Gaussian:
        """p(y|z): a Gaussian (B, *y_shape)."""
        return self.gaussian(*self.y_prior(z))

    def p_x(self, y: Tensor):
        """p(x|y): a likelihood over images (B, C, H, W)."""
        return self.likelihood(self.decoder(y))

    def forward(self, x: Tensor, noise: Noise) -> Terms:
        """ll, kl_y and kl_z, each (B,), of images x (B, C, H, W) in [0, 1], from one posterior sample per image."""
        h = self.features(x)
        q_z = self.q_z_given(h)
        z = q_z.sample(noise.z, noise.temperature)
        p_y = self.p_y(z)
        q_y = self.q_y_given(z, h, p_y)
        y = q_y.sample(noise.y)
        return Terms(ll=self.p_x(y).log_prob(x), kl_y=q_y.kl(p_y), kl_z=q_z.rate())

    def noise(self, n: int, generator: torch.Generator, temperature: Tensor | None = None) -> Noise:
        """The noise for a forward pass over n images, on the generator's device."""
        z = self.family.noise((n, *self.z_shape), generator)
        return Noise(z, Gaussian.noise((n, *self.y_shape), generator), temperature)

    def mean_x(self, y: Tensor) -> Tensor:
        """The mean images (B, C, H, W) of p(x|y), in [0, 1]."""
        return self.p_x(y).mean.clamp(0, 1)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Deterministic reconstructions from the posterior modes: images (B, C, H, W) in [0, 1]."""
        z = self.q_z(x).mode
        return self.mean_x(self.q_y(z, x).mode)

    @torch.no_grad()
    def psnr(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Peak signal-to-noise ratio in dB, 10 log10(1 / MSE), with the MSE over the pixels of all images."""
        squares, n = 0.0, 0
        for x, _ in batches:
            squares += ((self.reconstruct(x) - x) ** 2).sum(dtype=torch.float64)
            n += x.numel()
        return -10 * math.log10(squares / n) if squares > 0 else math.inf

    @torch.no_grad()
    def sample(self, n: int | None = None, z: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """n ancestral samples, or one for each of the given z (n, ...): images (n, C, H, W) in [0, 1]."""
        if generator is None:
            generator = torch.Generator(next(self.parameters()).device)
            generator.seed()
        noise = self.noise(n if z is None else len(z), generator)
        z = self.family.from_prior(noise.z) if z is None else z
        return self.p_x(self.p_y(z).sample(noise.y)).sample(generator).clamp(0, 1)
