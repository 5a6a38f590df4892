"""The single-layer beta-VAE (Higgins et al., 2017) as a baseline: an HVAE whose z has no dimensions."""

from torch import Tensor

from utils.errors import UserError

from .hvae import HVAE
from .latents import Gaussian


class BVAE(HVAE):
    """beta-VAE with the single latent y and the prior N(0, I); R(z) = 0, and beta_z has no effect."""

    @staticmethod
    def check(config) -> None:
        if config.use_conv_z:
            raise UserError("--vae_type: BVAE has no z, so no --use_conv_z, and supports up to 128 pixels")
        for name in ("beta_z", "qz_family"):
            if getattr(config, name) != getattr(type(config), name):
                raise UserError(f"--{name}: BVAE has no z; leave it at {getattr(type(config), name)}")

    def build_inference(self, nets, config) -> None:
        self.z_shape = (0,)
        self.x_branch = nets.x_branch()
        self.y_head = nets.y_bottom_up()

    def q_z_given(self, h: Tensor) -> Gaussian:
        nothing = h.new_zeros(len(h), 0)
        return Gaussian(nothing, nothing + 1)

    def q_y_given(self, z: Tensor, h: Tensor, p_y: Gaussian) -> Gaussian:
        return self.gaussian(*self.y_head(self.x_branch(h)))

    def p_y(self, z: Tensor) -> Gaussian:
        zeros = z.new_zeros(len(z), *self.y_shape)
        return Gaussian(zeros, zeros + 1)
