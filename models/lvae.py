"""The ladder VAE (Sonderby et al., 2016): only what differs from the HVAE.

q(z|x) and q(y|z,x) share a bottom-up network, and q(y|z,x) is the precision-weighted product of a bottom-up
Gaussian and the prior p(y|z). By default, both betas warm up over the first fifth of the epochs.
"""

from torch import Tensor, nn

from utils.errors import UserError

from .hvae import HVAE
from .latents import Gaussian, precision_weighted


class LVAE(HVAE):
    """Ladder VAE with a vector or a convolutional z."""

    @staticmethod
    def default_warmup(num_epochs: int) -> int:
        return num_epochs // 5

    @staticmethod
    def check(config) -> None:
        HVAE.check(config)
        if config.use_conv_z and config.image_shape[1] == 256:
            raise UserError("--vae_type: LVAE supports up to 128 pixels; use HVAE for 256")

    def build_inference(self, nets, config) -> None:
        self.trunk = nets.trunk()
        self.z_head = nets.z_head(self.family.n_heads)
        self.y_head = nets.y_bottom_up()
        self.y_prior = nets.y_prior()
        if config.use_conv_z:  # all networks then output variances, not standard deviations
            self.gaussian = self.z_from_outputs = Gaussian.from_variance

    def decoder_hidden(self, likelihood: nn.Module, config) -> int | None:
        return likelihood.hidden if config.use_conv_z else None

    def features(self, x: Tensor) -> Tensor:
        """The output of the shared bottom-up network."""
        return self.trunk(x)

    def q_z_given(self, h: Tensor):
        return self.z_from_outputs(*self.z_head(h))

    def q_y_given(self, z: Tensor, h: Tensor, p_y: Gaussian) -> Gaussian:
        return precision_weighted(Gaussian.from_variance(*self.y_head(h)), p_y)
